"""A live model: the linears and experts of a ``torch.nn.Module``, read by walking it, also on the meta device.

Every parameter with two or more dimensions either belongs to what a generated module can stand in for, or is named with
the reason why not. No model is named here; what Transformers' and PEFT's classes are is asked of them only
where the process has imported them already.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..request.activations import ACTIVATIONS, Activation
from ..request.architecture import LIVE, Architecture, Gated, Projection, decoder_of, family_projections, slug
from ..request.bases import BASES, BY_FORWARD
from ..request.errors import SpecError, shorten
from ..request.experts import UNASKED, Stack
from ..request.groups import ATTENTION, OTHERS
from .gated import MlpTrial, tried_mlp, triple_of
from .mixtures import is_biased, is_gated, is_given_rows, is_mixture, is_transposed, stacks_of
from .trial import Trial, tried

#: In these, queries come from another sequence than keys and values.
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
#: Kernels of these modules take the weights of these children and never call them, so an adapter there is passed over.
TAKEN_WITHOUT_A_CALL = {
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "MultiheadAttention": ("out_proj",),
}
#: Subclasses of ``nn.Linear`` that compute the same in words of their own.
SAME_AS_LINEAR = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
#: What a router, or the module around it, calls the number of experts of a token, and what a config does.
_TOP_K = ("top_k", "num_experts_per_tok")
_TOP_K_OF_CONFIG = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
#: Direct children that classify sequences, as PEFT knows them.
_HEADS = ("score", "classifier")
#: What wrappers put into the names of the modules below them.
_WRAPPED = re.compile(r"\b(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


@dataclass(frozen=True)
class AdapterGroup:
    """The LoRA layers of a model that have one rank, scaling, dropout and dtype.

    Attributes:
        adapter: its name in PEFT, such as ``default``.
        rank: rows of ``lora_A``; of experts, of each.
        alpha: as configured.
        scaling: what the update is multiplied with: ``alpha / rank``, with rsLoRA ``alpha / sqrt(rank)``.
        dropout: the probability, 0 for none.
        dtype: of ``lora_A``.
        bias: whether ``lora_B`` has one.
        variant: the name of PEFT's variant, such as ``DoraLinearVariant``, or None for plain LoRA.
        projections, stacks: what they are on.
    """

    adapter: str
    rank: int
    alpha: float
    scaling: float
    dropout: float
    dtype: torch.dtype
    bias: bool
    variant: str | None
    projections: tuple[Projection, ...] = ()
    stacks: tuple[Stack, ...] = ()


@dataclass(frozen=True)
class LiveModel:
    """What was read of a model.

    Attributes:
        architecture: every linear that a generated module can stand in for, whether it has an adapter or not, and the
            experts that have one; others are offered.
        dtypes: of their weights, the most frequent first; of quantized ones that in which they are computed.
        base: how these are stored, as ``Workload`` calls it.
        bases: all ways in which linears of the model are stored, those of most linears (with adapters) first.
        adapters: the active LoRA layers on them; empty where there are none.
        adapted: by rank, ascending, the architecture with just what has an active adapter of it.
    """

    architecture: Architecture
    dtypes: tuple[torch.dtype, ...]
    adapters: tuple[AdapterGroup, ...]
    adapted: Mapping[int, Architecture]
    base: str = "plain"
    bases: tuple[str, ...] = ("plain",)

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the weights."""
        return self.dtypes[0]

    @property
    def left_out(self) -> Mapping[str, str]:
        """Modules that hold other weights, with ``*`` for the indices of layers, and the reason of each."""
        return self.architecture.left_out


