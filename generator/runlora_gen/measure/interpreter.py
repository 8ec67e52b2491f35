"""Triton's interpreter without what it does again and again."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

#: Set on what was already quickened, and on shapes what follows from them.
_QUICK, _SIZED = "_runlora_gen_quick", "_runlora_gen_sized"
#: Bytes of results of launches that are kept.
_KEPT_BYTES = 128 << 20


def quicken() -> None:
    """Let Triton's interpreter take less than half of its time for small tiles; it computes the same.

    A launch that it has seen, of the same kernel with the same numbers in all that it is given, it does not run again:
    proofs of several variants launch what these have in common again and again.

    Nothing happens where Triton does not interpret, or has other internals.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter

        if hasattr(interpreter._patch_lang, _QUICK):
            return
        once_a_launch, launched = _patched_once_a_launch(interpreter)
        dtypes, shapes = _dtypes_in_a_table(interpreter), _shapes_once(interpreter)
        options = interpreter.interpreter_builder.options
        if not options.debug:  # computed, with 20 operations for one, whether integers overflow would be told nobody
            interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once_a_launch, _seen_once(launched)
    interpreter._get_np_dtype = dtypes
    for of, name, function in shapes:
        setattr(of, name, function)


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


def _dtypes_in_a_table(interpreter: Any) -> Callable[[Any], Any]:
    """The NumPy dtype of a type, looked up by its name: the interpreter makes a table of all for every question."""
    find, known = interpreter._get_np_dtype, dict[str, Any]()
    block, pointer = interpreter.tl.block_type, interpreter.tl.pointer_type

    def found(of: Any) -> Any:
        element = of.element_ty if isinstance(of, block) else of
        if isinstance(element, pointer):
            return find(of)
        if element.name not in known:
            known[element.name] = find(of)
        return known[element.name]

    return found


def _shapes_once(interpreter: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What of types and tensors follows from a shape, made once a shape; and quick answers where shapes are the same.

    Returns:
        Classes, the names of their functions, and what takes their places.

    Raises:
        TypeError: shapes are no tuples of the language, as in other versions.
    """
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    typed, equal, made = core.block_type.__init__, core.block_type.__eq__, core.tensor.__init__
    broadcast = semantic.broadcast_impl_value
    probe = core.block_type(core.float32, [2])
    if not isinstance(probe.shape, core.tuple) or vars(probe).keys() != {"element_ty", "shape", "numel", "name"}:
        raise TypeError("another block_type")
    if vars(core.tensor(None, probe)).keys() != {"handle", "shape", "numel", "type", "dtype"}:
        raise TypeError("another tensor")
    known: dict[tuple[int, ...], tuple[Any, Any, str]] = {}
    scalar: list[tuple[Any, Any]] = []

    def new_type(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if isinstance(shape, core.tuple) else shape
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in values)
        if sizes not in known:
            typed(self, element_ty, shape)  # also where it is refused
            known[sizes] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    def same(self: Any, other: Any) -> Any:
        if isinstance(other, core.block_type) and self.shape is other.shape:
            return self.element_ty == other.element_ty
        return equal(self, other)

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        is_block = type.is_block()
        sized = vars(type.shape).get(_SIZED) if is_block else scalar[0] if scalar else None
        if sized is None:
            made(self, handle, type)
            if is_block:
                setattr(type.shape, _SIZED, (self.numel, self.shape))
            else:
                scalar.append((self.numel, self.shape))
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sized

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        mine, other = lhs.type, rhs.type
        if mine.is_block() and other.is_block() and mine.shape is other.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return [
        (core.block_type, "__init__", new_type),
        (core.block_type, "__eq__", same),
        (core.tensor, "__init__", new_tensor),
        (semantic, "broadcast_impl_value", broadcasted),
    ]


class _Unknown(Exception):
    """Of an argument nobody knows whether it is the same as another."""


@dataclass
class _Given:
    """What a launch is given: a name of all of it, and the memory of its tensors, by where it starts."""

    name: list[object] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Raises _Unknown."""
        import torch  # here: where nothing is launched nothing else needs it

        if type(value) in (torch.Tensor, torch.nn.Parameter):
            if value.device.type != "cpu" or value.layout != torch.strided:
                raise _Unknown
            self._add_tensor(value)
        elif isinstance(value, (tuple, list)):
            self.name.append((type(value), len(value)))
            self._add_all(value)
        elif type(value).__name__ == "TensorDescriptor":
            self.add_named(vars(value))
        elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            self.name.append((type(value), repr(value)))  # as text: -0.0 is no 0.0, and NaN is NaN
        else:
            raise _Unknown

    def add_named(self, values: Mapping[str, object]) -> None:
        for name in sorted(values):
            self._add_all((name, values[name]))

    def _add_all(self, values: Iterable[object]) -> None:
        for value in values:
            self.add(value)

    def _add_tensor(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        if at not in self.memory:
            self.memory[at] = ctypes.string_at(at, storage.nbytes())
        number = list(self.memory).index(at)
        self.name.append((number, at % 16, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()))

    def digest(self) -> bytes:
        """Of all of it."""
        hashed = hashlib.blake2b(repr(self.name).encode())
        for block in self.memory.values():
            hashed.update(len(block).to_bytes(8, "little"))
            hashed.update(block)
        return hashed.digest()


def _called(function: Any) -> list[Any]:
    """A function of a kernel and, in turn, what it finds by its names in its module."""
    found = [function]
    known = {id(function)}
    for each in found:
        code = getattr(each, "fn", each)  # of what it calls Triton holds the function as it is written
        if not hasattr(code, "__code__"):
            continue
        values = [code.__globals__.get(name) for name in code.__code__.co_names]
        fresh = {id(value): value for value in values if id(value) not in known}
        known |= fresh.keys()
        found += fresh.values()
    return found


def _seen_once(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Write what a launch wrote when all was as it is now, in place of running it.

    All is: the kernel and what it calls, the grid, and the whole memory of the tensors, also that which is written, as
    not all of it need be.
    """
    written: dict[object, tuple[list[object], list[tuple[int, bytes]]]] = {}
    kept = 0

    def launched(executor: Any, *arguments: object, **options: object) -> Any:
        nonlocal kept
        given = _Given()
        try:
            if executor.pre_run_hooks or callable(executor.grid):
                raise _Unknown
            given.add(arguments)
            given.add_named(options)
        except _Unknown:
            return launch(executor, *arguments, **options)
        called = _called(executor.fn)
        key = (*map(id, called), executor.grid, given.digest())
        places = list(given.memory)
        if key not in written:
            result = launch(executor, *arguments, **options)
            after = [ctypes.string_at(place, len(before)) for place, before in given.memory.items()]
            pairs = enumerate(zip(given.memory.values(), after, strict=True))
            changes = [(at, block) for at, (before, block) in pairs if block != before]
            kept += sum(len(block) for _, block in changes)
            if kept > _KEPT_BYTES:
                written.clear()
                kept = 0
            written[key] = called, changes  # kept, so that no other takes their ids
            return result
        for at, block in written[key][1]:
            ctypes.memmove(places[at], block, len(block))
        return None

    return launched
