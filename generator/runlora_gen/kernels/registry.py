"""The kernels that there are, by their names: every folder of this room is one."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from .record import Kernel

#: Where the folders are, with the templates in them and beside them.
FOLDER = Path(__file__).parent


def _found() -> Mapping[str, Kernel]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]) if module.ispkg)
    return {name: import_module(f"{__package__}.{name}").KERNEL for name in names}


KERNELS: Mapping[str, Kernel] = MappingProxyType(_found())
