"""A training step of a whole model, predicted: its time and its peak memory, frozen, with PEFT, and with our modules.

The linears have their prices (:mod:`.cost`). What stands around them in a decoder's layer is counted operator by
operator, as Transformers' modules run it eagerly (``LlamaRMSNorm``, ``apply_rotary_pos_emb``, ``LlamaMLP``, attention
by a flash kernel): passes over memory, launches, and what autograd keeps. The input's gradient flows through all
layers, and nothing of the base model trains. The optimizer's step is not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..algebra.linear import lone_linear
from ..cost.passes import CAST, Times, price_passes
from ..cost.peft import price_peft
from ..cost.price import price_frozen_forward
from ..cost.setting import DTYPES, Setting
from ..request.architecture import Architecture, Projection, decoder_types
from ..request.decoder import Decoder
from ..request.errors import SpecError
from ..request.groups import Group
from ..request.layers import layers
from ..request.workload import Workload
from ..search.candidates import setting_for
from ..search.choose import Decision
from ..search.grouped import decide_groups_of_step, sums_by_autograd
from ..search.ranges import decide_step
from .gain import Keeps, frozen_times, keeps, kept_bytes

#: What passes with operands that are broadcast or strided reach of the bandwidth, and causal attention's forward and
#: backward in a flash kernel of the products' peak: so chosen that the frozen models of the benchmark come out, with
#: checkpointing and without (tools/results/model_h100.json). With adapters nothing more is fitted.
STRIDED, FLASH_FORWARD, FLASH_BACKWARD = 0.58, 0.68, 0.56
#: What the host needs for an operator of the plain model, over what it needs for one within a module's autograd
#: function: from the frozen model of the benchmark that waits for the host.
PLAIN_HOST = 0.75
#: Products of a flash attention's forward and backward, which makes the scores again.
_PRODUCTS_FORWARD, _PRODUCTS_BACKWARD = 2, 5

FLOAT = 4  # bytes: Transformers norms in float32, and takes the loss in it


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
    """One way to train the model: times of a step's forward and backward, and memory."""

    times: Times
    memory: Memory
    graph: bool = False

    @property
    def time_s(self) -> float:
        """Seconds: device and host work side by side, and under CUDA graphs the device alone."""
        return self.times.device_s if self.graph else max(self.times.device_s, self.times.host_s)


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
class _Linear:
    """A linear's forward and backward, what it keeps, and bytes that its backward needs beside dY and dX."""

    forward: Times
    backward: Times
    keeps: Keeps
    workspace: int = 0


def check_modelled(architecture: Architecture) -> None:
    """Refuse a model of which more would have to be known.

    Raises:
        SpecError: it has experts, its family is not modelled, or its config has no vocabulary.
    """
    if architecture.stacks:
        raise SpecError(
            f"estimate: {architecture.name} has adapters on experts, of which no whole step is estimated yet; "
            "`explain` says what these gain"
        )
    if architecture.decoder is None:
        raise SpecError(
            f"estimate: {architecture.name} is of model type {architecture.model_type}, of which only the linears are "
            f"known; estimated are {', '.join(decoder_types())}"
        )
    if architecture.decoder.vocab is None:
        raise SpecError(f"estimate: the config of {architecture.name} has no vocab_size, a whole number")


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
    if workload.launch == "compile":
        raise SpecError(
            "--launch: compile is not allowed for estimate, which counts steps as they run eagerly; give eager or graph"
        )
    decoder = architecture.decoder
    if decoder is None or not batch.body:
        check_modelled(architecture)
    assert decoder is not None
    sites = layers(architecture)
    decisions = decide_step(workload, sites, rank, batch.tokens)
    adapted = dict(zip(((site.in_features, site.out_features) for site in sites), decisions, strict=True))
    grouped = {group: _of_group(d) for group, d in decide_groups_of_step(workload, architecture, rank, batch.tokens)}
    model = _Model(decoder, architecture, rank, workload, batch)
    return {
        "frozen": model.estimate({}),
        "peft": model.estimate({shape: _by_peft(decision.setting) for shape, decision in adapted.items()}),
        "ours": model.estimate({shape: _ours(decision) for shape, decision in adapted.items()}, grouped),
    }


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
    """All of its linears, without the sums that autograd is spared."""
    one = _ours(decision)
    return replace(one, backward=one.backward + sums_by_autograd(decision.setting) * -1)


