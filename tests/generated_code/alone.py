"""Kernels of experts and of what is between an MLP's linears, by themselves: without a site and its functions.

Beside them stands what torch computes of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

from runlora_gen.emit.kernel_notes import KernelNode
from runlora_gen.emit.render import _environment
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.measure.modules import import_file
from runlora_gen.request.activations import ACTIVATIONS

_MODULE = """from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

{% include "parts/triton.jinja" %}

{% include "parts/switch.jinja" %}


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


{% include "parts/requires_grad.jinja" %}
{% include "parts/products.jinja" %}


{% include "parts/routing.jinja" %}


{% include "parts/kernels.jinja" %}
"""


def kernels_alone(
    path: Path,
    names: Sequence[str],
    activations: Collection[str] = tuple(ACTIVATIONS),
    tiles: Mapping[str, Mapping[str, int]] | None = None,
) -> ModuleType:
    """A module of these kernels, written to a file that is not there.

    ``tiles``: constants by their keys; each kernel's own go by its name.
    """
    tables = {name: KERNELS[name].tiles for name in names} | dict(tiles or {})
    module = SimpleNamespace(
        kernels=[KernelNode(name) for name in names],
        kernels_note=(),
        helpers=frozenset[str]().union(*(KERNELS[name].helpers for name in names)),
        activations=[ACTIVATIONS[name] for name in activations],
        between=[ACTIVATIONS[name] for name in activations if ACTIVATIONS[name].of_mlps],
        tiles=[(key, tuple(constants.items())) for key, constants in tables.items()],
        small_tiles=(),
        tiles_note=(),
        mlps=False,
        folder=False,
    )
    path.write_text(_environment().from_string(_MODULE).render(module=module), encoding="utf-8")
    return import_file(path, path.stem)
