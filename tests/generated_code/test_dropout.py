"""What variants with dropout keep is what their prices say: H or X with its mask, a byte an element."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.linear import DROPPED
from runlora_gen.cost.price import price
from runlora_gen.measure.memory import saved_bytes
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_for

TOKENS, IN, OUT, RANK = 24, 48, 80, 4


@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
def test_what_is_kept_is_what_it_costs(load: Callable[..., ModuleType], adapter_dtype: str) -> None:
    workload = Workload(kernels=False, adapter_dtype=adapter_dtype, dropout=0.1)
    module = load(workload, in_features=IN, out_features=OUT, rank=RANK, all_variants=True)
    facts = frozenset({CAST_ADAPTER}) if adapter_dtype == "fp32" else NO_FACTS
    table = DROPPED.rows(lambda _: False)
    programs = {p.id: p for p in enumerate_programs(DROPPED, ("dX", "dA", "dB"), table=table, facts=facts)}
    assert module.VARIANTS.keys() <= programs.keys() and len(module.VARIANTS) >= 24
    adapter = torch.bfloat16 if adapter_dtype == "bf16" else torch.float32
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=torch.bfloat16)
    lora_A = torch.randn(RANK, IN, dtype=adapter, requires_grad=True)
    lora_B = torch.randn(OUT, RANK, dtype=adapter, requires_grad=True)
    setting = setting_for(workload, IN, OUT, RANK, False, TOKENS)
    found = set()
    for variant in module.VARIANTS:

        def forward(variant: str = variant) -> torch.Tensor:
            options = {"scaling": 2.0, "dropout": 0.1, "variant": variant}
            y: torch.Tensor = module.lora_linear(x, weight, lora_A, lora_B, **options)
            return y

        kept = saved_bytes(forward, [weight, lora_A, lora_B])
        assert kept == price(programs[variant], setting).saved_bytes, variant
        found.add(kept)
    assert len(found) >= 2 and min(found) == TOKENS * IN * (2 + 1)
