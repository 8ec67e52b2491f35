"""The update-error formulas against simulations with real bf16 and fp16 tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runlora_gen.cost.rounding import WEIGHT_STD, merge_error, rounding_error, update_std

DTYPES = {torch.bfloat16: 7, torch.float16: 10}


def _relative_rms(error: torch.Tensor, signal: torch.Tensor) -> float:
    return float(error.square().mean().sqrt() / signal.square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta_std", [1e-6, 1e-5, 5e-5, 3e-4, 2e-3])
def test_merge_error_matches_a_simulation(dtype: torch.dtype, delta_std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(10**6, generator=generator) * WEIGHT_STD).to(dtype)
    delta = torch.randn(10**6, generator=generator, dtype=torch.float64) * delta_std
    merged = (weight.double() + delta).to(dtype)
    simulated = _relative_rms(merged.double() - weight.double() - delta, delta)
    assert merge_error(delta_std, DTYPES[dtype]) == pytest.approx(simulated, rel=0.03)


def test_merge_error_of_a_real_lora_update() -> None:
    """d = 2048, r = 8: the update is lost by 96 %, 64 % and 9 % at std(B) = 1e-4, 1e-3, 1e-2."""
    for lora_b_std, lost in ((1e-4, 0.96), (1e-3, 0.64), (1e-2, 0.09)):
        assert merge_error(update_std(2048, 8, lora_b_std=lora_b_std), 7) == pytest.approx(lost, abs=0.02)
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.empty(8, 2048)
    torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    lora_b = torch.randn(2048, 8, generator=generator) * 1e-3
    assert float((lora_b @ lora_a).std()) == pytest.approx(update_std(2048, 8), rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_error_matches_a_simulation(dtype: torch.dtype) -> None:
    delta = torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    simulated = _relative_rms(delta.to(dtype).double() - delta, delta)
    assert rounding_error(1.0, DTYPES[dtype]) == pytest.approx(simulated, rel=0.03)


@given(delta_std=st.floats(1e-12, 1.0), bits=st.sampled_from([7, 10, 23]))
def test_errors_are_shares_and_more_bits_lose_less(delta_std: float, bits: int) -> None:
    error = merge_error(delta_std, bits)
    assert 0 < error <= 1.001
    assert merge_error(delta_std, bits + 3) <= error * 1.001
    assert 0 < rounding_error(delta_std, bits) < 2.0**-bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta_std", [1e-6, 5e-5, 3e-4])
def test_stochastic_rounding_matches_a_simulation(dtype: torch.dtype, delta_std: float) -> None:
    """Noisier than rounding to the nearest for one draw, and right on average."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(10**5, generator=generator) * WEIGHT_STD).to(dtype).double()
    delta = torch.randn(10**5, generator=generator, dtype=torch.float64) * delta_std
    ulp = 2.0 ** (weight.abs().log2().floor() - DTYPES[dtype])
    low = (delta / ulp).floor() * ulp
    errors = []
    for _ in range(20):
        up = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < (delta - low) / ulp
        errors.append(low + up * ulp - delta)
    one = math.sqrt(sum(float(error.square().mean()) for error in errors) / 20) / delta_std
    assert merge_error(delta_std, DTYPES[dtype], stochastic=True) == pytest.approx(one, rel=0.03)
    assert merge_error(delta_std, DTYPES[dtype], stochastic=True) > merge_error(delta_std, DTYPES[dtype])
    mean = _relative_rms(sum(errors) / 20, torch.full_like(delta, delta_std))
    assert mean == pytest.approx(one / math.sqrt(20), rel=0.05)
