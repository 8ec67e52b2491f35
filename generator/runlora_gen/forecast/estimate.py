"""A training step of a whole model, predicted: its time and its peak memory, frozen, with PEFT, and with our modules.

The linears have their prices (:mod:`.cost`). What stands around them in a decoder's layer is counted operator by
operator, as Transformers' modules run it eagerly (``LlamaRMSNorm``, ``apply_rotary_pos_emb``, ``LlamaMLP``, attention
by a flash kernel; experts: :mod:`.mixture`): passes over memory, launches, and what autograd keeps. The gradient of the
input flows through all layers, and nothing of the base model trains. The optimizer's step is not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from ..cost.device import DeviceProfile, has_kernels, turns
from ..cost.measured import tuned_constants
from ..cost.passes import Times
from ..cost.peft import price_peft
from ..cost.price import spares
from ..cost.setting import DTYPES, Setting
from ..kernels.registry import KERNELS
from ..request.architecture import Architecture, Projection, decoder_types
from ..request.decoder import Decoder
from ..request.errors import SpecError
from ..request.experts import Experts, Stack, experts
from ..request.layers import layers
from ..request.mlps import Mlp
from ..request.workload import Workload
from ..search.choose import Decision, decide
from ..search.grouped import Together, decide_groups_of_step
from ..search.ranges import decide_step
from .gain import Keeps, keeps, kept_bytes, spending
from .mixture import Mixture, Part
from .plain import FLOAT, Plain

#: What causal attention's forward and backward in a flash kernel reach of the products' peak: chosen with
#: :data:`~..cost.passes.STRIDED`, so that the frozen models of the benchmark come out.
FLASH_FORWARD, FLASH_BACKWARD = 0.68, 0.56
#: Products of a flash attention's forward and backward, which makes the scores again.
_PRODUCTS_FORWARD, _PRODUCTS_BACKWARD = 2, 5


#: How long the device waits in a step for launches, at most: at first none is on its way, until the host is ahead.
#: Eager steps of 3 and 4 layers on an H200 took 2.2 to 4.9 ms longer than their kernels
#: (tools/results/profile_h200.json, profile_13b_h200.json).
START_S = 2.5e-3


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the step that takes the most.

    Attributes:
        weights: of the base model.
        adapters: lora_A and lora_B of all linears, and their gradients.
        kept: of what the forward keeps for the backward, what is left then.
        transient: everything else, then: intermediates, gradients, the output.
        forward: what the forward keeps, when it has ended.
    """

    weights: int
    adapters: int
    kept: int
    transient: int
    forward: int

    @property
    def peak(self) -> int:
        """Of all together."""
        return self.weights + self.adapters + self.kept + self.transient

    @property
    def step(self) -> int:
        """Without what is there before and after a step as well."""
        return self.kept + self.transient


@dataclass(frozen=True)
class Estimate:
    """One way to train the model: times of a step's forward and backward, and memory.

    ``start_s``: how long the device waits for the step's first launches.
    """

    times: Times
    memory: Memory
    start_s: float = 0.0
    graph: bool = False

    @property
    def time_s(self) -> float:
        """Seconds: device and host work side by side, and under CUDA graphs the device alone."""
        return self.times.device_s if self.graph else max(self.start_s + self.times.device_s, self.times.host_s)


@dataclass(frozen=True)
class Batch:
    """What one step trains on: sequences of the same length.

    Attributes:
        size, length: how many, and of how many tokens.
        checkpointing: whether each layer keeps its input only, and runs its forward again in the backward.
        body: the layers alone are run, on embeddings that are there already, without head and loss.
    """

    size: int
    length: int
    checkpointing: bool = False
    body: bool = False

    @property
    def tokens(self) -> int:
        """In all."""
        return self.size * self.length


@dataclass(frozen=True)
class Ways:
    """How many of a model's layers keep less than all that their backward reads.

    Attributes:
        checkpointed: of the first layers, each of which keeps its input only, and runs its forward again.
        remade: of those after them, whose MLP keeps neither what gate nor what up gave, and makes it again; nor do they
            keep what norms gave.
        renormed: of those after them, which do not keep what norms gave, and make that again.
    """

    checkpointed: int = 0
    remade: int = 0
    renormed: int = 0