def read_model(model: nn.Module, *, name: str | None = None, base: str | None = None) -> LiveModel:
    """Read the linears and experts of a model.

    Taken is what computes exactly as ``nn.Linear`` or Transformers' ``Conv1D`` with a 2-D floating weight, or as
    ``Linear4bit`` of bitsandbytes: one package is for one kind of base; and stacks of experts that Transformers'
    interface computes, in plain weights. A ``PeftModel`` is seen through: its layers are read as what they wrap. Output
    embeddings and heads that classify sequences are left out as by PEFT's ``all-linear``, unless they have an adapter.

    Args:
        model: any module; only shapes, dtypes and types are looked at.
        name: how the architecture is called; else after the model type or the class.
        base: which linears are taken, by how they are stored; None for what most with adapters, or else most, are.

    Raises:
        SpecError: it has no such linear, and no experts with an adapter.
    """
    root = _unwrapped(model)
    walked = tuple(_walk(root))
    mlps = {x.path: x for x in walked if isinstance(x, _Mlp)}
    found = [x for x in walked if not isinstance(x, _Mlp)]
    offered = [x for x in found if isinstance(x, _Stack) and not x.adapters]
    every = [x for x in found if not isinstance(x, _Other) and x not in offered]
    bases = tuple(b for b, _ in Counter([x.base for x in every if x.adapters] or [x.base for x in every]).most_common())
    base = bases[0] if base is None and bases else base or "plain"
    taken = [x for x in every if x.base == base]
    offered = [stack for stack in offered if stack.base == base]
    left_out = _left_out([_not_taken(x, base) for x in found if x not in taken])
    config = _config(root)
    kind = config.get("model_type")
    model_type = kind if isinstance(kind, str) and kind else slug(type(root).__name__)
    label = name or model_type
    if not taken:
        reasons = "; ".join(f"{where}: {why}" for where, why in list(left_out.items())[:3])
        raise SpecError(
            f"{shorten(label)}: no linear that LoRA can be generated for"
            + (f"; left out: {reasons}" if reasons else "")
        )
    family = family_projections(config, model_type)

    def parts(members: Sequence[_Linear | _Stack]) -> dict[str, Any]:
        linears = [member for member in members if isinstance(member, _Linear)]
        return {"projections": _projections(linears, family) if linears else (), "stacks": _stacks(members)}

    def architecture(members: Sequence[_Linear | _Stack]) -> Architecture:
        held = parts(members) | {"gated": _gated([x for x in members if isinstance(x, _Linear)], mlps)}
        return Architecture(slug(label), model_type, LIVE, left_out=left_out, offered=_stacks(offered), **held)

    groups: dict[AdapterGroup, list[_Linear | _Stack]] = {}
    for member in taken:
        for adapter in member.adapters:
            groups.setdefault(adapter, []).append(member)
    ranks = sorted({adapter.rank for adapter in groups})
    whole = architecture(taken)
    decoder = decoder_of(config, whole)
    return LiveModel(
        architecture=replace(whole, decoder=decoder),
        dtypes=tuple(
            dtype
            for dtype, _ in Counter(
                _computed_in(root, config) if member.dtype.itemsize == 1 else member.dtype for member in taken
            ).most_common()
        ),
        adapters=tuple(replace(adapter, **parts(members)) for adapter, members in groups.items()),
        adapted={
            r: replace(architecture([x for x in taken if any(a.rank == r for a in x.adapters)]), decoder=decoder)
            for r in ranks
        },
        base=base,
        bases=bases,
    )


