"""PEFT's order: what its linears keep is counted on them, and its price is held against measured ones."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from runlora_gen.cost.peft import price_peft
from runlora_gen.cost.price import price_frozen
from runlora_gen.measure.memory import saved_bytes
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_for
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).parents[2] / "tools" / "results"
TOKENS, IN, OUT, RANK = 24, 48, 80, 4


@pytest.mark.parametrize("train", [("a", "b"), ("a",), ("b",)], ids="-".join)
@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_linear_of_peft_keeps(
    train: tuple[str, ...], input_grad: bool, adapter_dtype: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a GPU runs: there the mask is of bytes, where on a CPU it is of the input's dtype.
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0])
    tuner = pytest.importorskip("peft.tuners.lora.layer")
    config = pytest.importorskip("peft").LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout)
    linear = nn.Linear(IN, OUT, bias=False).to(torch.bfloat16).requires_grad_(False)
    layer = tuner.Linear(linear, adapter_name="default", config=config, r=RANK, lora_alpha=RANK)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16 if adapter_dtype == "bf16" else torch.float32)
            parameter.requires_grad_(("a" if "lora_A" in name else "b") in train)
    assert layer.training and isinstance(layer.lora_dropout["default"], nn.Dropout if dropout else nn.Identity)
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16, requires_grad=input_grad)
    cast = torch.autocast("cpu", torch.bfloat16) if adapter_dtype == "fp32" else contextlib.nullcontext()
    parameters = list(layer.parameters())

    def forward() -> Tensor:
        with cast:
            return layer(x)

    own = saved_bytes(forward, [*parameters, x])
    with_input = saved_bytes(forward, parameters)
    workload = Workload(adapter_dtype=adapter_dtype, train=train, input_grad=input_grad, dropout=dropout)
    cost = price_peft(setting_for(workload, IN, OUT, RANK, False, TOKENS))
    assert cost.own_bytes == own
    assert cost.keeps_input * TOKENS * IN * 2 == with_input - own


@pytest.mark.parametrize("name", ["linear_h100_bf16_r16", "linear_h100_bf16_ranks", "linear_h200_bf16_r16"])
def test_its_price_is_what_was_measured(name: str) -> None:
    """Ratios to the frozen linear, by CUDA-graph replay, within 5 %."""
    report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    off = []
    for row in report["rows"]:
        for contender, adapter_dtype in (("peft", "bf16"), ("peft fp32 adapters, autocast", "fp32")):
            workload = Workload(adapter_dtype=adapter_dtype, device=name.split("_")[1])
            features = map(int, row["shape"].split("x"))
            setting = setting_for(workload, *features, row["rank"], False, row["tokens"])
            ratio = price_peft(setting).times.device_s / price_frozen(setting)
            off.append(ratio / row["results"][contender]["graph"]["over_frozen"]["median"] - 1)
    assert len(off) >= 8 and max(map(abs, off)) < 0.05


def test_more_is_computed_for_more_gradients() -> None:
    def seconds(**options: object) -> tuple[float, float]:
        cost = price_peft(setting_for(Workload(**options), 4096, 4096, 8, False, 4096))  # type: ignore[arg-type]
        return cost.backward.device_s, cost.backward.host_s

    whole = seconds()
    assert seconds(bias="lora_bias") > whole == seconds(bias="all"), "the linear has no bias of its own"
    for less in ({"train": ("a",)}, {"train": ("b",)}, {"input_grad": False}, {"adapter_dtype": "bf16"}):
        assert all(mine < most for mine, most in zip(seconds(**less), whole, strict=True))
