"""The kernels of generated modules in a model, compiled before its first step."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .packages import needed, packages_in

if TYPE_CHECKING:
    from torch import nn


def warmup(
    model: nn.Module, tokens: int | Iterable[int] = 4096, *, threads: int | None = None, progress: bool = True
) -> Any:
    """Compile the kernels that a model's generated layers will launch, several at a time, and load them.

    Call it after ``accelerate`` or ``inject_lora``, when the model lies on its devices; under autocast, if the steps
    run so. The model stays as it is.

    Args:
        model: with generated layers.
        tokens: rows that a layer gets in a step, batch times sequence; several where batches differ.
        threads: that compile; None for one a core.
        progress: show a bar on stderr, if that is a terminal.

    Returns:
        A report: ``layers``, ``kernels`` (names), ``seconds``, ``nothing`` (why, if nothing was to compile); it prints
        well.

    Raises:
        ValueError: the model has no generated layers, or a number is not above 0.
    """
    needed(model)
    counts = tokens if isinstance(tokens, int) else tuple(tokens)
    shares = (package.warmup(model, counts, threads=threads, progress=progress) for package in packages_in(model))
    return functools.reduce(operator.add, shares)