@dataclass(frozen=True)
class _Linear:
    """One linear that is taken."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    layout: str
    dtype: torch.dtype
    adapters: tuple[AdapterGroup, ...]
    base: str

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def shape(self) -> tuple[str, int, int, bool, str]:
        return self.name, self.in_features, self.out_features, self.bias, self.layout


@dataclass(frozen=True)
class _Stack:
    """One stack of experts that is taken, if it has an adapter or is asked for."""

    path: str  # of the parameter
    stack: Stack
    dtype: torch.dtype
    adapters: tuple[AdapterGroup, ...]
    base: str = "plain"


@dataclass(frozen=True)
class _Mlp:
    """One gated MLP, whatever its linears are."""

    path: str
    projections: tuple[str, str, str]
    activation: str


@dataclass(frozen=True)
class _Other:
    """A module with weights that is not taken."""

    path: str
    reason: str


# The walk


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, below torch.compile, DDP and PEFT."""
    while True:
        wrapper: Any = model
        inner: nn.Module | None = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = wrapper.module
        peft_model = _known("peft.peft_model", "PeftModel")
        if inner is None and peft_model is not None and isinstance(model, peft_model):
            inner = wrapper.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def _known(module: str, name: str) -> Any:
    """A class of a package, or None if this process has not imported it: then nothing here is one."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _walk(root: nn.Module) -> Iterator[_Linear | _Stack | _Mlp | _Other]:
    """Every linear and stack that is taken, every gated MLP, and every other module with weights.

    Each once, in the model's order.
    """
    conv1d = _known("transformers.pytorch_utils", "Conv1D")
    tuner_layer = _known("peft.tuners.tuners_utils", "BaseTunerLayer")
    trained_copy = _known("peft.utils.other", "AuxiliaryTrainingWrapper")
    skipped = _heads(root)
    embedded = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()

    def visit(
        path: str, found: nn.Module, parent: nn.Module | None, head: str
    ) -> Iterator[_Linear | _Stack | _Mlp | _Other]:
        module: Any = found
        tuner = None
        if tuner_layer is not None and isinstance(module, tuner_layer):
            tuner = module
            module = module.get_base_layer()
        full = ""
        if trained_copy is not None and isinstance(module, trained_copy):
            module = module.original_module
            full = "trained in full (modules_to_save)"
        if id(module) in seen:
            return
        seen.add(id(module))
        head = skipped.get(id(tuner or module)) or skipped.get(id(module)) or head or full
        weights = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(isinstance(weight, nn.UninitializedParameter) for weight in weights):
            yield _Other(path, "not initialised (lazy)")
            return
        layout = _layout(module, conv1d)
        if layout:
            reason = _reason(module, parent, path, tuner, head, embedded)
            yield _Other(path, reason) if reason else _linear(path, module, layout, tuner)
            return  # the children of a linear are its parametrizations
        if _is_other_linear(module, tuner):
            yield _Other(path, _other_linear(module))
            return
        if is_mixture(module):
            wrappers = _param_wrappers(tuner)
            if reason := _reason_of_experts(module, wrappers, head):
                yield _Other(path, reason)
                return
            for name in stacks_of(module):
                yield _stack(f"{path}.{name}".removeprefix("."), module, name, parent, wrappers.get(name))
        elif any(weight.dim() > 1 for weight in weights):
            yield _Other(path, _what(module, weights))
        names = triple_of(module)
        if names is not None and (activation := _activation_of_mlp(module)):
            yield _Mlp(path, names, activation)
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{path}.{name}" if path else name, child, module, head)

    for item in visit("", root, None, ""):
        path = _WRAPPED.sub("", f"{item.path}.")[:-1] or type(root).__name__.lower()
        yield replace(item, path=path)


def _heads(root: nn.Module) -> dict[int, str]:
    """What turns hidden states into words or classes, by identity."""
    heads: dict[int, str] = {}
    for name in _HEADS:
        if isinstance(root._modules.get(name), nn.Module):
            heads[id(root._modules[name])] = "a head that classifies sequences"
    pretrained = _known("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is not None and isinstance(root, pretrained):
        model: Any = root
        output = model.get_output_embeddings()
        if isinstance(output, nn.Module):
            heads[id(output)] = "output embedding"
    return heads


def _layout(module: nn.Module, conv1d: type | None) -> str | None:
    """How the weight lies if the module's own class computes as ``nn.Linear`` or ``Conv1D``, else None."""
    kind = type(module)
    same = kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__qualname__}" in SAME_AS_LINEAR
    if isinstance(module, nn.Linear) and (same or _kind_of_codes(module)):
        return "out_in"
    if conv1d is not None and isinstance(module, conv1d) and kind.forward is vars(conv1d)["forward"]:
        return "in_out"
    return None


def _stored(module: Any) -> str:
    """How a linear that is taken stores its weight."""
    kind = _kind_of_codes(module)
    return str(module.weight.quant_type) if kind == "4 bits" else kind or "plain"


def _otherwise(base: str) -> str:
    """Why a linear is left out that is stored in another way than those that are taken."""
    return "not quantized" if base == "plain" else f"quantized to {BASES[base].title}"