@dataclass(frozen=True)
class Less:
    """A part of a layer that keeps less than what was chosen for it.

    Attributes:
        forward, backward: how much longer these take.
        spared: bytes that it does not keep.
        again: of these, what is there when its MLP's gradients are made.
    """

    forward: Times = field(default_factory=Times)
    backward: Times = field(default_factory=Times)
    spared: int = 0
    again: int = 0

    def __add__(self, other: Less) -> Less:
        return Less(
            self.forward + other.forward,
            self.backward + other.backward,
            self.spared + other.spared,
            self.again + other.again,
        )


@dataclass(frozen=True)
class _Linear:
    """A linear's forward and backward, what it keeps, and bytes that its backward needs beside dY and dX.

    Of an MLP: also beside what is kept.
    """

    forward: Times
    backward: Times
    keeps: Keeps
    workspace: int = 0


class Remade(NamedTuple):
    """An MLP that keeps as little as one can: what computes it, and how that differs from what was chosen."""

    decision: Decision
    less: Less


def check_modelled(architecture: Architecture, asked: str = "estimate") -> None:
    """Refuse a model of which more would have to be known; ``asked``: what for, in errors.

    Raises:
        SpecError: its family is not modelled, or not with such layers, or its config has no vocabulary.
    """
    if architecture.decoder is None and architecture.model_type in decoder_types():
        raise SpecError(
            f"{asked}: not all is known of {architecture.name}; give the config of a {architecture.model_type} model "
            "with all sizes, whose layers are all alike"
        )
    if architecture.decoder is None:
        raise SpecError(
            f"{asked}: {architecture.name} is of model type {architecture.model_type}, of which only the linears are "
            f"known; estimated are {', '.join(decoder_types())}"
        )
    if architecture.decoder.vocab is None:
        raise SpecError(f"{asked}: the config of {architecture.name} has no vocab_size, a whole number")


def estimate(architecture: Architecture, rank: int, workload: Workload, batch: Batch) -> dict[str, Estimate]:
    """Predict a step: ``frozen``, ``peft`` and ``ours``.

    Args:
        architecture: the model, with its ``decoder``; its ``projections`` are those that get adapters.
        rank: of the adapters.
        workload: as for the choice; its tokens are the batch's.
        batch: the step.

    Raises:
        SpecError: its family is not modelled, or its config has no vocabulary although head and loss are run; or the
            workload is for torch.compile, which fuses what is counted here, and keeps other tensors.
    """
    return steps_of(architecture, rank, workload, batch).all()


def steps_of(architecture: Architecture, rank: int, workload: Workload, batch: Batch) -> Steps:
    """The same before it is summed up: steps in which layers keep more, or less.

    Raises:
        SpecError: as :func:`estimate`.
    """
    if workload.launch == "compile":
        raise SpecError(
            "--launch: compile is not allowed for estimate, which counts steps as they run eagerly; give eager or graph"
        )
    decoder = architecture.decoder
    if decoder is None or not batch.body:
        check_modelled(architecture)
    assert decoder is not None
    sites, stacks = layers(architecture), experts(architecture.stacks, chained=workload.chains_experts)
    decisions = decide_step(workload, [*sites, *stacks], rank, batch.tokens)
    adapted = dict(zip(((site.in_features, site.out_features) for site in sites), decisions, strict=False))
    grouped = dict(decide_groups_of_step(workload, architecture, rank, batch.tokens))
    model = _Model(decoder, architecture, rank, workload, batch)
    of_experts = _of_experts(model, dict(zip(stacks, decisions[len(sites) :], strict=True)))
    return Steps(model, adapted, grouped, of_experts)


