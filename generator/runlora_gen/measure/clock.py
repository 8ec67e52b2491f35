"""Timing that can be trusted: on a GPU replayed graphs between events, everything interleaved in random order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], object]

#: Clock cycles of a kernel that spins before a timing, so that the host has launched all before the first runs.
_HEAD_START = 200_000


def captured(run: Run, calls: int = 1, *, pool: Any = None, warmups: int = 1) -> Run:
    """The replay of a CUDA graph that holds some calls of ``run``, made after some more on another stream.

    Graphs of one pool (``torch.cuda.graph_pool_handle()``) share their memory: they must not run side by side.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(calls):
            run()
    return graph.replay


def repeated(run: Run, calls: int) -> Run:
    """Some calls, back to back."""

    def repeat() -> None:
        for _ in range(calls):
            run()

    return repeat


def interleaved(
    runs: Mapping[Key, Run], rounds: int, device: torch.device, *, warmups: int = 1, eager: bool = False, seed: int = 0
) -> dict[Key, list[float]]:
    """Seconds of each of ``runs``, once a round, in a new random order every round.

    Not in one order: what ran before leaves its heat and its cache to the next. ``eager``: see :func:`seconds`;
    ``seed``: of the orders.
    """
    times: dict[Key, list[float]] = {key: [] for key in runs}
    shuffler = random.Random(seed)
    for number in range(rounds + warmups):
        for key in shuffler.sample(list(runs), len(runs)):
            elapsed = seconds(runs[key], device, eager=eager)
            if number >= warmups:
                times[key].append(elapsed)
    return times


def seconds(run: Run, device: torch.device, *, eager: bool = False) -> float:
    """Seconds of one call; on a GPU the device's, from the start of its first kernel to the end of its last.

    ``eager``: on a GPU with the waiting of the device for the host, as in eager mode.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    cuda: Any = torch.cuda  # its events are untyped
    first, last = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda.synchronize()
    if not eager:
        cuda._sleep(_HEAD_START)
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