@dataclass(frozen=True)
class _Model:
    decoder: Decoder
    architecture: Architecture
    rank: int
    workload: Workload
    batch: Batch

    @property
    def size(self) -> int:
        return DTYPES[self.workload.dtype].bytes

    def setting(self, in_features: int, out_features: int, *, bias: bool = False) -> Setting:
        return setting_for(self.workload, in_features, out_features, self.rank, bias, self.batch.tokens)

    # Time

    def estimate(
        self, adapted: dict[tuple[int, int], _Linear], grouped: Mapping[Group, _Linear] = MappingProxyType({})
    ) -> Estimate:
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
        between = self._between_linears()
        forward += between[0] * self.decoder.layers
        backward += between[1] * self.decoder.layers
        if self.batch.checkpointing:
            backward += forward
        ends = self._ends()
        return Estimate(
            forward + backward + ends,
            self._memory(adapted, grouped),
            graph=self.workload.launch == "graph",
        )

    def _frozen(self, in_features: int, out_features: int, bias: bool = False, *, head: bool = False) -> _Linear:
        setting = self.setting(in_features, out_features, bias=bias)
        if head:  # it is quantized in no model
            setting = replace(setting, derivation=lone_linear())
        forward = Times(*price_frozen_forward(setting))
        whole = frozen_times(setting)
        backward = Times(whole.device_s - forward.device_s, whole.host_s - forward.host_s)
        return _Linear(self._plain(forward), self._plain(backward), Keeps(False, 0))

    def _plain(self, times: Times) -> Times:
        return Times(times.device_s, times.host_s * PLAIN_HOST)

    def _passes(self, straight: Sequence[int], strided: Sequence[int], casts: Sequence[int], launches: int) -> Times:
        """Passes by their bytes, and operators on little or nothing."""
        device = self.setting(1, 1).device
        times = price_passes(straight, device) + price_passes([0] * launches, device)
        return self._plain(
            times + price_passes(strided, device, reach=STRIDED) + price_passes(casts, device, reach=CAST)
        )

    def _norm(self, features: int) -> tuple[Times, Times]:
        """``LlamaRMSNorm`` on all tokens, forward and backward."""
        n, s, f = self.batch.tokens * features, self.size, FLOAT
        cast = [n * (s + f)] if s != f else []
        forward = self._passes(
            [2 * f * n, f * n], [2 * f * n, 2 * s * n], [*cast, *cast], launches=2
        )  # pow, mean; * rsqrt, weight *
        backward = self._passes(
            [3 * f * n, f * n, 2 * f * n, 2 * f * n, 3 * f * n, 3 * f * n],  # to rsqrt; pow's; the sum
            [2 * s * n, 2 * f * n, f * n],  # to weight *, to * rsqrt, mean's
            [*cast, *cast],
            launches=3,
        )
        return forward, backward

    def _between_linears(self) -> tuple[Times, Times]:
        """What a layer does beside its linears, forward and backward."""
        d, tokens, s = self.decoder, self.batch.tokens, self.size
        hidden, inner = tokens * d.hidden, tokens * d.intermediate
        forward, backward = Times(), Times()
        normed = [d.hidden, d.hidden]
        heads = [d.heads * d.head_dim, d.kv_heads * d.head_dim]
        for features in (*normed, *(heads if d.head_norms else ())):
            there, back = self._norm(features)
            forward, backward = forward + there, backward + back
        for features in heads:  # rotary: x * cos + rotate_half(x) * sin
            n = tokens * features * s
            forward += self._passes([], [2 * n, n, 2 * n, 2 * n, 3 * n], [], launches=0)
            halves = [3 * n // 2, 3 * n // 2]
            backward += self._passes([], [2 * n, 2 * n, n, *halves, 3 * n, 3 * n, 2 * n], [], launches=0)
        # silu(gate) * up; both residual sums. In the backward also the sums of what q, k, v and gate, up give.
        forward += self._passes([2 * inner * s, 3 * inner * s, *[3 * hidden * s] * 2], [], [], launches=0)
        readers = sum(projection.input in ("attn_in", "mlp_in") for projection in d.projections)
        sums = [3 * hidden * s] * (readers - 2 + 2)
        backward += self._passes([*[3 * inner * s] * 3, *sums], [], [], launches=0)
        product = self.batch.tokens * self.batch.length * d.heads * d.head_dim  # half of its FLOPs: causal
        peak = self.setting(1, 1).device.flops_per_s[self.workload.dtype]
        one = self._passes([], [], [], launches=1)
        forward += one + Times(_PRODUCTS_FORWARD * product / (FLASH_FORWARD * peak))
        backward += one + Times(_PRODUCTS_BACKWARD * product / (FLASH_BACKWARD * peak))
        return forward, backward

    def _ends(self) -> Times:
        """The last norm, and unless only the body is run embeddings, head and loss; both ways."""
        there, back = self._norm(self.decoder.hidden)
        times = there + back
        if self.batch.body or self.decoder.vocab is None:
            return times
        n = self.batch.tokens * self.decoder.vocab
        cast = [n * (self.size + FLOAT)] if self.size != FLOAT else []
        head = self._frozen(self.decoder.hidden, self.decoder.vocab, head=True)
        # Embeddings; log_softmax, and its backward of the loss's.
        straight = [2 * self.batch.tokens * self.decoder.hidden * self.size]
        straight += [2 * FLOAT * n, FLOAT * n, 3 * FLOAT * n]
        return times + head.forward + head.backward + self._passes(straight, [], [*cast, *cast], launches=5)

    # Memory

    def layer_bytes(self) -> int:
        """What a frozen layer keeps for its backward: of what its modules save each storage once."""
        d, tokens, s = self.decoder, self.batch.tokens, self.size
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        norms = 2 * FLOAT * tokens * (d.hidden + 1)  # the input in float32, and its rsqrt
        if d.head_norms:
            norms += FLOAT * tokens * (q + d.heads + kv + d.kv_heads)
        attention = s * tokens * (2 * q + 2 * kv) + FLOAT * tokens * d.heads  # q, k, v, output; logsumexp
        return norms + attention + 3 * s * tokens * d.intermediate  # gate, silu(gate), up

    def _memory(self, adapted: dict[tuple[int, int], _Linear], grouped: Mapping[Group, _Linear]) -> Memory:
        d, batch, s = self.decoder, self.batch, self.size
        count, hidden = d.layers, batch.tokens * d.hidden
        of_linears = self._kept(adapted, grouped)
        down = self._kept(adapted, {}, "mlp_hidden") // count
        logits = 0 if batch.body or d.vocab is None else batch.tokens * d.vocab
        layer = self.layer_bytes() + of_linears // count
        if batch.checkpointing:
            inputs = (count - 1 if batch.body else count) * s * hidden
            between, within = inputs, inputs + layer
        else:
            between = within = count * layer
        output = s * (hidden + logits)  # the model's, which whoever called it holds
        last = FLOAT * batch.tokens * (d.hidden + 1)
        inner = s * batch.tokens * d.intermediate
        readers = self._read("mlp_hidden") if adapted else []
        workspace = max((adapted[p.in_features, p.out_features].workspace for p in readers), default=0)
        # Of a quantized base the weight is there while it is read.
        made = s * d.intermediate * d.hidden if self.workload.quantized else 0
        moments = [
            # The last norm's backward: five tensors in float32 beside what it has kept.
            (between + last, output + 5 * FLOAT * hidden),
            # The last layer's MLP: dX of the last linear, and the gradients of gate and up before silu's.
            (within - down, output + s * hidden + 3 * inner + made),
            (within, output + s * hidden + inner + max(workspace, made)),
        ]
        if logits:  # the loss's backward: log_softmax, its gradient and that of its input
            moments.append((between + last + FLOAT * logits, output + 2 * FLOAT * logits))
        kept, transient = max(moments, key=sum)
        adapters = self._adapters() if adapted else 0
        return Memory(self._weights(), adapters, kept, transient, between + last + FLOAT * logits)

    def _read(self, name: str) -> list[Projection]:
        return [projection for projection in self.architecture.projections if projection.input == name]

    def _kept(
        self,
        adapted: dict[tuple[int, int], _Linear],
        grouped: Mapping[Group, _Linear],
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

    def _weights(self) -> int:
        d = self.decoder
        norms = (2 * d.layers + 1) * d.hidden + (2 * d.layers * d.head_dim if d.head_norms else 0)
        ends = 0 if d.vocab is None else d.vocab * d.hidden * (1 if d.tied else 2)
        weights = sum(p.count * p.out_features * p.in_features for p in d.projections)
        biases = sum(p.count * p.out_features * p.bias for p in d.projections)
        stored = round(self.workload.stored.bits / 8 * weights) if self.workload.quantized else self.size * weights
        return stored + self.size * (biases + norms + ends)

    def _adapters(self) -> int:
        each = 2 * DTYPES[self.workload.adapter_dtype].bytes  # with its gradient
        return each * self.rank * sum(p.count * (p.in_features + p.out_features) for p in self.architecture.projections)
