"""One factor frozen (LoRA-FA, or the other way round): what is kept for the backward, in true bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from runlora_gen.request.workload import Workload
from torch import Tensor

T, I, O, R = 96, 48, 80, 4  # noqa: E741  # the notation of the whole project
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kept(module: ModuleType, train: str, input_grad: bool, dtype: torch.dtype, adapter: torch.dtype) -> list[Tensor]:
    """What autograd keeps that is no parameter."""
    frozen = {"weight": torch.randn(O, I, dtype=dtype), "bias": torch.randn(O, dtype=dtype)}
    factors = {
        "lora_A": torch.randn(R, I, dtype=adapter, requires_grad="a" in train),
        "lora_B": torch.randn(O, R, dtype=adapter, requires_grad="b" in train),
    }
    parameters = {t.untyped_storage().data_ptr() for t in (*frozen.values(), *factors.values())}
    x = torch.randn(T, I, dtype=dtype, requires_grad=input_grad)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module.lora_linear(x, **frozen, **factors, scaling=0.5)
    y.sum().backward()
    assert {name for name, factor in factors.items() if factor.grad is not None} == {f"lora_{train.upper()}"}
    return [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in parameters]


@pytest.mark.parametrize("input_grad", [True, False], ids=["", "first layer"])
@pytest.mark.parametrize("train", ["a", "b"])
@pytest.mark.parametrize(("dtype", "adapter"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp32")])
def test_only_what_its_gradient_reads_is_kept(
    load: Callable[..., ModuleType], train: str, input_grad: bool, dtype: str, adapter: str
) -> None:
    """With lora_A frozen S in place of X, with lora_B frozen X and no S; beside it casts of the factors at most."""
    workload = Workload(train=(train,), dtype=dtype, adapter_dtype=adapter, input_grad=input_grad, kernels=False)
    found = kept(load(workload), train, input_grad, DTYPES[dtype], DTYPES[adapter])
    casts = {(R, I), (O, R)} if adapter != dtype else set()
    (activation,) = (tensor for tensor in found if tuple(tensor.shape) not in casts)
    assert tuple(activation.shape) == ((T, R) if train == "b" else (T, I))
    assert activation.untyped_storage().nbytes() == activation.numel() * 2, "no view of something larger"