def _kind_of_codes(module: Any) -> str:
    """How a linear whose class is one of those of quantized bases stores its weight, or nothing."""
    forward = type(module).forward
    name = f"{forward.__module__}.{getattr(forward, '__qualname__', '')}"
    kind = BY_FORWARD[name].kind if name in BY_FORWARD else ""
    return "fp8" if kind == "fp8-block" and module.block_size is None else kind


def _is_uncoded(module: Any, kind: str) -> bool:
    """Whether it has no codes yet: bitsandbytes makes them when a linear is moved to its device."""
    weight = module.weight
    if weight.device.type == "meta":
        return False
    return _quant_state(module) is None if kind == "4 bits" else weight.dtype.itemsize > 1


def _quant_state(module: Any) -> Any:
    """What bitsandbytes holds beside the codes of a linear: its parameter has it, and mostly the module as well."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _reason(
    module: nn.Module, parent: nn.Module | None, path: str, tuner: nn.Module | None, head: str, embedded: set[int]
) -> str | None:
    """Why a linear is left out, or None."""
    name = path.rpartition(".")[2]
    weight = module.weight
    if getattr(module, "parametrizations", None):
        return "its weight is parametrized"
    assert isinstance(weight, torch.Tensor)
    coded = _kind_of_codes(module)
    if coded and _is_uncoded(module, coded):
        kind, dtype = type(module).__name__, _dtype_name(weight.dtype)
        if coded in ("4 bits", "int8") and not getattr(getattr(module, "state", None), "has_fp16_weights", False):
            return f"quantized ({kind}), but not yet: move it to its device first"
        return f"{kind} with a weight of {dtype}"
    if not coded and (not weight.is_floating_point() or weight.dtype.itemsize == 1 or _is_packed(weight)):
        return f"quantized ({type(weight).__name__} of {_dtype_name(weight.dtype)})"
    if weight.dim() != 2:
        return f"a weight of {weight.dim()} dimensions"
    if 0 in weight.shape:
        return "empty"
    # accelerate's hooks put a forward of their own before the module's, which they call.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward was replaced"
    taken = TAKEN_WITHOUT_A_CALL.get(type(parent).__name__, ())
    if name in taken:
        return f"{type(parent).__name__} takes its weight without calling it"
    if tuner is not None:
        lora = _known("peft.tuners.lora", "LoraLayer")
        if lora is None or not isinstance(tuner, lora):
            return f"has an adapter of another kind ({type(tuner).__module__}.{type(tuner).__name__})"
        if type(tuner).__name__ == "ParamWrapper":
            return "has an adapter on a parameter (target_parameters)"
        return None  # whatever it is: it was asked for
    if head:
        return head
    if name == "lm_head" or id(weight) in embedded:
        return "output embedding"
    return None


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether a tensor stands for another one that it computes, as torchao's; a DTensor only says where it is."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__name__ != "DTensor"


def _is_other_linear(module: nn.Module, tuner: nn.Module | None) -> bool:
    """Whether a module is a linear map of some other kind: a subclass, a quantized layer, an adapter's."""
    if isinstance(module, nn.Linear | nn.Bilinear):
        return True
    wide = all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features"))
    held = {**module._parameters, **module._buffers}
    return wide and any(isinstance(tensor, torch.Tensor) and tensor.dim() > 1 for tensor in held.values())


def _other_linear(module: nn.Module) -> str:
    kind = type(module).__name__
    held = {**module._parameters, **module._buffers}
    tensors = [t for t in held.values() if isinstance(t, torch.Tensor) and t.dim() > 1]
    if any(not t.is_floating_point() or t.dtype.itemsize == 1 for t in tensors):
        return f"quantized ({kind})"
    if any(tensor.dim() > 2 for tensor in tensors):
        return _what(module, tensors)
    if "lora_A" in module._parameters or "lora_A" in module._modules:
        return f"has an adapter already ({kind})"
    return f"a linear with a forward of its own ({kind})"