@dataclass(frozen=True)
class Steps:
    """One way or another to train a model: what is decided of it, to be summed up."""

    _model: _Model
    _adapted: Mapping[tuple[int, int], Decision]
    _grouped: Mapping[Together, Decision]
    _experts: tuple[Part | None, Part | None, Part | None]

    @property
    def layers(self) -> int:
        """How many the model has."""
        return self._model.decoder.layers

    def all(self) -> dict[str, Estimate]:
        """``frozen``, ``peft`` and ``ours``, with every layer as the batch says."""
        return {"frozen": self.frozen(), "peft": self.peft(), "ours": self.ours()}

    def frozen(self, ways: Ways | None = None) -> Estimate:
        """Without adapters."""
        return self._model.sum({}, self._experts[0], frozen=True).step(ways)

    def peft(self, ways: Ways | None = None) -> Estimate:
        """In PEFT's order."""
        adapted = {shape: _by_peft(decision.setting) for shape, decision in self._adapted.items()}
        # Its adapters keep what they read, after the linear itself has run.
        last = self._model.last
        stops = last is not None and last.name not in {p.name for p in self._model.architecture.projections}
        return self._model.sum(adapted, self._experts[1], stops=stops).step(ways)

    def ours(self, ways: Ways | None = None) -> Estimate:
        """On generated modules; ``ways``: which layers keep less, where it is not the batch that says so."""
        remade = self.remade.less if ways is not None and ways.remade and self.remade is not None else Less()
        renormed = self.renormed if ways is not None and self.renormed is not None else Less()
        return self._ours.step(ways, remade, renormed)

    @property
    def lean(self) -> bool:
        """Whether norms keep their input as it is."""
        return self._model.workload.norms == "auto" and self._model.size < FLOAT

    @property
    def turned(self) -> bool:
        """Whether rotary embeddings are made in one kernel."""
        return self._model.size < FLOAT and turns(self._model.workload)

    @cached_property
    def _ours(self) -> _Sum:
        adapted = {shape: _ours(decision) for shape, decision in self._adapted.items()}
        grouped = {site: _of_group(decision) for site, decision in self._grouped.items()}
        return self._model.sum(adapted, self._experts[2], grouped, lean=self.lean, turned=self.turned)

    @cached_property
    def remade(self) -> Remade | None:
        """The MLP of every layer where it keeps as little as one can, by the fastest program that does.

        None where MLPs are not computed as a whole.
        """
        whole = [(site, decision) for site, decision in self._grouped.items() if isinstance(site, Mlp)]
        if [site.count for site, _ in whole] != [self.layers]:
            return None
        ((_, chosen),) = whole
        lossless = [each.cost for each in chosen.candidates if not each.program.lossy_in_16_bit]
        bound = replace(
            self._model.workload, criterion="time", max_saved_bytes=min(cost.saved_bytes for cost in lossless)
        )
        least = decide(bound, chosen.setting, chosen.host_share)
        less, more = least.chosen.cost, chosen.chosen.cost
        spared = more.saved_bytes - less.saved_bytes
        again = spared + _made(least) - _made(chosen)
        forward = Times.of(less.forward) + Times.of(more.forward) * -1
        backward = Times.of(less.backward) + Times.of(more.backward) * -1
        return Remade(least, Less(forward, backward, spared, again))

    @cached_property
    def renormed(self) -> Less | None:
        """A layer that does not keep what its norms give, where groups and MLPs alone would.

        Whatever reads it makes it again for itself. None where nothing is spared.
        """
        found = Less()
        row = self._model.batch.tokens * self._model.size
        for name in ("attn_in", "mlp_in") if self.lean else ():
            readers = [projection for projection in self._model.architecture.projections if projection.input == name]
            sites = {site for site in self._grouped for projection in readers if site.has(projection)}
            alone = [p for p in readers if not any(site.has(p) and site.count == self.layers for site in sites)]
            keeping = [site for site in sites if keeps(self._grouped[site]).input]
            if keeping and not alone:
                features = readers[0].in_features
                there, _ = self._model.norm(features, lean=True)
                again = row * features if name == "mlp_in" else 0
                found += Less(Times(), there * len(keeping), row * features, again)
        return found if found.spared else None


