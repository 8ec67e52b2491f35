"""The choice over token counts, for the whole model: what bounds its step, and where one winner follows another.

Host and device work side by side. A step takes as long as the slower of the two: the sum of what the device needs, or
of what the host needs to launch it, over all linears and over the rest of the model, which does not wait either. So
long as the device is the slower one, what a linear costs the host decides nothing; and the other way round.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ..algebra.enumerate import Phase, Program
from ..cost.passes import Times
from ..cost.price import phase_times, price, price_frozen, program_times
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, HOST_BOUND
from ..request.architecture import Architecture
from ..request.experts import experts
from ..request.layers import layers
from ..request.workload import Workload
from .candidates import Site, setting_of
from .choose import Decision, ForwardDecision, decide, decide_forward, fastest
from .criterion import Priced, ranked
from .limits import within

#: Token counts below the asked ones at which the choice is made too: one decoded token, a few, a short batch.
BELOW = (1, 16, 128, 1024)
#: Below the asked counts the winner from above goes on while it is no slower than this over the best.
_TOLERANCE = 0.05
#: Between measured sizes prices are no finer than this: two runs of ``tune`` agree within 3 % on single operations.
_RESOLUTION = 0.01
#: What a step does beside its linears (attention, norms, activations, sums), on the device and on the host, in units of
#: what the frozen linears take there: medians over three of Llama's sizes as Transformers runs them eagerly
#: (tools/results/step_h100.json). A CUDA graph replays the same.
REST_DEVICE, REST_HOST = 0.78, 1.84
#: The same under torch.compile, which fuses passes. On the device: compiled frozen steps over their linears alone, the
#: mean of two of these sizes, 0.21 and 0.35 (tools/results/model_h100.json and step_h100.json). On the host: what
#: Inductor launches for a frozen layer of Transformers' Llama, 10 fused kernels and the attention's 2 calls, over its
#: 14 products (counted in what torch 2.13 generates for a CPU).
COMPILED_REST_DEVICE, COMPILED_REST_HOST = 0.28, 0.86
#: The same where one linear is the whole step: what its autograd function, its module and the engine need of the host.
#: The median of what modules with and without kernels took at 2048 tokens
#: (tools/results/linear_h100_bf16_r16.json). Under torch.compile, where it was not measured, the same is taken.
ALONE_DEVICE, ALONE_HOST = 0.0, 5.8
#: Steps of the search for the host's share of a step that host and device bound together.
_BISECTIONS = 6

Choice = TypeVar("Choice", Decision, ForwardDecision)
Candidate = TypeVar("Candidate", Program, Phase)


@dataclass(frozen=True)
class Range(Generic[Choice]):
    """One decision and the token counts for which it stands: up to ``last_tokens``, or without an end if None."""

    decision: Choice
    last_tokens: int | None


def with_all(workload: Workload, decision: Decision) -> Decision:
    """A decision with every program among its candidates."""
    return decision if decision.whole else decide(workload, decision.setting, decision.host_share)


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for a layer shape, or for a group.

    Attributes:
        layer: what it is for.
        ranges: for training, from few tokens to many.
        forwards: where no gradient is wanted, likewise.
        least: for training where a plan says that as little is kept as can be; None where none does.
    """

    layer: Site
    ranges: tuple[Range[Decision], ...]
    forwards: tuple[Range[ForwardDecision], ...]
    least: Decision | None = None

    def with_all(self, workload: Workload) -> LayerChoice:
        """The same with every program among the candidates of its last range."""
        *others, last = self.ranges
        return replace(self, ranges=(*others, replace(last, decision=with_all(workload, last.decision))))


def decide_step(workload: Workload, sites: Sequence[Site], rank: int, tokens: int) -> list[Decision]:
    """The decision of every layer shape at one token count, under what bounds the whole step.

    Of their candidates they hold those that matter; :func:`with_all` gives the others.

    Raises:
        SpecError: no program of some layer meets ``max_saved_bytes``.
    """
    return _Training(workload, sites, rank).decide(tokens)


def winners_of_step(workload: Workload, sites: Sequence[Site], rank: int, tokens: int) -> list[Decision]:
    """What :func:`decide_step` chooses; where time alone decides without pricing, or telling of, all that lost.

    Raises:
        SpecError: likewise.
    """
    return _Training(workload, sites, rank).decide_below(tokens)


def rest_of_step(workload: Workload, sites: Sequence[Site], rank: int, tokens: int) -> Times:
    """What a step of the model does beside these linears, as :func:`decide_step` reckons it."""
    contest = _Training(workload, sites, rank)
    return contest.rest_of_step(contest.settings(tokens))


def decide_model(
    workload: Workload, sites: Sequence[Site], rank: int, *, alone: bool = False
) -> tuple[LayerChoice, ...]:
    """The choice for every layer shape at all token counts.

    At the asked counts, and below them, where a module may run as well (``BELOW``). Between two counts with different
    winners the threshold is the last count at which the first winner is still at least as good, found by bisection.

    Args:
        workload: what to choose for.
        sites: the layer shapes, with how often the model has each.
        rank: of their LoRA.
        alone: whether these linears are the whole step, as in a benchmark, and no model is around them.

    Raises:
        SpecError: no program of some layer meets ``max_saved_bytes``.
    """
    training = _Training(workload, sites, rank, alone).ranges()
    inference = _Inference(workload, sites, rank, alone).ranges()
    return tuple(LayerChoice(*parts) for parts in zip(sites, training, inference, strict=True))