def _what(module: nn.Module, weights: Sequence[torch.Tensor]) -> str:
    """What a module with weights is that is no linear."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    most = max(weight.dim() for weight in weights)
    kind = type(module).__name__
    if any(not w.is_floating_point() or w.dtype.itemsize == 1 for w in weights if w.dim() > 1):
        return f"quantized ({kind})"
    return f"{most}-D weights of {kind}" if most > 2 else f"2-D parameters of {kind}, which is no linear"


def _param_wrappers(tuner: Any) -> dict[str, Any]:
    """PEFT's wrappers of a module's parameters, which lie around each other, by the parameter of each."""
    wrappers = {}
    while hasattr(tuner, "parameter_name"):
        wrappers[tuner.parameter_name] = tuner
        tuner = tuner.base_layer
    return wrappers


def _reason_of_experts(module: Any, adapted: Mapping[str, Any], head: str) -> str | None:
    """Why a module of experts is left out, or None."""
    names = stacks_of(module)
    if getattr(module, "parametrizations", None):
        return "its weights are parametrized"
    held = {name: weight for name, weight in module._parameters.items() if weight is not None and weight.dim() > 1}
    if any(not w.is_floating_point() or w.dtype.itemsize == 1 or _is_packed(w) for w in held.values()):
        return f"quantized ({type(module).__name__})"
    if any(name not in held or held[name].dim() != 3 for name in names):
        return "experts without weights of 3 dimensions"
    biases = [f"{name}_bias" for name in names if is_biased(module)]
    if set(held) != {*names, *biases}:
        return f"experts with other weights than {', '.join((*names, *biases))}"
    if any(0 in weight.shape for weight in held.values()):
        return "empty"
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward was replaced"
    if getattr(module, "has_post_expert_norm", False):  # older ones have none
        return "a norm after each expert"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are on several devices"
    for name in adapted:
        if name not in names:
            return f"has an adapter on {name} (target_parameters)"
    return head or None


def _stack(path: str, module: Any, name: str, parent: nn.Module | None, tuner: nn.Module | None) -> _Stack:
    weight = module._parameters[name]
    count, *sides = weight.shape
    in_features, out_features = sides if is_transposed(module) else reversed(sides)
    stack = Stack(
        name=name,
        experts=count,
        in_features=in_features,
        out_features=out_features,
        gathers=name != "down_proj",
        # Experts that are given rows compute all tokens each, whatever the router makes of them.
        top_k=count if is_given_rows(module) else _top_k(parent, module.config),
        bias=is_biased(module),
        count=1,
        layout="in_out" if is_transposed(module) else "out_in",
        activation=_activation(module),
    )
    return _Stack(path, stack, weight.dtype, () if tuner is None else tuple(_adapters(tuner)))


def _activation(module: Any) -> str:
    """What a module of experts does between its projections: which of those that have a row."""
    trial = tried(module)
    if trial is None:
        return ""
    alike = (name for name, row in ACTIVATIONS.items() if row.gated == is_gated(module) and _does(row, trial))
    return next(alike, "")


def _does(activation: Activation, trial: Trial) -> bool:
    """Whether an activation makes of a trial's rows what was made of them."""
    u = trial.rows
    gate, up = (u, u) if not activation.gated else (u[:, 0::2], u[:, 1::2]) if activation.interleaved else u.chunk(2, 1)
    (made,) = _run(activation.forward("torch"), ("x",), gate=gate, up=up)
    results = ("dgate", "dup")[: activation.widths]
    parts = _run(activation.backward("torch"), results, gate=gate, up=up, dx=trial.gradient)
    back = torch.stack(parts, 2).flatten(1) if activation.interleaved else torch.cat(parts, 1)
    return trial.is_same(made, back)


def _activation_of_mlp(module: nn.Module) -> str:
    """What a gated MLP does between its linears, if it has a row and the module does nothing else; else nothing."""
    trial = tried_mlp(module)
    if trial is None:
        return ""
    return next((name for name, row in ACTIVATIONS.items() if row.of_mlps and _makes(row, trial)), "")


