"""The kernels that draw masks from seeds, against float64 with those masks, and the masks themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import DROPPED
from runlora_gen.algebra.operations import Fused
from torch import Tensor

from .test_kernels import BOTH, DEVICE, Launches, check, layouts, machines, poison, property_test, seeds, sizes
from .test_kernels import DTYPES as FLOATS
from .test_kernels_of_groups import LINEARS, alone, doubles, draw_each, launches, low, resize

__all__ = ["launches", "poison", "resize"]

#: What the operations go by.
S, DX_DA, S_ALL, DX_DA_ALL = "S seeded", "dA, dX seeded", "S_q, S_k, S_v seeded", "dA_q, dA_k, dA_v, dX seeded"
RATE = 0.3


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    found = {
        site: [op for op in site.operations if isinstance(op, Fused) and op.kernel in names]
        for site, names in (
            (DROPPED, ("x_at_dropped", "dx_da")),
            (group(LINEARS, dropout=True), ("x_ats_dropped", "dx_das")),
        )
    }
    return alone(tmp_path_factory.mktemp("kernels_that_drop"), found, dropout=True)


def seed_of(number: int) -> Tensor:
    """A seed with bits in both halves."""
    return torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(number)).to(DEVICE)


# Masks


def philox(row: int, four: int, key: int) -> tuple[int, int]:
    """Philox2x32 of seven rounds."""
    for _ in range(7):
        product = row * 0xD256D193
        row, four = product >> 32 ^ key ^ four, product & 0xFFFFFFFF
        key = key + 0x9E3779B9 & 0xFFFFFFFF
    return row, four


@pytest.mark.parametrize(
    ("counter", "words"),
    [  # the known answers of Random123
        ((0, 0, 0), (0x257A3673, 0xCD26BE2A)),
        ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0xAB302C4D, 0x3DC9D239)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E), (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_the_reference_is_philox(counter: tuple[int, int, int], words: tuple[int, int]) -> None:
    assert philox(*counter) == words


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_masks_are_of_philox(kernels: ModuleType, rate: float) -> None:
    seed = seed_of(3)
    high, low_half = divmod(int(seed), 2**32)
    kept = kernels._kept(seed, torch.empty(40, 70, device=DEVICE), rate)
    for row in range(40):
        drawn = {}
        for four in range(20):
            block, t = divmod(four, 4)
            words = philox(row ^ high, four, low_half)
            for column, word in ((2 * t, words[0]), (2 * t + 8, words[1])):
                drawn[16 * block + column], drawn[16 * block + column + 1] = word & 0xFFFF, word >> 16
        assert kept[row].tolist() == [drawn[column] >= round(rate * 2**16) for column in range(70)]


def test_masks_have_their_rate_and_are_independent(kernels: ModuleType) -> None:
    """Over rows, columns, the four that share a counter, and seeds."""
    like = torch.empty(512, 1024, device=DEVICE)
    for rate in (0.05, 0.5, 0.9):
        one, other = (kernels._kept(seed_of(number), like, rate).double() for number in (1, 2))
        sigma = (rate * (1 - rate) / one.numel()) ** 0.5
        assert abs(one.mean() - (1 - rate)) < 5 * sigma and abs(other.mean() - (1 - rate)) < 5 * sigma
        centred = one - one.mean()
        pairs = [(centred, other - other.mean())]
        pairs += [(centred[:, :-step], centred[:, step:]) for step in (1, 2, 3, 4, 8, 64)]
        pairs += [(centred[:-step], centred[step:]) for step in (1, 2, 8, 64, 128)]
        for first, second in pairs:
            assert abs((first * second).mean()) < 5 * rate * (1 - rate) / first.numel() ** 0.5
        rows, columns = one.mean(1), one.mean(0)
        for means, count in ((rows, one.shape[1]), (columns, one.shape[0])):
            assert abs(means.var() / (rate * (1 - rate) / count) - 1) < 0.35


def test_no_mask_comes_again(kernels: ModuleType) -> None:
    like = torch.empty(8, 64, device=DEVICE)
    masks = {kernels._kept(seed_of(number), like, 0.5).cpu().numpy().tobytes() for number in range(1000)}
    assert len(masks) == 1000


@pytest.mark.parametrize(("rate", "cut"), [(0.0, 0), (0.05, 3277), (0.5, 2**15), (1 - 2**-20, 2**16 - 1)])
def test_rates_are_of_16_bits(kernels: ModuleType, rate: float, cut: int) -> None:
    assert kernels._cut(rate) == cut
    if not rate:
        assert kernels._kept(seed_of(0), torch.empty(64, 64, device=DEVICE), rate).all()


# Kernels


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS)
def test_x_at_dropped(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    @property_test
    @example(T=5, I=600, R=[5, 1, 33], machine=132, layout="aligned", seed=0)
    @example(T=5, I=601, R=[16, 8], machine=132, layout="padded", seed=0)
    @example(T=5, I=600, R=[5], machine=132, layout="aligned", seed=0)
    @example(T=5, I=600, R=[5], machine=132, layout="padded", seed=0)
    @example(T=100, I=600, R=[5], machine=1, layout="aligned", seed=0)
    @example(T=100, I=600, R=[5, 1, 33], machine=1, layout="padded", seed=0)
    @example(T=100, I=600, R=[5, 33], machine=1, layout="aligned", seed=0)
    @given(T=sizes, I=sizes, R=st.lists(low, min_size=1, max_size=3), machine=machines, layout=layouts, seed=seeds)
    def run(T: int, I: int, R: list[int], machine: int, layout: str, seed: int) -> None:  # noqa: E741
        resize(machine)
        X, *A = draw_each(seed, dtype, layout, (T, I), *((rank, I) for rank in R))
        drawn = [seed_of(seed + number) for number in range(len(R))]
        scalings = [0.75, -2.0, 0.5][: len(R)]
        for _ in range(2):
            if len(R) > 1:
                found = kernels._launch_x_ats_dropped(X, A, scalings, drawn, RATE, S_ALL)
            else:
                found = [kernels._launch_x_at_dropped(X, A[0], scalings[0], drawn[0], RATE, S)]
            assert kernels._tma_serves(*found)
            for s, a, scaling, mask in zip(found, A, scalings, drawn, strict=True):
                left = kernels._drop_by(mask, X, RATE)
                exact = kernels._drop_by(mask, X.double(), RATE)
                check(s, scaling * (left @ a.t()), scaling * exact @ a.double().t(), exact.abs() @ a.double().t().abs())

    run()
    for kernel in ("x_at_dropped", "x_ats_dropped"):
        assert launches.paths(kernel, "TMA", "WHOLE") == BOTH


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS)
def test_dx_da(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    @property_test
    @example(T=600, I=5, R=[5], machine=132, layout="aligned", wide=False, needs=(True, True), seed=0)
    @example(T=600, I=72, R=[16, 8], machine=132, layout="padded", wide=True, needs=(True, True), seed=0)
    @example(T=600, I=72, R=[16, 8], machine=132, layout="aligned", wide=True, needs=(True, True), seed=0)
    @example(T=600, I=5, R=[5], machine=1, layout="padded", wide=True, needs=(True, True), seed=0)
    @example(T=40, I=200, R=[5], machine=1, layout="aligned", wide=True, needs=(True, False), seed=0)
    @example(T=40, I=200, R=[5, 1, 33], machine=1, layout="padded", wide=False, needs=(True, False), seed=0)
    @example(T=40, I=200, R=[5, 1, 33], machine=1, layout="aligned", wide=False, needs=(True, True), seed=0)
    @example(T=40, I=201, R=[5], machine=3, layout="padded", wide=False, needs=(False, True), seed=0)
    @example(T=40, I=201, R=[5, 3], machine=3, layout="aligned", wide=False, needs=(False, True), seed=0)
    @given(
        T=sizes,
        I=sizes,
        R=st.lists(low, min_size=1, max_size=3),
        machine=machines,
        layout=layouts,
        wide=st.booleans(),
        needs=st.sampled_from([(True, True), (True, False), (False, True)]),
        seed=seeds,
    )
    def run(
        T: int,
        I: int,  # noqa: E741
        R: list[int],
        machine: int,
        layout: str,
        wide: bool,
        needs: tuple[bool, bool],
        seed: int,
    ) -> None:
        resize(machine)
        count, width = len(R), 24
        X, *rest = draw_each(
            seed,
            dtype,
            layout,
            (T, I),
            *((T, rank) for rank in R),
            *((rank, I) for rank in R),
            *[(T, width)] * count,
            *[(width, I)] * count,
        )
        P, A, dY, W = (rest[at : at + count] for at in range(0, 4 * count, count))
        drawn = [seed_of(seed + number) for number in range(count)]
        result = torch.float32 if wide else dtype
        need_dA, need_dX = needs
        read = X if need_dA else None
        for _ in range(2):
            if count > 1:
                given_to = (A, W) if need_dX else ([], [])
                found = kernels._launch_dx_das(P, given_to[0], read, dY, given_to[1], drawn, RATE, result, DX_DA_ALL)
            else:
                one = (A[0], W[0]) if need_dX else (None, None)
                found = kernels._launch_dx_da(P[0], one[0], read, dY[0], one[1], drawn[0], RATE, result, DX_DA)
            assert len(found) == count * need_dA + need_dX
            if need_dA:
                for dA, p, mask in zip(found, P, drawn, strict=False):
                    exact = kernels._drop_by(mask, X.double(), RATE)
                    left = kernels._drop_by(mask, X, RATE)
                    plain = (p.float().t() @ left.float()).to(result)
                    check(dA, plain, p.double().t() @ exact, p.double().t().abs() @ exact.abs())
            if need_dX:
                sums = []
                for dys, ws, ps, As in ((dY, W, P, A), *[[doubles(each) for each in (dY, W, P, A)]]):
                    low_rank = [kernels._drop_by(m, p @ a, RATE) for m, p, a in zip(drawn, ps, As, strict=True)]
                    sums.append(sum(low_rank) + sum(dy @ w for dy, w in zip(dys, ws, strict=True)))
                magnitude = sum(
                    kernels._drop_by(m, p.abs() @ a.abs(), RATE) + dy.abs() @ w.abs()
                    for m, p, a, dy, w in zip(drawn, *map(doubles, (P, A, dY, W)), strict=True)
                )
                # Sums over linears are rounded once more by either.
                check(found[-1], *sums, magnitude * (count + 1))

    run()
    for kernel in ("dx_da", "dx_das"):
        assert launches.paths(kernel, "TMA", "WHOLE") == BOTH