def _of_experts(model: _Model, decisions: Mapping[Experts, Decision]) -> tuple[Part | None, Part | None, Part | None]:
    """A layer's experts in the three ways; None where there is a plain MLP in their place."""
    architecture = model.architecture
    if model.decoder.router is None:
        return None, None, None
    mixture = Mixture(model.plain, model.decoder, architecture.known_stacks)
    decided = {
        stack: decision
        for stack in architecture.stacks
        for site, decision in decisions.items()
        if (site.in_features, site.out_features, site.gathers) == (stack.in_features, stack.out_features, stack.gathers)
    }
    return mixture.frozen(), mixture.peft(architecture.stacks), mixture.ours(decided) if decided else mixture.frozen()


def _by_peft(setting: Setting) -> _Linear:
    cost = price_peft(setting)
    # The adapter's part of dX, and in the adapter's dtype.
    workspace = (
        setting.tokens
        * setting.in_features
        * (setting.dtype.bytes + (setting.adapter_dtype.bytes if setting.casts else 0))
    )
    return _Linear(cost.forward, cost.backward, Keeps(cost.keeps_input, cost.own_bytes), workspace)


def _ours(decision: Decision) -> _Linear:
    cost = decision.chosen.cost
    return _Linear(Times.of(cost.forward), Times.of(cost.backward), keeps(decision))


def _of_group(decision: Decision) -> _Linear:
    """All of its linears, without what the model and autograd are spared."""
    one, (there, back) = _ours(decision), spares(decision.setting)
    return replace(one, forward=one.forward + there * -1, backward=one.backward + back * -1, workspace=_made(decision))


def _made(decision: Decision) -> int:
    """Bytes of an MLP's backward: the gradient of down's input, those of gate and up, but where these take the place of
    what is kept, and a kernel's sums in parts, or dX; of other sites nothing is told.
    """
    setting = decision.setting
    wide, size = setting.dims.get("I_down", 0), setting.dtype.bytes
    if not wide:
        return 0
    matrix = setting.tokens * wide * size
    kernel = spending(decision)
    if kernel is None:
        return 3 * matrix
    record = KERNELS[kernel.kernel]
    constants = {**record.tiles, **(tuned_constants(kernel, setting) or {})}
    parts = record.parts_bytes(constants, setting.tokens, wide, setting.rank, size)
    return matrix + max(parts, setting.tokens * setting.in_features * size)