def decide_experts(workload: Workload, architecture: Architecture, rank: int) -> tuple[LayerChoice, ...]:
    """The choice for all stacks of experts, in a step that has the other linears as well.

    Raises:
        SpecError: no program of some stack meets ``max_saved_bytes``.
    """
    stacks = experts(architecture.stacks, chained=workload.chains_experts)
    return decide_model(workload, (*stacks, *layers(architecture)), rank)[: len(stacks)] if stacks else ()


class _Contest(ABC, Generic[Choice, Candidate]):
    """Candidates for every layer shape of a model, held against each other at any token count."""

    def __init__(self, workload: Workload, sites: Sequence[Site], rank: int, alone: bool = False) -> None:
        self.workload, self.sites, self.rank = workload, sites, rank
        compiled = workload.launch == "compile"
        of_model = (COMPILED_REST_DEVICE, COMPILED_REST_HOST) if compiled else (REST_DEVICE, REST_HOST)
        self.rest = (ALONE_DEVICE, ALONE_HOST) if alone else of_model

    @abstractmethod
    def decide(self, tokens: int) -> list[Choice]:
        """The decision of every layer shape at an asked token count."""

    @abstractmethod
    def decide_below(self, tokens: int) -> list[Choice]:
        """The same below the asked ones."""

    @abstractmethod
    def times(self, candidate: Candidate, setting: Setting) -> Times:
        """What it takes."""

    def frozen_s(self, setting: Setting, host_share: float) -> float:
        """Seconds of the frozen linear."""
        return price_frozen(setting, host_share)

    @abstractmethod
    def best(self, candidates: Sequence[Candidate], setting: Setting, host_share: float) -> Candidate:
        """The best of some; of equal ones always the same."""

    @abstractmethod
    def winners(self, choice: Choice) -> tuple[Candidate, Candidate]:
        """What was chosen, and what runs on 16-bit weights."""

    @property
    def by_time(self) -> bool:
        """Whether time alone decides, so that a little more of it is no matter."""
        return True

    def settings(self, tokens: int) -> list[Setting]:
        """The setting of every layer shape."""
        return [setting_of(self.workload, site, self.rank, tokens) for site in self.sites]

    def rest_of_step(self, settings: Sequence[Setting]) -> Times:
        """What the step does beside these linears."""
        return Times(
            *(
                factor
                * sum(s.count * self.frozen_s(setting, share) for s, setting in zip(self.sites, settings, strict=True))
                for factor, share in zip(self.rest, (DEVICE_BOUND, HOST_BOUND), strict=True)
            )
        )

    def balanced(self, settings: Sequence[Setting], choose: Callable[[int, float], Candidate]) -> float:
        """The host's share of the time under which the step is shortest, of what is chosen for each site under it.

        Under a larger share the host's sum falls and the device's grows. Where the device is the slower one although
        the host counts for nothing, or the host although it alone counts, nothing can be shorter. In between lies a
        step that both bound: a search over shares finds the choices on the convex hull of all sums.
        """
        rest = self.rest_of_step(settings)

        def sums(share: float) -> tuple[float, float]:
            times = [self.times(choose(i, share), setting) for i, setting in enumerate(settings)]
            pairs = list(zip(self.sites, times, strict=True))
            return (
                rest.device_s + sum(site.count * taken.device_s for site, taken in pairs),
                rest.host_s + sum(site.count * taken.host_s for site, taken in pairs),
            )

        device_s, host_s = sums(DEVICE_BOUND)
        if self.workload.launch == "graph" or host_s <= device_s:
            return DEVICE_BOUND
        found, least = DEVICE_BOUND, host_s
        low, share, high = DEVICE_BOUND, HOST_BOUND, HOST_BOUND
        for _ in range(_BISECTIONS):
            device_s, host_s = sums(share)
            if share == HOST_BOUND and host_s > device_s:
                return HOST_BOUND  # also where no choice takes the host less
            if max(device_s, host_s) < least:
                found, least = share, max(device_s, host_s)
            low, high = (share, high) if host_s > device_s else (low, share)
            share = (low + high) / 2
        return found

    def ranges(self) -> list[tuple[Range[Choice], ...]]:
        """Of every layer shape the token counts with one winner as one range.

        Upwards from the first asked count, as what was asked for must be the best; downwards from it, as what lies
        below is a favour that is worth another variant only where it saves much.
        """
        asked = sorted(set(self.workload.tokens))
        above = [self.decide(tokens) for tokens in asked]
        below = [self.decide_below(tokens) for tokens in reversed(BELOW) if tokens < asked[0]]
        return [self._ranges(position, above, below) for position in range(len(self.sites))]

    def _ranges(
        self, position: int, above: Sequence[Sequence[Choice]], below: Sequence[Sequence[Choice]]
    ) -> tuple[Range[Choice], ...]:
        kept = [above[0]]
        for step in above[1:]:
            if not self._serves(kept[-1][position], step[position], _RESOLUTION):
                kept.append(step)
        for step in below:
            if not self._serves(kept[0][position], step[position], _TOLERANCE):
                kept.insert(0, step)
        ends: list[int | None] = [self._crossover(low, high, position) for low, high in itertools.pairwise(kept)]
        return tuple(Range(step[position], last) for step, last in zip(kept, [*ends, None], strict=True))

    def _serves(self, choice: Choice, other: Choice, tolerance: float) -> bool:
        """Whether the winners of the first are hardly slower than those of the other, where that one was made."""

        def time_s(candidate: Candidate) -> float:
            return self.times(candidate, other.setting).weighted_s(other.host_share)

        pairs = list(zip(self.winners(choice), self.winners(other), strict=True))
        if all(mine is theirs for mine, theirs in pairs):
            return True
        return self.by_time and all(time_s(mine) <= time_s(theirs) * (1 + tolerance) for mine, theirs in pairs)

    def _crossover(self, low: Sequence[Choice], high: Sequence[Choice], position: int) -> int:
        """The last token count, from low's on and below high's, at which low's winner is still the best of both."""
        rivals = [list(zip(self.winners(a), self.winners(b), strict=True)) for a, b in zip(low, high, strict=True)]
        pair = next(pair for pair in rivals[position] if pair[0] is not pair[1])
        first, end = low[position].setting.tokens, high[position].setting.tokens
        while end - first > 1:
            middle = (first + end) // 2
            settings = self.settings(middle)
            share = self.balanced(settings, lambda i, share: self.best(rivals[i][0], settings[i], share))  # noqa: B023
            first, end = (middle, end) if self.best(pair, settings[position], share) is pair[0] else (first, middle)
        return first


