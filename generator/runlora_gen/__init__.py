"""Generate fast LoRA linears: see the README.

The entries are imported when they are first used: the command line needs neither torch nor them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import (
        accelerate,
        disable_adapter,
        generate,
        inject_lora,
        load_adapter,
        merge,
        restore,
        save_adapter,
        unmerge,
    )

__all__ = [
    "accelerate",
    "disable_adapter",
    "generate",
    "inject_lora",
    "load_adapter",
    "merge",
    "restore",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
