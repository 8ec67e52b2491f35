"""What storing an update in a weight's own precision loses.

A merged weight M = round(W + Δ), Δ = s B A, can only move W by whole ulps: an element of Δ below half an ulp of W is
dropped. Model: W ~ N(0, σ_W²), Δ ~ N(0, σ_Δ²), independent; W lies on the grid already, so the error of one element is
the distance from Δ to the nearest multiple of u = ulp(W). With u fixed,

    E[dist²] = Σ_k ∫_{(k-½)u}^{(k+½)u} (x - k u)² φ(x / σ_Δ) / σ_Δ dx,

and u = 2^(e - p) for |W| in [2^e, 2^(e+1)), p explicit mantissa bits, so the mean over W is a sum over binades. The
update error is the root of that mean over σ_Δ: 1 means that the update is lost. (The grid changes where W + Δ crosses a
power of two; with σ_Δ ≪ σ_W that is rare, and is neglected.)

A weight that is made of codes lies on no grid: round(absmax code + Δ), rounded once, has the error that absmax code has
without Δ, ``rounding_error(σ_W)`` of σ_W, and the right mean. The update adds none, and its error is stated as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

#: Explicit mantissa bits of float8_e4m3fn. Rounding to them is an error of ``rounding_error(1, 3)`` of normal values,
#: and of the sums of their products with others: the errors have as many signs as the values.
FLOAT8_MANTISSA_BITS = 3
#: Standard deviation of a trained weight that the reported figure assumes (Llama's initialisation).
WEIGHT_STD = 0.02
#: Standard deviation of lora_B that the reported figure assumes: early in a fine-tuning run.
LORA_B_STD = 1e-3


def update_std(in_features: int, rank: int, scaling: float = 1.0, lora_b_std: float = LORA_B_STD) -> float:
    """Standard deviation of Δ = s B A with lora_A drawn as PEFT draws it (kaiming_uniform, a=√5: variance 1/(3 I))."""
    return scaling * math.sqrt(rank) * lora_b_std / math.sqrt(3 * in_features)


@lru_cache(maxsize=1024)
def merge_error(
    delta_std: float, mantissa_bits: int, weight_std: float = WEIGHT_STD, *, stochastic: bool = False
) -> float:
    """Relative root-mean-square error of an update that is merged into a weight.

    Args:
        delta_std: σ_Δ, above 0.
        mantissa_bits: explicit mantissa bits of the weight's dtype (bf16 7, fp16 10, fp32 23).
        weight_std: σ_W.
        stochastic: rounded up or down at random, with the right mean.

    Returns:
        To the nearest: a number in [0, about 1]; 1 is a lost update. Stochastic: may be above 1, but its mean is 0.
        fp16's subnormals are neglected.
    """
    mean_square = _mean_square_to_neighbours if stochastic else _mean_square_to_grid
    return math.sqrt(
        sum(
            share * mean_square(2.0 ** (exponent - mantissa_bits) / delta_std)
            for exponent, share in _binades(weight_std)
        )
    )


@lru_cache(maxsize=1024)
def rounding_error(delta_std: float, mantissa_bits: int) -> float:
    """Relative root-mean-square error of rounding an update, or any normal values, by themselves.

    Each element moves by a uniform part of half its own ulp: E[u(Δ)²] / 12, as a sum over the binades of Δ.
    """
    mean_square = sum(share * 4.0 ** (exponent - mantissa_bits) / 12 for exponent, share in _binades(delta_std))
    return math.sqrt(mean_square) / delta_std


def _binades(std: float) -> Iterator[tuple[int, float]]:
    """Exponents e, and the share of N(0, std²) with 2^e <= |x| < 2^(e+1), where that share is not negligible."""
    top = math.ceil(math.log2(8 * std))
    for exponent in range(top, top - 40, -1):
        yield exponent, _gaussian_mass(2.0**exponent / std, 2.0 ** (exponent + 1) / std)


def _gaussian_mass(low: float, high: float) -> float:
    """P(low <= |Z| < high) for a standard normal Z."""
    return math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))


def _mean_square_to_grid(step: float) -> float:
    """E[(Z - nearest multiple of step)²] for a standard normal Z."""
    if step < 0.25:
        return step * step / 12  # the density is flat over one step: exact to many digits
    total = 0.0
    for k in range(-math.ceil(9 / step), math.ceil(9 / step) + 1):
        low, high, centre = (k - 0.5) * step, (k + 0.5) * step, k * step
        mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        first = _density(low) - _density(high)  # ∫ x φ
        second = mass + low * _density(low) - high * _density(high)  # ∫ x² φ
        total += second - 2 * centre * first + centre * centre * mass
    return total


def _mean_square_to_neighbours(step: float) -> float:
    """E[(Z - k step) ((k + 1) step - Z)], k step being the multiple below, for a standard normal Z."""
    if step < 0.25:
        return step * step / 6
    total = 0.0
    for k in range(-math.ceil(9 / step) - 1, math.ceil(9 / step) + 1):
        low, high = k * step, (k + 1) * step
        mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        first = _density(low) - _density(high)  # ∫ x φ
        second = mass + low * _density(low) - high * _density(high)  # ∫ x² φ
        total += (low + high) * first - second - low * high * mass
    return total


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
