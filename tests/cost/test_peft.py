"""PEFT's order: what its linears keep is counted on them, and its price is held against measured ones."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runlora_gen.cost.device import load_device
from runlora_gen.cost.peft import price_peft
from runlora_gen.cost.price import price_frozen
from runlora_gen.measure.memory import saved_bytes
from runlora_gen.request.experts import Experts
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_for, setting_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("names", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids="-".join)
def test_what_experts_of_peft_keep_and_launch(names: tuple[str, ...], adapter_dtype: str) -> None:
    """On Transformers' experts, beside what they keep and launch without adapters."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    tuner, peft = pytest.importorskip("peft.tuners.lora.layer"), pytest.importorskip("peft")
    experts, top_k = 4, 2
    config = modeling.MixtralConfig(
        hidden_size=IN, intermediate_size=OUT, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    frozen = modeling.MixtralExperts(config).to(torch.bfloat16).requires_grad_(False)
    for parameter in frozen.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(TOKENS, top_k, dtype=torch.bfloat16, requires_grad=True)
    index = torch.rand(TOKENS, experts).topk(top_k).indices

    def kept(module: nn.Module) -> int:
        return saved_bytes(lambda: module(x, index, weights), [*module.parameters(), x])

    def launches(module: nn.Module) -> tuple[Counter[str], Counter[str]]:
        forward, backward = Launches(), Launches()
        with forward:
            output = module(x, index, weights)
        with backward:
            output.sum().backward()
        return forward.counts, backward.counts

    without, ahead = kept(frozen), launches(frozen)
    adapted: nn.Module = frozen
    for name in names:
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=[name])
        adapted = tuner.ParamWrapper(adapted, "default", parameter_name=name, config=lora, r=RANK, lora_alpha=2 * RANK)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16 if adapter_dtype == "bf16" else torch.float32)
            parameter.requires_grad_()
    shapes = {"gate_up_proj": (IN, 2 * OUT, True), "down_proj": (OUT, IN, False)}
    workload = Workload(adapter_dtype=adapter_dtype)
    sites = [Experts(experts, *shapes[name], top_k, False, 1, (name,)) for name in names]
    assert kept(adapted) - without == sum(
        price_peft(setting_of(workload, site, RANK, TOKENS)).own_bytes for site in sites
    )
    # The stack is merged twice, the second time to be used; one product by expert makes its gradient, and two of
    # stacks with what scales them those of the factors.
    forward, backward = launches(adapted)
    more = {name: forward[name] - ahead[0][name] for name in ("baddbmm", "_grouped_mm")}
    assert more == {"baddbmm": 2 * len(names), "_grouped_mm": 0}
    more = {name: backward[name] - ahead[1][name] for name in ("_grouped_mm", "bmm")}
    assert more == {"_grouped_mm": len(names), "bmm": 2 * len(names)}
    assert backward["mul"] - ahead[1]["mul"] == 2 * len(names)


class Launches(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gathers", [True, False])
def test_experts_of_peft_read_and_write_whole_stacks(gathers: bool) -> None:
    """Whoever has rows: with few tokens they take far longer than frozen ones, and no less than their stacks' bytes."""

    def added_s(**options: Any) -> float:
        workload = Workload(launch="graph", adapter_dtype="bf16", device="h200", **options)
        setting = setting_of(workload, site, 8, 16)
        return price_peft(setting).times.device_s - price_frozen(setting)

    site = Experts(128, 2048, 1536, gathers, 8, False, 1, ("experts",))
    stack_s = 128 * 2048 * 1536 * 2 / load_device("h200").bytes_per_s
    # M is made twice, of W and of the copy of W; dM is written once, and read for either factor.
    assert 2 * 4 * stack_s + 3 * stack_s < added_s() < 1.1 * (2 * 4 + 3) * stack_s
    assert added_s(train=("a",)) < added_s() - 0.9 * stack_s
    # Without dX no M is read in the backward, by frozen experts neither: W is in its place.
    assert added_s(input_grad=False) == pytest.approx(added_s(), rel=0.05)
