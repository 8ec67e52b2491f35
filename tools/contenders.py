"""What steps of whole models are timed with: PEFT in its ways, rivals, and generated modules.

A contender is a line of ``CONTENDERS``: a title, and a function that puts adapters into a frozen model of Transformers.
The tools that measure whole models share this file.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import runlora_gen
import torch
import torch.nn.functional as F
from runlora_gen.emit.style import Style
from runlora_gen.generation import profile_of
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.modules import import_file, render_module
from runlora_gen.request.layers import Layer
from runlora_gen.request.workload import Workload
from runlora_gen.search import grouped
from runlora_gen.search.ranges import decide_model
from torch import Tensor, nn

FROZEN = "frozen"


class Unavailable(Exception):
    """A contender is not on this machine."""


@dataclass(frozen=True)
class Setup:
    """What adapters are made for.

    Attributes:
        rank: of all of them; lora_alpha is the same.
        tokens: of a step, for modules that are generated for just this.
        folder: an empty one, for generated packages.
        profile: the device profile that the choice is made for.
        axolotl: the folder of axolotl's sources (with ``kernels`` in it), or None.
        workload: further fields of ``Workload`` for ``accelerate`` and ``inject_lora``.
        targets: what gets adapters, as PEFT's ``LoraConfig`` takes it.
    """

    rank: int
    tokens: int
    folder: Path
    profile: str
    axolotl: Path | None = None
    workload: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})


#: Puts adapters into a frozen model; returns what is called, and what is to be said of it in the results.
Build = Callable[[nn.Module, Setup], tuple[nn.Module, dict[str, Any]]]


@dataclass(frozen=True)
class Contender:
    """A way to train adapters.

    Attributes:
        title: what it is called in tables and results.
        build: makes it of a frozen model.
        autocast: whether its forward runs under bf16 autocast.
        exact: whether it computes what PEFT without dropout does.
    """

    title: str
    build: Build
    autocast: bool = False
    exact: bool = True


@contextlib.contextmanager
def unformatted() -> Iterator[None]:
    """Packages as they are rendered: they run the same, and a machine that only runs them needs no black."""
    with mock.patch.object(Style, "format", lambda _, source: source), mock.patch.object(Style, "key", "as rendered"):
        yield


# PEFT


def peft_model(
    model: nn.Module, rank: int, *, wide: bool, dropout: float = 0.0, targets: Mapping[str, Any] | None = None
) -> nn.Module:
    """LoRA in all linears, or in what ``targets`` says.

    Args:
        model: frozen.
        rank: of the adapters, and their lora_alpha.
        wide: fp32 adapters, PEFT's default; else the base's dtype.
        dropout: of PEFT's lora_dropout.
    """
    peft: Any = importlib.import_module("peft")
    wanted = {"target_modules": "all-linear"} if targets is None else targets
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, **wanted)
    wrapped: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    return wrapped


def _peft(**options: Any) -> Build:
    return lambda model, setup: (peft_model(model, setup.rank, targets=setup.targets, **options), {})


# Generated


def accelerated(model: nn.Module, setup: Setup, name: str) -> dict[str, Any]:
    """Run a PEFT model on generated modules; what was chosen for each shape of linear.

    Raises:
        ValueError: one of its layers would be left to PEFT.
    """
    with unformatted():
        report = runlora_gen.accelerate(model, setup.folder / name, strict=True, device=setup.profile, **setup.workload)
    return _said(report, setup.tokens)


def _said(report: Any, tokens: int) -> dict[str, Any]:
    """Of a report: how many layers, and the program that each shape runs at a count of tokens."""
    chosen = {}
    for folder in report.folders:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        for site in (*manifest["layers"], *manifest["groups"], *manifest["mlps"], *manifest["experts"]):
            ranges = (part for part in site["ranges"] if part["last_tokens"] is None or tokens <= part["last_tokens"])
            chosen[site["module"]] = next(ranges)["chosen"]
    return {"layers": len(report.accelerated), "chosen": chosen, "rotary": report.rotary}


def _ours(name: str, *, wide: bool = True, dropout: float = 0.0, **workload: Any) -> Build:
    def build(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
        wrapped = peft_model(model, setup.rank, wide=wide, dropout=dropout, targets=setup.targets)
        return wrapped, accelerated(wrapped, replace(setup, workload={**setup.workload, **workload}), name)

    return build


def _apart(name: str, **workload: Any) -> Build:
    """The same with each projection of experts by itself, and the model's own activation between them."""
    build = _ours(name, **workload)

    def patched(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
        with mock.patch.object(Workload, "chains_experts", False):
            return build(model, setup)

    return patched


def _one_by_one(name: str, **workload: Any) -> Build:
    """The same without MLPs as a whole: gate and up as a group, and the model's own activation."""
    build = _ours(name, **workload)

    def patched(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
        with mock.patch.object(grouped, "mlps", lambda architecture: ()):
            return build(model, setup)

    return patched


def _injected(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
    with unformatted():
        report = runlora_gen.inject_lora(
            model, setup.rank, setup.rank, output=setup.folder / "inject", device=setup.profile, **setup.workload
        )
    return model, _said(report, setup.tokens)


def _swapped(name: str, **fields: Any) -> Build:
    """Lone modules, made for just this count of tokens, in place of the linears."""

    def build(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
        workload = Workload(tokens=(setup.tokens,), device=setup.profile, **fields)
        modules, chosen = {}, {}
        layers = sites(model)
        for layer, choice in zip(layers, decide_model(workload, layers, setup.rank), strict=True):
            modules[layer.in_features, layer.out_features] = render_module(
                choice, setup.rank, workload, setup.folder / f"{setup.folder.name}_{name}_{layer.name}"
            )
            chosen[layer.name] = choice.ranges[-1].decision.chosen.program.id
        swap(model, modules, setup.rank)
        return model, {"chosen": chosen}

    return build


def from_folder(folder: Path) -> Build:
    """Modules that were generated before, by another version say."""

    def build(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
        files = sorted(folder.glob("linear_*.py"))
        loaded = [import_file(file, f"rival_{folder.name}_{file.stem}") for file in files]
        modules = {(module.IN_FEATURES, module.OUT_FEATURES): module for module in loaded}
        missing = [site.name for site in sites(model) if (site.in_features, site.out_features) not in modules]
        if missing:
            raise Unavailable(f"{folder} has no modules for {', '.join(missing)}")
        swap(model, modules, setup.rank)
        return model, {}

    return build


def sites(model: nn.Module) -> tuple[Layer, ...]:
    """The linears of a model by shape."""
    counts: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            size = module.in_features, module.out_features
            counts[size] = counts.get(size, 0) + 1
    return tuple(Layer(*size, False, count, ("linear",)) for size, count in counts.items())


def swap(model: nn.Module, modules: Mapping[tuple[int, int], Any], rank: int) -> None:
    """Put generated layers in place of all linears."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = modules[linear.in_features, linear.out_features].LoRALinear.from_linear(linear, rank, rank)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


# axolotl's kernels for Llama's attention and MLP: https://github.com/axolotl-ai-cloud/axolotl, src/axolotl/kernels


def causal(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """One attention for all contenders: Transformers picks another kernel where it builds a mask."""
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None


def _axolotl(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
    kernels = axolotl_kernels(setup.axolotl)
    llama: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    wrapped = peft_model(model, setup.rank, wide=False)

    def attention(
        self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Of Transformers, with the two calls that axolotl puts in, and without a cache."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projected.view(shape).transpose(1, 2) for projected in kernels.apply_lora_qkv(self, hidden_states)
        )
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        output, _weights = causal(self, query, key, value, scaling=self.scaling)
        return kernels.apply_lora_o(self, output.reshape(*hidden_states.shape[:-1], -1).contiguous()), None

    for module in model.modules():
        if isinstance(module, llama.LlamaAttention):
            module.forward = types.MethodType(attention, module)
        if isinstance(module, llama.LlamaMLP):
            module.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, module)
    return wrapped, {}


def axolotl_kernels(folder: Path | None) -> Any:
    """axolotl's ``kernels.lora`` without the rest of axolotl, and without bitsandbytes if that is not there.

    Raises:
        Unavailable: the folder is not there.
    """
    if folder is None or not (folder / "kernels" / "lora.py").exists():
        raise Unavailable(f"no kernels/lora.py in {folder}: give --axolotl the folder src/axolotl of its sources")
    if "axolotl.kernels.lora" not in sys.modules:
        # What its quantized paths would call; gone again afterwards, as PEFT would take it for the real one.
        library = mock.MagicMock()
        functional = _module(
            "bitsandbytes.functional", QuantState=type("QuantState", (), {}), get_ptr=None, lib=library
        )
        stubs = {
            "bitsandbytes": _module("bitsandbytes", functional=functional, __version__="0.46.0"),
            "bitsandbytes.functional": functional,
        }
        sys.modules |= {
            "axolotl": _module("axolotl", __path__=[str(folder)]),
            "axolotl.kernels": _module("axolotl.kernels", __path__=[str(folder / "kernels")]),  # its own imports more
            "axolotl.utils": _module("axolotl.utils", __path__=[]),
            "axolotl.utils.logging": _module(
                "axolotl.utils.logging", get_logger=lambda name, *_: logging.getLogger(name)
            ),
        }
        sys.modules |= stubs
        try:
            importlib.import_module("axolotl.kernels.lora")
        finally:
            for name in stubs:
                del sys.modules[name]
    return sys.modules["axolotl.kernels.lora"]


def _axolotl_experts(model: nn.Module, setup: Setup) -> tuple[nn.Module, dict[str, Any]]:
    """Its experts, as its implementation for Transformers computes them, on PEFT's wrappers."""
    parts = axolotl_scattermoe(setup.axolotl)
    wrapped = peft_model(model, setup.rank, wide=False, targets=setup.targets)
    wrappers: list[Any] = [module for module in wrapped.modules() if hasattr(module, "parameter_name")]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts, layer, adapters = self.get_base_layer(), self, {}
        while hasattr(layer, "parameter_name"):
            factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            packed = parts.packed(*factors, experts.num_experts, layer.r["default"])
            adapters[layer.parameter_name] = (*packed, layer.scaling["default"])
            layer = layer.base_layer
        experts._scattermoe_lora = adapters
        output: Tensor = parts.forward(experts, hidden_states, top_k_index, top_k_weights)
        return output

    for wrapper in wrappers:
        if id(wrapper) not in inner:
            wrapper.forward = types.MethodType(forward, wrapper)
    return wrapped, {}


def axolotl_scattermoe(folder: Path | None) -> Any:
    """axolotl's ``scattermoe_lora`` without the rest of axolotl: ``forward`` of experts, and how factors are packed.

    Raises:
        Unavailable: the folder is not there.
    """
    place = "integrations/kernels/libs/scattermoe_lora"
    if folder is None or not (folder / place).exists():
        raise Unavailable(f"no {place} in {folder}: give --axolotl the folder src/axolotl of its sources")
    name, at = "axolotl", folder
    sys.modules.setdefault(name, _module(name, __path__=[str(at)]))
    for part in place.split("/")[:-1]:  # what their packages import is not wanted
        name, at = f"{name}.{part}", at / part
        sys.modules.setdefault(name, _module(name, __path__=[str(at)]))
    experts, layers = (importlib.import_module(f"{name}.scattermoe_lora.{part}") for part in ("experts", "layers"))
    return types.SimpleNamespace(forward=experts.scattermoe_experts_forward, packed=layers.peft_lora_to_scattermoe)


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


#: With the model's own norms and rotary embeddings: the blocks are put in one after the other.
OWN_NORMS: dict[str, Any] = {"norms": "none", "rotary": "none"}
#: All contenders beside the frozen model, by what the command line calls them.
CONTENDERS = {
    "peft-bf16": Contender("PEFT, 16-bit adapters", _peft(wide=False)),
    "peft-default": Contender("PEFT default (fp32 adapters, autocast)", _peft(wide=True), autocast=True),
    "peft-fp32": Contender("PEFT, fp32 adapters without autocast", _peft(wide=True)),
    "peft-dropout": Contender("PEFT, 16-bit adapters, dropout 0.05", _peft(wide=False, dropout=0.05), exact=False),
    "axolotl": Contender("axolotl, 16-bit adapters", _axolotl),
    "axolotl-experts": Contender("axolotl's ScatterMoE, 16-bit adapters", _axolotl_experts),
    "ours": Contender("ours", _ours("fp32")),
    "ours-bf16": Contender("ours, 16-bit adapters", _ours("bf16", wide=False)),
    "ours-none": Contender("ours none", _ours("none", wide=False, groups="none")),  # no groups
    "ours-no-mlps": Contender("ours, no MLPs", _one_by_one("no_mlps")),
    "ours-no-mlps-bf16": Contender("ours, no MLPs, 16-bit adapters", _one_by_one("no_mlps_bf16", wide=False)),
    "ours-own-rotary-bf16": Contender(
        "ours, rotary embeddings of Transformers, 16-bit adapters", _ours("own_rotary_bf16", wide=False, rotary="none")
    ),
    "ours-own-norms": Contender("ours, norms of Transformers", _ours("own_norms", **OWN_NORMS)),
    "ours-own-norms-bf16": Contender(
        "ours, norms of Transformers, 16-bit adapters", _ours("own_norms_bf16", wide=False, **OWN_NORMS)
    ),
    "ours-groups-bf16": Contender(
        "ours, no MLPs, norms of Transformers, 16-bit adapters",
        _one_by_one("groups_bf16", wide=False, **OWN_NORMS),
    ),
    "ours-linears-bf16": Contender(
        "ours, linears one by one, norms of Transformers, 16-bit adapters",
        _ours("linears_bf16", wide=False, groups="none", **OWN_NORMS),
    ),
    "ours-graph": Contender("ours for graphs", _ours("graph", launch="graph")),
    "ours-compile": Contender("ours for torch.compile", _ours("compile", launch="compile")),
    "ours-compile-bf16": Contender(
        "ours for torch.compile, 16-bit adapters", _ours("compile_bf16", wide=False, launch="compile")
    ),
    "ours-graph-bf16": Contender("ours for graphs, 16-bit adapters", _ours("graph_bf16", wide=False, launch="graph")),
    "ours-dropout": Contender(
        "ours for graphs, 16-bit adapters, dropout 0.05",
        _ours("dropout", wide=False, dropout=0.05, launch="graph"),
        exact=False,
    ),
    "ours-dropout-bf16": Contender(
        "ours, 16-bit adapters, dropout 0.05", _ours("dropout_bf16", wide=False, dropout=0.05), exact=False
    ),
    "ours-apart": Contender("ours, projections of experts apart", _apart("apart")),
    "ours-graph-apart": Contender(
        "ours for graphs, projections of experts apart", _apart("graph_apart", launch="graph")
    ),
    "ours-autocast": Contender("ours, autocast", _ours("autocast"), autocast=True),
    "ours-injected": Contender("ours, injected without PEFT", _injected),
    "generated": Contender("generated", _swapped("eager")),
    "generated-graph": Contender("generated for graphs", _swapped("graph", launch="graph")),
    "generated-torch": Contender("generated, torch only", _swapped("torch", kernels=False)),
    "generated-graph-bf16": Contender(
        "generated for graphs, 16-bit adapters", _swapped("graph_bf16", launch="graph", adapter_dtype="bf16")
    ),
}


# Of all contenders


def origin(device: torch.device, profile: str | None = None) -> dict[str, Any]:
    """What figures of whole models depend on beside the code; ``profile``: that of the choice, or the device's own."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers", "peft")}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(device),
        "versions": versions,
        "profile": profile or profile_of(nn.Linear(1, 1, device=device))[0],
    }


def adapters(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of all LoRA linears, in the model's order."""
    pairs = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            factors = module.lora_A, module.lora_B
            if isinstance(module.lora_A, nn.ModuleDict):  # PEFT's
                factors = module.lora_A["default"].weight, module.lora_B["default"].weight  # type: ignore[index, union-attr]
            pairs.append(factors)
    return pairs  # type: ignore[return-value]


@torch.no_grad()
def fill_adapters(model: nn.Module) -> None:
    """The same random adapters in every contender; B is not zero, as zeros would be timed otherwise."""
    for number, (a, b) in enumerate(adapters(model)):
        generator = torch.Generator(a.device).manual_seed(number)
        for factor, scale in ((a, a.shape[1] ** -0.5), (b, 0.01)):
            factor.copy_(torch.randn(factor.shape, generator=generator, device=factor.device) * scale)
