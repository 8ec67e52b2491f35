"""Generate fast LoRA linears: see the README.

The entries are imported when they are first used: the command line needs neither torch nor them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .from_model.live import read_model
    from .generation import generate
    from .into_model.warmup import warmup
    from .into_model.with_peft import accelerate, restore
    from .into_model.without_peft import disable_adapter, inject_lora, load_adapter, merge, save_adapter, unmerge

__all__ = [
    "accelerate",
    "disable_adapter",
    "generate",
    "inject_lora",
    "load_adapter",
    "merge",
    "read_model",
    "restore",
    "save_adapter",
    "unmerge",
    "warmup",
]

#: Where they are, but for those of ``into_model.without_peft``.
_ELSEWHERE: Mapping[str, str] = {
    "accelerate": "into_model.with_peft",
    "generate": "generation",
    "read_model": "from_model.live",
    "restore": "into_model.with_peft",
    "warmup": "into_model.warmup",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_ELSEWHERE.get(name, 'into_model.without_peft')}", __name__)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
