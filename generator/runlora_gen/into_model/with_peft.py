"""The LoRA layers of PEFT, run on generated modules."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..request.bases import BASES
from ..request.errors import SpecError
from ..request.layout import STANDALONE
from .packages import of_rank, of_template, package_of, packages_for

if TYPE_CHECKING:
    from torch import nn


def accelerate(
    model: nn.Module,
    output: str | os.PathLike[str] | None = None,
    *,
    strict: bool = False,
    layout: str = STANDALONE,
    **workload: Any,
) -> Any:
    """Generate what the LoRA linears of a PEFT model need, and run them on it.

    Only their arithmetic changes. The layers stay PEFT's, with all that PEFT does with them: saving, loading, merging,
    switching and disabling adapters. What is not covered runs PEFT's own code, with one warning that counts the layers
    and names the reason. A second call changes nothing.

    Args:
        model: a PeftModel.
        output: the folder for the generated packages, one a rank, which can be vendored; None for one in the user's
            cache, which the report names. What is there and up to date is used as it is.
        strict: raise where a layer would be left to PEFT; the model stays as it was.
        layout: of the packages, as for ``generate``.
        workload: fields of ``Workload`` in place of what the model says (dtypes, device) and of the tokens of short and
            long batches (2048 and 16384 a step). With ``memory_budget``, such as "38GiB", it is planned which layers
            keep what at the largest of ``tokens``, in sequences of ``sequence``.

    Returns:
        A report: ``accelerated`` (names), ``left`` (name to reason), ``folders``, ``modules``; it prints well.

    Raises:
        ValueError: the model has no LoRA layer; a value that is not allowed; or ``strict``, and a layer is not covered.
    """
    from ..from_model.live import read_model

    live = None
    with contextlib.suppress(SpecError):  # it has no linear at all; perhaps quantized ones
        live = read_model(model)
    if live is None or not live.adapted:
        return _left_to_peft(model, strict=strict)
    if workload.get("memory_budget") is not None and len(live.adapted) * len(live.bases) > 1:
        raise SpecError(
            "memory_budget: planned are models whose adapters are of one rank, and whose base is of one kind"
        )
    packages: list[Any] = []
    for base in live.bases:
        one = live if base == live.base else read_model(model, base=base)
        if len(live.bases) > 1 and base != "plain":  # beside the package of the others
            named = {rank: replace(each, package=f"{each.slug}_{base}") for rank, each in one.adapted.items()}
            one = replace(one, adapted=named)
        # A wish of float8 is of those in float8 alone, if there are any.
        wishes = dict(workload)
        if not BASES[base].rows and any(BASES[other].rows for other in live.bases):
            wishes.pop("float8", None)
        packages += packages_for(model, one, one.adapted, output, layout, wishes)
    layers = packages[0].with_peft.lora_layers(model)
    # Each layer to the package of its rank and its base: another one would say that this is not there.
    groups: list[dict[str, Any]] = [{} for _ in packages]
    for name, layer in layers.items():
        groups[of_rank(layer, packages)][name] = layer
    shares = list(zip(packages, groups, strict=True))
    left: dict[str, str] = functools.reduce(operator.or_, (p.with_peft.unserved(group) for p, group in shares))
    left |= packages[0].peft_layers.left_with(left, layers)
    report = functools.reduce(operator.add, (p.with_peft.judged(group, _of(group, left), model) for p, group in shares))
    packages[0].with_peft.say(report, layers, strict=strict, stacklevel=3)
    for package, group in shares:
        package.with_peft.swap(group, model)
    return report


def restore(model: nn.Module) -> tuple[str, ...]:
    """Let the layers of a PEFT model run PEFT's own code again.

    Returns:
        The names of the layers that ran on generated modules.
    """
    package = package_of(model)
    names: tuple[str, ...] = () if package is None else package.restore(model)
    return names


def _of(layers: Mapping[str, Any], left: Mapping[str, str]) -> Mapping[str, str]:
    return {name: left[name] for name in layers if name in left}


def _left_to_peft(model: nn.Module, *, strict: bool) -> Any:
    """The report of a model none of whose LoRA layers is covered, such as a quantized one; warned of.

    Raises:
        SpecError: it has none; or ``strict``.
    """
    here, report = (of_template(name) for name in ("peft_layers", "report"))
    layers = here.lora_layers(model)
    if not layers:
        raise SpecError("model: no LoRA layer of PEFT on a linear: wrap it first, with peft.get_peft_model")
    left = {name: here.unfit(layer) or "no adapter is active" for name, layer in layers.items()}
    line = report.left_to_peft(left)
    if strict:
        raise SpecError(line)
    warnings.warn(line, stacklevel=3)
    return report.Report((), left, (), 0)
