"""Triton's interpreter without what it does again and again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

#: Set on what was already quickened.
_QUICK = "_runlora_gen_quick"


def quicken() -> None:
    """Let Triton's interpreter take less than half of its time for small tiles; it computes the same.

    Nothing happens where Triton does not interpret, or has other internals.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter

        if hasattr(interpreter._patch_lang, _QUICK):
            return
        once_a_launch = _patched_once_a_launch(interpreter)
        options = interpreter.interpreter_builder.options
        if not options.debug:  # computed, with 20 operations for one, whether integers overflow would be told nobody
            interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once_a_launch


def _patched_once_a_launch(interpreter: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Replace the language by the interpreted one once a launch, not at each call of a function on tiles.

    Those calls are by far the most, and replace what is replaced already.
    """
    patch, launch, scope = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope
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
    return once_a_launch, launched
