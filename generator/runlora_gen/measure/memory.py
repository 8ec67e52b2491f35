"""Memory that a step takes, as torch sees it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward, beside the parameters; a tensor saved twice counts once."""
    living = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in living:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak of bytes that torch's allocator hands out during a step, above its start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - start
    return max(_live(step))


def held_bytes(forward: Callable[[], object]) -> int:
    """Bytes that torch's allocator has handed out on a CPU when a forward is done and what it gave is held."""
    held = []
    return _live(lambda: held.append(forward()))[-1]


def _live(step: Callable[[], object]) -> list[int]:
    """Bytes that torch's allocator has handed out on a CPU, above the start, after each time that it does."""
    gc.freeze()  # what else is freed meanwhile would be counted; to collect it first takes seconds in a large process
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        gc.unfreeze()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(itertools.accumulate((event.nbytes() for event in events), initial=0))