@dataclass(frozen=True)
class _Model:
    decoder: Decoder
    architecture: Architecture
    rank: int
    workload: Workload
    batch: Batch

    @property
    def plain(self) -> Plain:
        return Plain(self.workload, self.rank, self.batch.tokens)

    @property
    def size(self) -> int:
        return self.plain.size

    @property
    def device(self) -> DeviceProfile:
        return self.plain.setting(1, 1).device

    @property
    def _flops_per_s(self) -> float:
        return self.device.flops_per_s[self.workload.dtype]

    @property
    def last(self) -> Projection | None:
        """The last linear of a layer, whose output nothing keeps; None where a norm, or the sum of experts, does."""
        wanted = (p for p in self.decoder.projections if p.input == "mlp_hidden")
        keeps = self.decoder.router is not None or self.decoder.post_norms
        return None if keeps else next(wanted, None)

    def products_s(self, ways: Ways, stops: bool) -> float:
        """Seconds of a step's large products, by their FLOPs: frozen linears or experts, attention, the head."""
        d, tokens = self.decoder, self.batch.tokens
        each = sum(p.count * p.in_features * p.out_features for p in d.projections)
        stacks = self.architecture.known_stacks if d.router is not None else ()
        each += sum(stack.count * stack.top_k * stack.in_features * stack.out_features for stack in stacks)
        head = 0 if self.batch.body or d.vocab is None else d.hidden * d.vocab
        again = ways.checkpointed / d.layers
        last = self.last if stops else None
        computed = each - (0 if last is None else last.count * last.in_features * last.out_features)
        products = each * 2 + computed * again + 2 * head + ways.remade * 2 * d.hidden * d.intermediate
        linears = 2 * tokens * products
        forward, backward = self._attention_s
        return linears / self._flops_per_s + d.layers * (forward * (1 + again) + backward)

    @property
    def _attention_s(self) -> tuple[float, float]:
        """A layer's forward and backward; half of the FLOPs: causal."""
        product = self.batch.tokens * self.batch.length * self.decoder.heads * self.decoder.head_dim
        forward, backward = _PRODUCTS_FORWARD / FLASH_FORWARD, _PRODUCTS_BACKWARD / FLASH_BACKWARD
        return product * forward / self._flops_per_s, product * backward / self._flops_per_s

    def sum(
        self,
        adapted: dict[tuple[int, int], _Linear],
        mixture: Part | None,
        grouped: Mapping[Together, _Linear] = MappingProxyType({}),
        *,
        frozen: bool = False,
        lean: bool = False,
        turned: bool = False,
        stops: bool = True,
    ) -> _Sum:
        """One way: ``mixture`` has its experts of a layer, ``frozen`` says that nothing has an adapter.

        ``lean``: whether norms keep their input as it is; ``turned``: whether rotary embeddings are made in one kernel;
        ``stops``: whether a checkpoint that computes a layer again stops before its last linear.
        """
        forward, backward = self._layers(adapted, mixture, grouped, lean, turned)
        layer, moments = self._layer(adapted, mixture, grouped, lean)
        adapters = 0 if frozen else self._adapters()
        return _Sum(self, forward, backward, self._ends(lean), layer, moments, adapters, lean, stops)

    def skipped(self) -> Times:
        """The last linear and the residual sum of all layers: nothing of them is missing in the backward.

        torch's checkpoints that are not reentrant stop before them, as those of frozen layers and of ours do.
        """
        if self.last is None:
            return Times()
        linear = self._frozen(self.last.in_features, self.last.out_features, self.last.bias)
        one = linear.forward + self.plain.passes([3 * self.batch.tokens * self.decoder.hidden * self.size], [], [])
        return one * self.decoder.layers

    # Time

    def _layers(
        self,
        adapted: dict[tuple[int, int], _Linear],
        mixture: Part | None,
        grouped: Mapping[Together, _Linear],
        lean: bool,
        turned: bool,
    ) -> tuple[Times, Times]:
        """All layers, forward and backward."""
        forward, backward = Times(), Times()
        targets = {projection.name for projection in self.architecture.projections} if adapted else set()
        for group, linears in grouped.items():
            forward += linears.forward * group.count
            backward += linears.backward * group.count
        for projection in self.decoder.projections:
            if any(group.has(projection) for group in grouped):
                continue
            if projection.name in targets:
                linear = adapted[projection.in_features, projection.out_features]
            else:
                linear = self._frozen(projection.in_features, projection.out_features, projection.bias)
            forward += linear.forward * projection.count
            backward += linear.backward * projection.count
        between = self._between_linears(lean, turned)
        if mixture is not None:
            forward += mixture.forward * self.decoder.layers
            backward += mixture.backward * self.decoder.layers
        return forward + between[0] * self.decoder.layers, backward + between[1] * self.decoder.layers

    def _frozen(self, in_features: int, out_features: int, bias: bool = False, *, head: bool = False) -> _Linear:
        return _Linear(*self.plain.linear(in_features, out_features, bias, plain=head), Keeps(False, 0))

    @property
    def fused(self) -> bool:
        """Whether a norm that keeps its input as it is runs in kernels: torch's, or a package's."""
        return has_kernels(self.workload) if self.decoder.wide_norms else self.device.kernels

    def norm(self, features: int, lean: bool) -> tuple[Times, Times]:
        """``LlamaRMSNorm``, or Gemma's, on all tokens, forward and backward; ``lean``: as generated packages run it."""
        n, s, f = self.batch.tokens * features, self.size, FLOAT
        if lean and self.fused:  # an autograd function around each takes the host as long as two operators
            return self.plain.passes([2 * s * n], launches=2), self.plain.passes([3 * s * n], launches=2)
        cast = [n * (s + f)] if s != f else []
        wide = self.decoder.wide_norms
        weighed = 2 * (f if wide else s) * n
        forward = self.plain.passes(
            [2 * f * n, f * n], [2 * f * n, weighed], [*cast, *cast], launches=4 if wide else 2
        )  # pow, mean; * rsqrt, weight *
        backward = self.plain.passes(
            [3 * f * n, f * n, 2 * f * n, 2 * f * n, 3 * f * n, 3 * f * n],  # to rsqrt; pow's; the sum
            [weighed, 2 * f * n, f * n],  # to weight *, to * rsqrt, mean's
            [*cast, *cast],
            launches=3,
        )
        return forward, backward

    def _between_linears(self, lean: bool, turned: bool) -> tuple[Times, Times]:
        """What a layer does beside its linears, forward and backward."""
        d, tokens, s = self.decoder, self.batch.tokens, self.size
        hidden, inner = tokens * d.hidden, tokens * d.intermediate
        forward, backward = Times(), Times()
        normed = [d.hidden] * d.norms
        heads = [d.heads * d.head_dim, d.kv_heads * d.head_dim]
        for features in (*normed, *(heads if d.head_norms else ())):
            there, back = self.norm(features, lean)
            forward, backward = forward + there, backward + back
        if turned:  # by an autograd function, as norms
            once = self.plain.passes([2 * tokens * sum(heads) * s], launches=2)
            forward, backward = forward + once, backward + once
        for features in heads if not turned else ():  # rotary: x * cos + rotate_half(x) * sin
            n = tokens * features * s
            forward += self.plain.passes([], [2 * n, n, 2 * n, 2 * n, 3 * n], [], launches=0)
            halves = [3 * n // 2, 3 * n // 2]
            backward += self.plain.passes([], [2 * n, 2 * n, n, *halves, 3 * n, 3 * n, 2 * n], [], launches=0)
        # silu(gate) * up; both residual sums. In the backward also the sums of what q, k, v and gate, up give.
        gated, gated_back = ([2 * inner * s, 3 * inner * s], [3 * inner * s] * 3) if d.router is None else ([], [])
        forward += self.plain.passes([*gated, *[3 * hidden * s] * 2], [], [], launches=0)
        readers = [p.input for p in d.projections if p.input in ("attn_in", "mlp_in")]
        sums = [3 * hidden * s] * (len(readers) - len(set(readers)) + 2)
        backward += self.plain.passes([*gated_back, *sums], [], [], launches=0)
        one = self.plain.passes([], [], [], launches=1)
        attention = self._attention_s
        return forward + one + Times(attention[0]), backward + one + Times(attention[1])

    def _ends(self, lean: bool) -> Times:
        """The last norm, and unless only the body is run embeddings, head and loss; both ways."""
        there, back = self.norm(self.decoder.hidden, lean)
        times = there + back
        if self.batch.body or self.decoder.vocab is None:
            return times
        n = self.batch.tokens * self.decoder.vocab
        cast = [n * (self.size + FLOAT)] if self.size != FLOAT else []
        head = self._frozen(self.decoder.hidden, self.decoder.vocab, head=True)
        # Embeddings; log_softmax, and its backward of the loss's.
        straight = [2 * self.batch.tokens * self.decoder.hidden * self.size]
        straight += [2 * FLOAT * n, FLOAT * n, 3 * FLOAT * n]
        return times + head.forward + head.backward + self.plain.passes(straight, [], [*cast, *cast], launches=5)

    # Memory

    def layer_bytes(self, lean: bool = False) -> int:
        """What a frozen layer keeps for its backward: of what its modules save each storage once."""
        d, tokens, s = self.decoder, self.batch.tokens, self.size
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        norms = d.norms * self.norm_bytes(d.hidden, lean)
        if d.head_norms:
            norms += self.norm_bytes(q, lean, d.heads) + self.norm_bytes(kv, lean, d.kv_heads)
        attention = s * tokens * (2 * q + 2 * kv) + FLOAT * tokens * d.heads  # q, k, v, output; logsumexp
        mlp = 0 if d.router is not None else 3 * s * tokens * d.intermediate  # gate, silu(gate), up
        return norms + attention + mlp

    def norm_bytes(self, features: int, lean: bool, rows: int = 1) -> int:
        """What a norm keeps, of so many rows a token: its input in float32, or as it is, and of each row its rsqrt."""
        each = self.size * features if lean else FLOAT * features
        weight = FLOAT * features // rows if self.decoder.wide_norms and not lean else 0  # 1 + weight
        return self.batch.tokens * (each + (0 if lean and not self.fused else FLOAT * rows)) + weight

    def norm_made(self, lean: bool) -> int:
        """Bytes of a norm's backward beside what it has kept: five tensors in float32; or three, or its gradient."""
        hidden = self.batch.tokens * self.decoder.hidden
        return 5 * FLOAT * hidden if not lean else self.size * hidden if self.fused else 3 * FLOAT * hidden

    def _layer(
        self,
        adapted: dict[tuple[int, int], _Linear],
        mixture: Part | None,
        grouped: Mapping[Together, _Linear],
        lean: bool,
    ) -> tuple[int, tuple[tuple[int, int], ...]]:
        """What a layer keeps, and the moments of its backward that may take the most, as of :class:`~.mixture.Part`."""
        d, tokens, s = self.decoder, self.batch.tokens, self.size
        inner = s * tokens * d.intermediate
        mlps = [linears for site, linears in grouped.items() if isinstance(site, Mlp)]
        layer = self.layer_bytes(lean) + self._kept(adapted, grouped) // d.layers
        layer -= inner if mlps else 0  # of gate nothing is kept but itself
        if mixture is not None:
            return layer + mixture.kept, mixture.moments
        if mlps:
            return layer, self._normed(lean, (0, max(linears.workspace for linears in mlps)))
        down = self._kept(adapted, {}, "mlp_hidden") // d.layers
        readers = self._read("mlp_hidden") if adapted else []
        workspace = max((adapted[p.in_features, p.out_features].workspace for p in readers), default=0)
        # Of a quantized base the weight is there while it is read.
        made = s * d.intermediate * d.hidden if self.workload.quantized else 0
        # dX of the last linear, and the gradients of gate and up before silu's.
        return layer, self._normed(lean, (down, 3 * inner + made), (0, inner + max(workspace, made)))

    def _normed(self, lean: bool, *moments: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Moments of a layer's backward, after that of the norm of what its MLP gives, where there is one."""
        if not self.decoder.post_norms:
            return moments
        kept = self.norm_bytes(self.decoder.hidden, lean)
        return (0, self.norm_made(lean)), *((kept + gone, beside) for gone, beside in moments)

    def _read(self, name: str) -> list[Projection]:
        return [projection for projection in self.architecture.projections if projection.input == name]

    def _kept(
        self,
        adapted: dict[tuple[int, int], _Linear],
        grouped: Mapping[Together, _Linear],
        name: str | None = None,
    ) -> int:
        """What LoRA keeps in all layers, or that of the linears that read one of a layer's activations."""
        if not adapted:
            return 0
        row = self.batch.tokens * self.size
        projections = self.architecture.projections if name is None else tuple(self._read(name))
        by_shape = {shape: linear.keeps for shape, linear in adapted.items()}
        together = [(group, linears.keeps) for group, linears in grouped.items()]
        # The attention keeps its output anyway.
        return kept_bytes(projections, by_shape, row, there=frozenset({"attn_out"}), grouped=together)

    def weights(self) -> int:
        """Bytes of the base model."""
        d = self.decoder
        norms = (d.norms * d.layers + 1) * d.hidden + (2 * d.layers * d.head_dim if d.head_norms else 0)
        ends = 0 if d.vocab is None else d.vocab * d.hidden * (1 if d.tied else 2)
        weights = sum(p.count * p.out_features * p.in_features for p in d.projections)
        biases = sum(p.count * p.out_features * p.bias for p in d.projections)
        stored = round(self.workload.stored.bits / 8 * weights) if self.workload.quantized else self.size * weights
        # Stacks are parameters, and routers no linears: neither is quantized.
        stacks = self.architecture.known_stacks if d.router is not None else ()
        mixture = sum(stack.count * stack.experts * stack.in_features * stack.out_features for stack in stacks)
        mixture += sum(stack.count * stack.experts * d.hidden for stack in stacks if stack.gathers)
        return stored + self.size * (biases + norms + ends + mixture)

    def _adapters(self) -> int:
        each = 2 * DTYPES[self.workload.adapter_dtype].bytes  # with its gradient
        sites = self.architecture.sites
        counts = (site.count * (site.experts if isinstance(site, Stack) else 1) for site in sites)
        return each * self.rank * sum(n * (p.in_features + p.out_features) for n, p in zip(counts, sites, strict=True))


@dataclass(frozen=True)
class _Sum:
    """One way to train the model, of which layers may keep less.

    Attributes:
        model: it.
        forward, backward: of all layers, which keep all that their backward reads.
        ends: what is before and behind them, both ways.
        layer: bytes that one keeps.
        moments: of a layer's backward: what of that is gone by then, and what is there besides.
        adapters: bytes of them and their gradients.
        lean: whether norms keep their input as it is.
    """

    model: _Model
    forward: Times
    backward: Times
    ends: Times
    layer: int
    moments: tuple[tuple[int, int], ...]
    adapters: int
    lean: bool
    stops: bool

    def step(self, ways: Ways | None = None, remade: Less = Less(), renormed: Less = Less()) -> Estimate:
        """A step; ``ways``: which layers keep less, None for what the batch says; the rest: what they do."""
        count = self.model.decoder.layers
        ways = ways or Ways(checkpointed=count if self.model.batch.checkpointing else 0)
        again = self.forward + (self.model.skipped() * -1 if self.stops else Times())
        backward = self.backward + again * (ways.checkpointed / count)
        times = self.forward + backward + self.ends
        times += (remade.forward + remade.backward) * ways.remade
        times += (renormed.forward + renormed.backward) * (ways.remade + ways.renormed)
        times += Times(self.model.device.throttled_s(self.model.products_s(ways, self.stops), times.device_s))
        return Estimate(
            times,
            self._memory(ways, remade + renormed, renormed),
            start_s=min(START_S, times.host_s) if self.model.device.kernels else 0.0,
            graph=self.model.workload.launch == "graph",
        )

    def _memory(self, ways: Ways, remade: Less, renormed: Less) -> Memory:
        model = self.model
        d, batch, s = model.decoder, model.batch, model.size
        hidden = batch.tokens * d.hidden
        logits = 0 if batch.body or d.vocab is None else batch.tokens * d.vocab
        # Layers of a kind stand one after the other. In the backward of the last of each kind the most is alive: what
        # the layers before it keep, and what is made again; so those that make the most again stand first.
        kept = max(0, ways.checkpointed - 1 if batch.body else ways.checkpointed) * s * hidden
        # What a checkpoint keeps is what a lean norm of the layer does.
        kinds = [(kept + self.layer - (s * hidden if self.lean else 0), 0)] if ways.checkpointed else []
        rest = d.layers - ways.checkpointed - ways.remade - ways.renormed
        for number, less in ((ways.remade, remade), (ways.renormed, renormed), (rest, Less())):
            kept += number * (self.layer - less.spared)
            kinds += [(kept, less.again)] if number else []
        output = s * (hidden + logits)  # the model's, which whoever called it holds
        last = model.norm_bytes(d.hidden, self.lean)
        moments = [(kept + last, output + model.norm_made(self.lean))]
        for within, again in kinds:
            moments += [(within - gone, output + s * hidden + again + more) for gone, more in self.moments]
        if logits:  # the loss's backward: log_softmax, its gradient and that of its input
            moments.append((kept + last + FLOAT * logits, output + 2 * FLOAT * logits))
        alive, transient = max(moments, key=sum)
        return Memory(model.weights(), self.adapters, alive, transient, kept + last + FLOAT * logits)
