"""The work of an operation, as a key: what device profiles hold their measurements by.

A key is made of an operation's structure alone, not of its symbols' names and not of how its formula is printed: it
stays what it is when those change. Operations that do the same work share it, as X Wᵀ and X Mᵀ do. In ASCII::

    WORK  =  FORM [WORD …]                                  of a single step
    WORK  =  KERNEL: FORM [WORD …]; FORM [WORD …]; …        of several in one kernel, in its order
    FORM  =  INDICES,INDICES->INDICES                       the operands and the result, each as it is stored

INDICES are T for tokens, I for in_features, O for out_features, R for the rank; of experts E, N for the tokens whose
rows T are, and F for the features of what goes into an activation; a number follows where an operation has several of
one letter. A product sums over the index that its result lacks: ``TO,OI->TI`` is dY W, and ``TI,OI->TO`` is X Wᵀ, which
reads W transposed. WORD is ``scaled``, ``added`` (to another tensor), ``accumulated`` (to what the result held) or
``biased``, in this order; of what is no product its function (``TO->O sum``); in a kernel also ``inner``: a result that
is never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import assert_never

from .operations import Contract, Convert, Draw, Fused, Map, Operation, Reduce, Route, Step, Symbol, products


@lru_cache(maxsize=4096)
def work(operation: Operation) -> str:
    """The key of what an operation does."""
    letters = _letters(operation)
    inner = operation.inner if isinstance(operation, Fused) else ()
    steps = "; ".join(" ".join((_form(step, letters), *_words(step, inner))) for step in products(operation))
    return f"{operation.kernel}: {steps}" if isinstance(operation, Fused) else steps


def kind(product: Contract) -> str:
    """What a product does, whichever of a site's linears it is of: its form, whose indices have no numbers."""
    return _form(product, {index: index[0] for symbol in (*product.reads, product.out) for index in symbol.shape})


def _letters(operation: Operation) -> Mapping[str, str]:
    """An operation's indices as a form has them."""
    symbols = (symbol for step in products(operation) for symbol in (*step.reads, *step.outputs))
    alike: dict[str, list[str]] = {}
    for index in dict.fromkeys(index for symbol in symbols for index in symbol.shape):
        alike.setdefault(index[0], []).append(index)
    return {
        index: f"{letter}{number}" if len(indices) > 1 else letter
        for letter, indices in alike.items()
        for number, index in enumerate(indices, start=1)
    }


def _form(step: Step, letters: Mapping[str, str]) -> str:
    def indices(symbol: Symbol) -> str:
        return "".join(letters[index] for index in symbol.shape)

    operands = (step.left.symbol, step.right.symbol) if isinstance(step, Contract) else step.operands
    return f"{','.join(map(indices, operands))}->{indices(step.out)}"


def _words(step: Step, inner: tuple[Symbol, ...]) -> Iterator[str]:
    match step:
        case Contract():
            if step.scaled:
                yield "scaled"
            if step.addend is not None:
                yield "added"
            if step.accumulate:
                yield "accumulated"
            if step.bias is not None:
                yield "biased"
        case Reduce() | Convert() | Map() | Draw() | Route():
            yield f"{step.function} accumulated" if step.accumulate else step.function
        case _:
            assert_never(step)
    if step.out in inner:
        yield "inner"
