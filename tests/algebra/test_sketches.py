"""What comes next parses, is counted and priced on today's ground."""

from __future__ import annotations

from collections.abc import Iterable

from runlora_gen.algebra.derivation import Derivation
from runlora_gen.algebra.enumerate import Program, enumerate_programs
from runlora_gen.algebra.operations import Draw, Map
from runlora_gen.cost.device import load_device
from runlora_gen.cost.price import price, price_frozen
from runlora_gen.cost.setting import DTYPES, Setting

from .sketches import DROPOUT, dropout

ALL = ("dX", "dA", "dB")
BF16 = DTYPES["bf16"]
T, I, O, R = 4096, 5120, 13824, 16  # noqa: E741 - as the formulas have it


def setting(derivation: Derivation) -> Setting:
    return Setting(T, I, O, R, BF16, BF16, False, frozenset(ALL), load_device("h100"), derivation)


def priced(programs: Iterable[Program]) -> None:
    """Every program takes longer than the frozen site, and less than ten times as long."""
    for program in programs:
        where = setting(program.derivation)
        cost, frozen = price(program, where), price_frozen(where)
        assert frozen < cost.time_s < 10 * frozen and cost.flops > 4 * T * I * O


def test_its_formulas_parse_back() -> None:
    site = dropout()
    assert all(site.parse(str(operation)) == operation for operation in site.operations)


def test_under_dropout_a_mask_is_kept_or_drawn_again_and_nothing_is_merged() -> None:
    site = dropout()
    without = enumerate_programs(site, ALL)
    # Y split or merged, S kept or made again.
    assert len(without) == 2 * 2
    assert not any(isinstance(op, Draw | Map) for program in without for op in program.operations)
    priced(without)

    under = enumerate_programs(site, ALL, facts=frozenset({DROPOUT}))
    # Forward: H by either mask. Backward: S kept or not; dX by either mask, which is kept or drawn again; H kept, made
    # by that mask, or by the other one, which is kept or drawn again, too.
    assert len(under) == 2 * 2 * (2 * (2 + 2 + 4))
    assert not any(site["M"] in program.forward.made | program.backward.made for program in under)
    for program in under:
        # What draws anew keeps the seed, and no mask.
        drawn = any(isinstance(operation, Draw) for operation in program.backward.operations)
        assert (site["seed"] in program.saved_inputs) == drawn
    priced(under)

    def saved(*kept: str) -> int:
        (least,) = {price(p, setting(site)).saved_bytes for p in under if {str(s) for s in p.kept} == set(kept)}
        return least

    # X is kept for H, unless H is.
    x = T * I * 2
    assert saved("K8") == x + T * I and saved("K1") == x + T * I // 8
    assert saved("H", "K1") == x + T * I // 8 and saved("H", "S", "K8") == x + T * I + T * R * 2
    assert saved() == x
