"""What is decided without pricing all programs, against the choice of all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.schedule import workspace, workspace_at_least
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import Experts
from runlora_gen.request.groups import Group
from runlora_gen.request.layers import Layer
from runlora_gen.request.mlps import Mlp
from runlora_gen.request.workload import CHOICES, Workload
from runlora_gen.search import choose, contenders
from runlora_gen.search.candidates import Site, paired_phases, programs_for, setting_of
from runlora_gen.search.choose import Decision, decide

WORKLOADS = (
    Workload(),
    Workload(adapter_dtype="bf16", allow_lossy_merge=True),
    Workload(adapter_dtype="bf16", allow_lossy_merge=True, merge_rounding="stochastic"),
    Workload(adapter_dtype="bf16", launch="graph", device="h200"),
    Workload(dtype="fp32", device="cpu"),
    Workload(kernels=False, train=("b",), input_grad=False),
    Workload(dropout=0.1),
    Workload(base="nf4", adapter_dtype="bf16"),
    Workload(base="fp8", device="rtx-4090", float8="both", adapter_dtype="bf16"),
)
SITES: tuple[Site, ...] = (
    Layer(512, 768, True, 3, ("q_proj",)),
    Group(("q", "k"), 512, (512, 128), False, 2, (("q_proj", "k_proj"),)),
    Mlp(256, 640, 256, "silu_gated", False, 2, (("gate_proj", "up_proj", "down_proj"),)),
    Experts(8, 256, 384, True, 2, False, 2, ("gate_up_proj",)),
    Experts(8, 384, 256, False, 2, False, 2, ("down_proj",)),
)


def same(some: Decision, every: Decision) -> None:
    """All that a decision tells of, but for its candidates."""
    for name in ("chosen", "fallback", "runner_up"):
        mine, others = getattr(some, name), getattr(every, name)
        assert (mine and (mine.program, mine.cost)) == (others and (others.program, others.cost)), name
    assert (some.front, some.difference, some.programs) == (every.front, every.difference, every.programs)
    left = {candidate.program for candidate in some.candidates}
    assert [c.program for c in some.candidates] == [c.program for c in every.candidates if c.program in left]


@settings(max_examples=60, deadline=None)
@given(
    workload=st.sampled_from(WORKLOADS),
    site=st.sampled_from(SITES),
    rank=st.sampled_from([4, 16, 64]),
    tokens=st.sampled_from([1, 16, 700, 4096]),
    criterion=st.sampled_from(CHOICES["criterion"]),
    share=st.sampled_from([0.0, 0.03125, 0.5, 1.0]),
    limited=st.none() | st.integers(0, 100),
)
def test_the_same_is_decided_of_those_that_matter(
    workload: Workload, site: Site, rank: int, tokens: int, criterion: str, share: float, limited: int | None
) -> None:
    """The winners, the runner-up, the front, and how many programs there are; also under a limit on saved bytes."""
    if isinstance(site, Experts) and workload.quantized:
        workload = replace(workload, base="plain", float8=Workload.float8)
    workload = replace(workload, criterion=criterion)
    setting = setting_of(workload, site, rank, tokens)
    every = decide(workload, setting, share)
    assert every.programs == len(every.candidates)
    if limited is not None:
        outputs = len(setting.derivation.outputs)
        saved = sorted({candidate.cost.saved_bytes // outputs for candidate in every.candidates})
        workload = replace(workload, max_saved_bytes=saved[limited * (len(saved) - 1) // 100] + 1)
        setting = setting_of(workload, site, rank, tokens)
        try:
            every = decide(workload, setting, share)
        except SpecError as error:
            with pytest.raises(SpecError) as raised:
                decide(workload, setting, share, every=False)
            assert str(raised.value) == str(error)
            return
    same(decide(workload, setting, share, every=False), every)


def test_few_are_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an MLP's some hundredth; and of most phases no order is sought that needs little memory."""
    workload = WORKLOADS[3]
    setting = setting_of(workload, SITES[2], 16, 5000)
    assert len(contenders.contenders(workload, setting)) < len(programs_for(workload, setting)) / 10
    sought = []
    monkeypatch.setattr(contenders, "workspace", lambda *given: sought.append(given) or workspace(*given))
    contenders.contenders(workload, setting_of(workload, SITES[2], 16, 5001))
    phases = sum(len(before) + len(after) for before, after in paired_phases(workload, setting))
    assert 0 < len(sought) < phases


@pytest.mark.parametrize("site", SITES, ids=lambda site: type(site).__name__)
def test_no_order_needs_less_than_what_is_needed_at_least(site: Site) -> None:
    setting = setting_of(WORKLOADS[1], site, 8, 300)
    phases = {phase for pair in paired_phases(WORKLOADS[1], setting) for some in pair for phase in some}
    for phase in phases:
        assert workspace_at_least(phase, setting.bytes_of) <= workspace(phase, setting.bytes_of)


def test_whoever_asks_for_all_gets_all() -> None:
    setting = setting_of(WORKLOADS[0], SITES[0], 8, 64)
    some, every = (choose.decide(WORKLOADS[0], setting, every=every) for every in (False, True))
    assert len(some.candidates) < len(every.candidates) == some.programs


def rated(**changes: Any) -> contenders._Rated:
    phase = next(
        phase for pair in paired_phases(WORKLOADS[0], setting_of(WORKLOADS[0], SITES[0], 8, 64)) for phase in pair[1]
    )
    known = contenders._Rated(phase, 0, (2.0, 2.0, 1.0), (5, 6, 7, 8), (False, False, False))
    return replace(known, **changes)


def test_what_beats_another() -> None:
    """In everything that counts; of times that may be equal with the rest, also in what decides then."""
    tie = 1e-6
    faster = rated(times=(1.0, 1.0, 9.0))
    assert faster.beats(rated(), tie) and not rated().beats(faster, tie)
    for counts in ((6, 6, 7, 8), (5, 7, 7, 8)):  # more is kept, more is computed
        assert not rated(times=(1.0, 1.0, 1.0), counts=counts).beats(rated(), tie)
    assert rated(times=(1.0, 1.0, 1.0), counts=(5, 6, 9, 9)).beats(rated(), tie)  # what only decides of equals
    for losses in ((True, False, False), (False, True, False), (False, False, True)):
        assert not replace(faster, losses=losses).beats(rated(), tie)
        assert faster.beats(rated(losses=losses), tie)
        assert replace(faster, losses=losses).beats(rated(losses=losses), tie)
    assert not rated().beats(rated(), tie), "all may be equal: their names decide"
    assert not rated(times=(2.0 - tie / 2, 2.0, 1.0)).beats(rated(), tie)
    assert rated(counts=(5, 6, 6, 8)).beats(rated(), tie)
    assert not rated(times=(2.0, 2.0, 2.0), counts=(5, 6, 6, 8)).beats(rated(), tie)
