"""Triton's interpreter without what it does again and again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

#: Set on what was already quickened.
_QUICK = "_runlora_gen_quick"


def quicken() -> None:
    """Replace the language by the interpreted one once a launch, not at each call of a function on tiles.

    Those calls are by far the most, and replace what is replaced already: more than half of what the interpreter takes
    for small tiles. It computes the same. Nothing happens where Triton does not interpret, or has other internals.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch: Callable[..., Any] | None = getattr(interpreter, "_patch_lang", None)
    launch: Callable[..., Any] | None = getattr(getattr(interpreter, "GridExecutor", None), "__call__", None)
    scope: Callable[..., Any] | None = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or launch is None or scope is None or hasattr(patch, _QUICK):
        return
    patched = set[int]()

    def once_a_launch(function: Callable[..., Any]) -> Any:
        """What is replaced depends on what a module calls the language: its globals."""
        module = id(function.__globals__)
        if module in patched:
            return scope()
        patched.add(module)
        return patch(function)

    def launched(executor: object, *arguments: object, **options: object) -> Any:
        patched.clear()  # after each launch all is as it was
        try:
            return launch(executor, *arguments, **options)
        finally:
            patched.clear()

    setattr(once_a_launch, _QUICK, True)
    interpreter._patch_lang = once_a_launch
    interpreter.GridExecutor.__call__ = launched
