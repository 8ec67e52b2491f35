"""New tensors are full of NaN, also between their rows: what a kernel does not write shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Those that a module asks a tensor for; not what torch.compile or another mode traces."""

    def filled(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*arguments: Any, **options: Any) -> Tensor:
            tensor = empty(*arguments, **options)
            traced = torch.compiler.is_compiling() or type(tensor) is not Tensor
            if not traced and tensor.is_floating_point():
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                tensor.as_strided((size,), (1,), 0).fill_(math.nan)
            return tensor

        return new

    with contextlib.ExitStack() as stack:
        for name in ("new_empty", "new_empty_strided"):
            stack.enter_context(mock.patch.object(Tensor, name, filled(getattr(Tensor, name))))
        yield