class _Training(_Contest[Decision, Program]):
    def decide(self, tokens: int) -> list[Decision]:
        settings = self.settings(tokens)
        share = self._share(settings)
        return [decide(self.workload, setting, share, every=False) for setting in settings]

    def decide_below(self, tokens: int) -> list[Decision]:
        settings = self.settings(tokens)
        share = self._share(settings)
        return [self._decision(setting, share) for setting in settings]

    def _decision(self, setting: Setting, share: float) -> Decision:
        """The winners alone, where time alone decides."""
        if not self.by_time:
            return decide(self.workload, setting, share, every=False)
        lossy = self.workload.allow_lossy_merge
        fallback = fastest(self.workload, setting, share, merging=lossy)
        chosen = fallback if lossy or setting.dtype.half else fastest(self.workload, setting, share, merging=True)
        return Decision(
            setting=setting,
            host_share=share,
            candidates=(),
            whole=False,
            programs=0,
            front=frozenset(),
            chosen=chosen,
            fallback=fallback,
            runner_up=None,
            difference=None,
        )

    def _share(self, settings: Sequence[Setting]) -> float:
        def choose(i: int, share: float) -> Program:
            return self._decision(settings[i], share).chosen.program

        return self.balanced(settings, choose)

    def times(self, candidate: Program, setting: Setting) -> Times:
        return program_times(candidate, setting)

    def best(self, candidates: Sequence[Program], setting: Setting, host_share: float) -> Program:
        if self.by_time:
            seconds = [program_times(program, setting).weighted_s(host_share) for program in candidates]
            candidates = [p for p, taken in zip(candidates, seconds, strict=True) if taken == min(seconds)]
            if len(candidates) == 1:
                return candidates[0]
        priced = [Priced(program, price(program, setting, host_share)) for program in candidates]
        return ranked(within(priced, self.workload, setting), self.workload.criterion)[0].program

    def winners(self, choice: Decision) -> tuple[Program, Program]:
        return choice.chosen.program, choice.fallback.program

    @property
    def by_time(self) -> bool:
        return self.workload.criterion == "time" and self.workload.max_saved_bytes is None


class _Inference(_Contest[ForwardDecision, Phase]):
    """No gradient is wanted: nothing is kept, so the criterion and the limit on saved bytes say nothing here."""

    def decide(self, tokens: int) -> list[ForwardDecision]:
        settings = self.settings(tokens)

        def choose(i: int, share: float) -> Phase:
            return decide_forward(self.workload, settings[i], share).chosen

        share = self.balanced(settings, choose)
        return [decide_forward(self.workload, setting, share) for setting in settings]

    def decide_below(self, tokens: int) -> list[ForwardDecision]:
        return self.decide(tokens)

    def times(self, candidate: Phase, setting: Setting) -> Times:
        return phase_times(candidate, setting)

    def frozen_s(self, setting: Setting, host_share: float) -> float:
        return price_frozen(replace(setting, gradients=frozenset()), host_share)

    def best(self, candidates: Sequence[Phase], setting: Setting, host_share: float) -> Phase:
        return min(candidates, key=lambda phase: phase_times(phase, setting).weighted_s(host_share))

    def winners(self, choice: ForwardDecision) -> tuple[Phase, Phase]:
        return choice.chosen, choice.fallback
