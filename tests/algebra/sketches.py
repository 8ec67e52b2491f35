"""Sites, and ways of sites, that no module is generated for yet: what they will be, in the table's words.

They show what the ground carries: a mask that is kept, drawn again or never made.
"""

from __future__ import annotations

from runlora_gen.algebra.derivation import SAVED, Argument, Derivation, Row, Term, derive, row, rows_of_sum
from runlora_gen.algebra.operations import Store, Symbol

DROPOUT = "dropout"


def _symbols(*texts: str) -> list[Symbol]:
    """Each as ``name: indices`` or ``name: indices, store``."""
    found = []
    for text in texts:
        name, _, rest = text.partition(": ")
        shape, _, store = rest.partition(", ")
        kind: Store = store or "act"  # type: ignore[assignment]
        found.append(Symbol(name, tuple(shape.split()), kind))
    return found


#: What every LoRA linear has.
COMMON = ("X: T I", "A: R I, adapter", "B: O R, adapter", "Y: T O", "S: T R", "dY: T O", "P: T R", "dX: T I")
GRADIENTS = ("dA: R I, adapter", "dB: O R, adapter")
#: Their gradients, from whatever S and P are made of.
LOW_RANK: tuple[Row, ...] = (
    row("P", "dy_b", "P = s * dY @ B"),
    row("dB", "dyt_s", "dB = dY.T @ S"),
    row("S", SAVED),
)


def dropout() -> Derivation:
    """The adapter reads H = K ∘ X / (1 − p); the mask is K8, a byte an element, or K1, a bit, the same from one seed.

    It is kept, or drawn again from the seed, which then is; H is kept, or made again from X. The gradient of X goes
    through the same mask. Under dropout nothing is merged.
    """
    masks = [
        each
        for mask in ("K8", "K1")
        for each in (
            row(mask, "drawn", f"{mask} = draw(seed)", when=(DROPOUT,)),
            row(mask, SAVED, when=(DROPOUT,)),
            row("H", f"by_{mask.lower()}", f"H = drop(X, {mask})", when=(DROPOUT,)),
            row("dX", f"by_{mask.lower()}", f"dX = drop(N, {mask})", "dX += dY @ W", when=(DROPOUT,)),
        )
    ]
    return derive(
        "linear with dropout",
        symbols=_symbols(
            *COMMON, *GRADIENTS, "W: O I, weight", "M: O I, weight", "seed: , seed", "K8: T I, byte", "K1: T I, bit",
            "H: T I", "N: T I",
        ),
        facts=(DROPOUT,),
        arguments=(
            Argument("X", gradient="dX", activation=True),
            Argument("W"),
            Argument("A", gradient="dA"),
            Argument("B", gradient="dB"),
            Argument("seed", when=(DROPOUT,)),
        ),
        outputs=("Y",),
        output_gradients=("dY",),
        base=("Y = X @ W.T", "dX = dY @ W"),
        table=(
            *LOW_RANK,
            *masks,
            row("H", SAVED, when=(DROPOUT,)),
            row("N", "p_a", "N = P @ A", when=(DROPOUT,)),
            row("S", "x_at", "S = s * X @ A.T", when=(f"not {DROPOUT}",)),
            row("S", "h_at", "S = s * H @ A.T", when=(DROPOUT,)),
            row("M", "merge", "M = W + s * B @ A", when=(f"not {DROPOUT}",)),
            row("Y", "merged", "Y = X @ M.T", when=(f"not {DROPOUT}",)),
            *rows_of_sum("Y", Term("X @ W.T", first="base_first"), Term("S @ B.T")),
            *rows_of_sum("dX", Term("dY @ W", first="base_first"), Term("P @ A"), when=(f"not {DROPOUT}",)),
            row("dA", "pt_x", "dA = P.T @ X", when=(f"not {DROPOUT}",)),
            row("dA", "pt_h", "dA = P.T @ H", when=(DROPOUT,)),
        ),
    )  # fmt: skip