def _makes(activation: Activation, trial: MlpTrial) -> bool:
    """Whether an activation between its linears makes of a trial's rows what was made of them."""

    def activated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _run(activation.forward("torch"), ("x",), gate=gate, up=up)[0]

    def activate_backward(dx: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
        return _run(activation.backward("torch"), ("dgate", "dup"), gate=gate, up=up, dx=dx)

    return trial.is_made_by(activated, activate_backward)


def _run(lines: Sequence[str], results: Sequence[str], **given: torch.Tensor) -> list[torch.Tensor]:
    """What assignments of an activation make of these."""
    exec("\n".join(lines), {"torch": torch}, given)
    return [given[name] for name in results]


def _top_k(parent: nn.Module | None, config: Any) -> int:
    """How many experts a token goes to: as the module around them says, its router, or their config."""
    places = [] if parent is None else [parent, *parent.children()]
    said = [getattr(place, name, None) for place in places for name in _TOP_K]
    said += [getattr(config, name, None) for name in _TOP_K_OF_CONFIG]
    return next((count for count in said if type(count) is int and count > 0), 1)


def _linear(path: str, module: nn.Module, layout: str, tuner: nn.Module | None) -> _Linear:
    weight: Any = module.weight
    adapters = () if tuner is None else tuple(_adapters(tuner))
    kind, linear = _kind_of_codes(module), cast(Any, module)
    if kind:
        state = _quant_state(module) if kind == "4 bits" else None
        own = getattr(linear, "compute_dtype", None)  # of 4 bits
        coded = torch.get_default_dtype() if kind == "4 bits" else torch.int8
        dtype = own or (coded if state is None else state.dtype)
        sizes = (linear.in_features, linear.out_features)
    else:
        rows, columns = weight.shape
        dtype, sizes = weight.dtype, (columns, rows) if layout == "out_in" else (rows, columns)
    return _Linear(path, *sizes, module.bias is not None, layout, dtype, adapters, _stored(module))


def _adapters(tuner: nn.Module) -> Iterator[AdapterGroup]:
    """The active adapters of one of PEFT's LoRA layers; an adapter is active everywhere, but not there everywhere."""
    layer: Any = tuner
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        dropout = layer.lora_dropout[name]
        yield AdapterGroup(
            adapter=name,
            rank=layer.lora_A[name].weight.shape[0] // getattr(layer, "num_experts", 1),
            alpha=float(layer.lora_alpha[name]),
            scaling=float(layer.scaling[name]),
            dropout=float(getattr(dropout, "p", 0.0)),
            dtype=layer.lora_A[name].weight.dtype,
            bias=layer.lora_B[name].bias is not None,
            variant=None if variant is None else type(variant).__name__,
        )


# From linears to projections, and from those of each layer to stacks


def _stacks(members: Sequence[_Linear | _Stack]) -> tuple[Stack, ...]:
    """The stacks among these, in order of their first; what layers have alike is one."""
    alike: Counter[Stack] = Counter()
    for member in members:
        if isinstance(member, _Stack):
            module = _pattern(member.path.rpartition(".")[0]).rpartition("*")[2].removeprefix(".")
            alike[replace(member.stack, module=module)] += 1
    return tuple(replace(stack, count=count) for stack, count in alike.items())


def _gated(linears: Sequence[_Linear], mlps: Mapping[str, _Mlp]) -> tuple[Gated, ...]:
    """What gated MLPs are made up of these linears alone, in order of their first.

    Of linears with the same names and sizes all must be of MLPs that do the same: an architecture knows no others.
    """
    parents: dict[str, dict[str, _Linear]] = {}
    for linear in linears:
        parents.setdefault(linear.parent, {})[linear.name] = linear
    alike: dict[Gated, list[_Linear]] = {}
    for parent, held in parents.items():
        mlp = mlps.get(parent)
        if mlp is not None and all(name in held for name in mlp.projections):
            gate, up, down = members = [held[name] for name in mlp.projections]
            sizes = gate.in_features, down.in_features, down.out_features
            wide = gate.in_features, down.in_features * (2 if gate is up else 1)
            if all((linear.in_features, linear.out_features) == wide for linear in (gate, up)):
                alike.setdefault(Gated(mlp.projections, mlp.activation, sizes), []).extend(members)
    of_name = Counter((linear.name, linear.in_features, linear.out_features) for linear in linears)
    return tuple(
        gated
        for gated, members in alike.items()
        if all(
            of_name[member.name, member.in_features, member.out_features] * 3 == len(members) for member in members[:3]
        )
    )


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _projections(linears: Sequence[_Linear], family: Sequence[Projection]) -> tuple[Projection, ...]:
    """The projections that linears make up, in order of their first.

    Where a family's data file describes just these, its projections are taken, with its words for what they read.
    """
    parents: dict[str, list[_Linear]] = {}
    for linear in linears:
        parents.setdefault(linear.parent, []).append(linear)
    # Layers of one kind may differ in their shapes, and then in what they read, too.
    alike: dict[tuple[str, tuple[tuple[str, int, int, bool, str], ...]], int] = {}
    for members in parents.values():
        for group in _groups(members):
            signature = (_pattern(group[0].path), tuple(linear.shape for linear in group))
            alike[signature] = alike.get(signature, 0) + 1
    labels: Counter[str] = Counter()
    projections = []
    for (pattern, shapes), count in alike.items():
        labels[pattern] += 1
        label = pattern if labels[pattern] == 1 else f"{pattern} ({labels[pattern]})"
        for name, in_features, out_features, bias, layout in shapes:
            projections.append(Projection(name, in_features, out_features, bias, count, label, layout))
    described = _described(projections, family)
    return described or tuple(projections)


def _groups(members: Sequence[_Linear]) -> Iterator[list[_Linear]]:
    """The linears of one parent, those that read one activation together."""
    left = {linear.name: linear for linear in members}
    rows = [names[1:] if _CROSS.search(members[0].parent) else names for names in ATTENTION]
    for linear in members:
        for names in (*rows, *OTHERS):
            group = [left[x] for x in names if x in left and left[x].in_features == linear.in_features]
            if linear in group and len(group) > 1:
                break
        else:
            group = [linear] if linear.name in left else []
        for taken in group:
            del left[taken.name]
        if group:
            yield group


def _described(projections: Sequence[Projection], family: Sequence[Projection]) -> tuple[Projection, ...] | None:
    def key(p: Projection) -> tuple[str, int, int, bool, int, str]:
        return p.name, p.in_features, p.out_features, p.bias, p.count, p.layout

    wanted = Counter(map(key, projections))
    taken = []
    for projection in family:
        if wanted[key(projection)]:
            wanted[key(projection)] -= 1
            taken.append(projection)
    return None if wanted.total() else tuple(taken)


def _not_taken(item: _Linear | _Stack | _Other, base: str) -> _Other:
    """With the reason why not."""
    if isinstance(item, _Other):
        return item
    return _Other(item.path, UNASKED if item.base == base else _otherwise(item.base))


def _left_out(others: Sequence[_Other]) -> dict[str, str]:
    """Reasons by name, with ``*`` for numbers where all of that name have one reason."""
    reasons: dict[str, set[str]] = {}
    for other in others:
        reasons.setdefault(_pattern(other.path), set()).add(other.reason)
    result = {}
    for other in others:
        pattern = _pattern(other.path)
        result[pattern if len(reasons[pattern]) == 1 else other.path] = other.reason
    return result


def _config(root: nn.Module) -> Mapping[str, object]:
    """The model's Transformers config as a dict; empty if it has none."""
    config: Any = getattr(root, "config", None)
    pretrained = _known("transformers.configuration_utils", "PreTrainedConfig")
    return config.to_dict() if pretrained is not None and isinstance(config, pretrained) else {}


def _computed_in(root: nn.Module, config: Mapping[str, object]) -> torch.dtype:
    """The dtype of activations where the linears do not say it: as the config has it, else that of other weights."""
    said = getattr(torch, str(config.get("dtype")), None)
    if isinstance(said, torch.dtype) and said.is_floating_point and said.itemsize > 1:
        return said
    others = (p.dtype for name, p in root.named_parameters() if "lora_" not in name and "scale" not in name)
    return next(
        (dtype for dtype in others if dtype.is_floating_point and dtype.itemsize > 1), torch.get_default_dtype()
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
