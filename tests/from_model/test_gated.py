"""Gated MLPs of live models: found by what they do, and left where they do anything else."""

from __future__ import annotations

import ast
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.request import architecture as data
from runlora_gen.request import groups
from runlora_gen.request.activations import ACTIVATIONS, activation_of_mlps
from runlora_gen.request.architecture import Gated, architecture_of
from runlora_gen.request.mlps import mlps

torch: Any = pytest.importorskip("torch", reason="a live model needs torch")
nn: Any = torch.nn
F: Any = torch.nn.functional
live: Any = pytest.importorskip("runlora_gen.from_model.live")
gated: Any = pytest.importorskip("runlora_gen.from_model.gated")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers", reason="the models are Transformers'")
    peft: Any = pytest.importorskip("peft", reason="the adapters are PEFT's")

NAMES = ("gate_proj", "up_proj", "down_proj")
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
#: Families by what they have between gate and up.
FOUND = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2"), "silu_gated"),
    **dict.fromkeys(("granite", "smollm3", "cohere"), "silu_gated"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_tanh_gated"),
}
SPECIAL: dict[str, dict[str, Any]] = {"opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}}


def build(model_type: str, *, device: str = "meta", **fields: Any) -> Any:
    config = transformers.CONFIG_MAPPING[model_type](**{**SIZES, **SPECIAL.get(model_type, {}), **fields})
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        return transformers.AutoModel.from_config(config, attn_implementation="eager")


# Transformers' models


@pytest.mark.parametrize("model_type", FOUND)
def test_of_transformers(model_type: str) -> None:
    read = live.read_model(build(model_type)).architecture
    assert read.gated == (Gated(NAMES, FOUND[model_type], (64, 96, 64)),)
    (mlp,) = mlps(read)
    assert (mlp.name, mlp.count, mlp.bias, mlp.projections) == ("mlp_64x96", 2, False, (NAMES,))


@pytest.mark.parametrize("model_type", ["phi3", "glm", "glm4"])
def test_gate_and_up_in_one(model_type: str) -> None:
    read = live.read_model(build(model_type)).architecture
    halves = ("gate_up_proj", "gate_up_proj", "down_proj")
    assert read.gated == (Gated(halves, "silu_gated", (64, 96, 64)),)
    (mlp,) = mlps(read)
    assert (mlp.name, mlp.count, mlp.fused, mlp.projections) == ("mlp_64x96", 2, True, (halves,))


def _as_they_are(gate: Any, up: Any) -> tuple[Any, Any]:
    return gate, up


class Halves(nn.Module):  # type: ignore[misc]
    """As Phi-3's."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(6, 8)
        self.change = change or _as_they_are

    def forward(self, x: Any) -> Any:
        gate, up = self.change(*self.gate_up_proj(x).chunk(2, -1))
        return self.down_proj(F.silu(gate) * up)


def _interleaved(gate: Any, up: Any) -> tuple[Any, Any]:
    both = torch.cat((gate, up), -1)
    return both[..., ::2], both[..., 1::2]


@pytest.mark.parametrize(
    "change",
    [lambda gate, up: (up, gate), lambda gate, up: (gate, up + 1), lambda gate, up: (gate, gate), _interleaved],
    ids=["up first", "shifted", "gate alone", "interleaved"],
)
def test_halves_that_are_something_else(change: Any) -> None:
    assert live._activation_of_mlp(Halves()) == "silu_gated"
    assert live._activation_of_mlp(Halves(change)) == ""


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "roberta", "starcoder2", "nemotron", "gpt_neox"])
def test_others_are_left(model_type: str) -> None:
    assert live.read_model(build(model_type)).architecture.gated == ()


#: Config fields that a family reads beside its sizes, in both of their forms.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"mlp_bias": True}, {"hidden_act": "gelu"}],
    "gemma": [{"hidden_act": "gelu"}, {"hidden_act": "silu"}],
    "gemma2": [{"hidden_activation": "gelu"}, {"hidden_act": "gelu"}],
    "gemma3_text": [{"hidden_activation": "relu"}],
}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [(name, fields) for name in sorted(data._whole_families()) for fields in ({}, *FIELDS.get(name, ()))],
    ids=str,
)
def test_data_files_say_what_is_found(model_type: str, fields: dict[str, Any]) -> None:
    model = build(model_type, **fields)
    said = {**model.config.to_dict(), **fields}
    assert live.read_model(model).architecture.gated == architecture_of(said).gated
    # Without the field that names the function: the default.
    for field in {"hidden_act", "hidden_activation"} & said.keys() - fields.keys():
        del said[field]
    assert live.read_model(model).architecture.gated == architecture_of(said).gated


def functions() -> dict[str, Any]:
    """Transformers' without those that read weights of their own."""
    return {name: transformers.activations.ACT2FN[name] for name in transformers.activations.ACT2FN if name != "xielu"}


@pytest.mark.parametrize("name", functions())
def test_names_of_functions_say_what_they_do(name: str) -> None:
    """Tried, every function of Transformers is the row that names it, or no row."""
    model = build("llama", hidden_act=name, num_hidden_layers=1)
    assert live._activation_of_mlp(model.layers[0].mlp) == (activation_of_mlps(name) or "")


def test_every_row_has_a_function_of_its_own() -> None:
    names = [name for row in ACTIVATIONS.values() if row.of_mlps for name in row.transformers]
    assert len(names) == len(set(names)) and set(names) <= set(functions())


def test_with_adapters() -> None:
    """PEFT puts layers around the linears; only those that have an adapter make up the MLPs that are generated for."""
    whole = Gated(NAMES, "silu_gated", (64, 96, 64))
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=list(NAMES)))
    read = live.read_model(adapted)
    assert read.architecture.gated == read.adapted[4].gated == (whole,)
    read = live.read_model(peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=list(NAMES[:2]))))
    assert (read.architecture.gated, read.adapted[4].gated) == ((whole,), ())


def test_ranks_that_differ_within_mlps_make_up_none() -> None:
    pattern = {r"layers\.0\.mlp\.down_proj": 8, r"layers\.1\.mlp\.(gate|up)_proj": 8}
    config = peft.LoraConfig(r=4, target_modules=list(NAMES), rank_pattern=pattern)
    read = live.read_model(peft.get_peft_model(build("llama"), config))
    # Of each rank there is one gate, one up and one down: of two layers.
    assert [[p.count for p in read.adapted[rank].projections] for rank in (4, 8)] == [[1, 1, 1], [1, 1, 1]]
    assert [read.adapted[rank].gated for rank in (4, 8)] == [(), ()]
    assert len(read.architecture.gated) == 1


def test_sizes_are_told_apart_and_what_differs_among_alike_ones_is_left() -> None:
    model = build("llama", num_hidden_layers=3)
    other = build("llama", hidden_act="gelu", num_hidden_layers=1, intermediate_size=128)
    model.layers[2].mlp = other.layers[0].mlp
    read = live.read_model(model).architecture
    assert read.gated == (Gated(NAMES, "silu_gated", (64, 96, 64)), Gated(NAMES, "gelu_gated", (64, 128, 64)))
    assert [(mlp.name, mlp.activation, mlp.count) for mlp in mlps(read)] == [
        ("mlp_64x96", "silu_gated", 2),
        ("mlp_64x128", "gelu_gated", 1),
    ]
    model.layers[0].mlp.act_fn = nn.GELU()
    assert live.read_model(model).architecture.gated == (Gated(NAMES, "gelu_gated", (64, 128, 64)),)
    model.layers[0].mlp.act_fn = nn.Dropout(0.5)
    assert live.read_model(model).architecture.gated == (Gated(NAMES, "gelu_gated", (64, 128, 64)),)


def test_t5() -> None:
    """Its MLPs have a dropout, by default one that drops."""

    def read(**fields: Any) -> Any:
        config = transformers.T5Config(
            vocab_size=32, d_model=64, d_ff=96, num_layers=1, feed_forward_proj="gated-gelu", **fields
        )
        with torch.device("meta"):
            return live.read_model(transformers.T5EncoderModel(config)).architecture.gated

    assert read() == ()
    assert read(dropout_rate=0.0) == (Gated(("wi_0", "wi_1", "wo"), "gelu_tanh_gated", (64, 96, 64)),)


# One module, and what looks like it


class Mlp(nn.Module):
    def __init__(self, bias: bool = False, act: Any = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.down_proj = nn.Linear(24, 16, bias=bias)
        self.act_fn = act or nn.SiLU()

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def of(forward: Any, **fields: Any) -> Mlp:
    """One with another forward."""
    made: Mlp = type("Other", (Mlp,), {"forward": forward})()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def with_hook(hook: str, part: str = "") -> Mlp:
    made = Mlp()
    getattr(made.get_submodule(part), hook)(lambda *_: None)
    return made


def counting(self: Any, x: Any) -> Any:
    self.calls += 1
    return Mlp.forward(self, x) * (1 if self.calls < 2 else 2)


def remembering(self: Any, x: Any) -> Any:
    self.seen.append(len(self.seen))
    return Mlp.forward(self, x)


def keeping(self: Any, x: Any) -> Any:
    self.last = x.shape
    return Mlp.forward(self, x)


class Doubling(Mlp):
    """Whose children are called in another way."""

    def __call__(self, x: Any) -> Any:
        return 2 * super().__call__(x)


class Counter(nn.Module):
    calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return F.silu(x)


class Scaled(nn.SiLU):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def drawing(self: Any, x: Any) -> Any:
    """Too seldom to be seen in some rows."""
    return Mlp.forward(self, x) if not self.training or torch.rand(()) > 1e-9 else x


def taking_weights(self: Any, x: Any) -> Any:
    gate = F.linear(x, self.gate_proj.weight, self.gate_proj.bias)
    return self.down_proj(self.act_fn(gate) * self.up_proj(x))


def made_by(make: Any) -> Any:
    """An instance whose forward is its own."""
    made = Mlp()
    made.forward = make(made)  # type: ignore[method-assign]
    return made


IMPOSTORS: dict[str, Any] = {
    "scaled": lambda: of(lambda m, x: 1.01 * Mlp.forward(m, x)),
    "a residual": lambda: of(lambda m, x: x + Mlp.forward(m, x)),
    "gates cut off at 7": lambda: of(lambda m, x: m.down_proj(F.silu(m.gate_proj(x).clamp(max=7)) * m.up_proj(x))),
    "gates cut off at 500": lambda: of(lambda m, x: m.down_proj(F.silu(m.gate_proj(x).clamp(max=500)) * m.up_proj(x))),
    "ups cut off at 30": lambda: of(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x).clamp(-30, 30))),
    "what is between cut off": lambda: of(
        lambda m, x: m.down_proj((F.silu(m.gate_proj(x)) * m.up_proj(x)).clamp(max=6e4))
    ),
    "up + 1": lambda: of(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * (m.up_proj(x) + 1))),
    "the other way round": lambda: of(lambda m, x: m.down_proj(F.silu(m.up_proj(x)) * m.gate_proj(x))),
    "another function": lambda: Mlp(act=nn.ReLU()),
    "no gate": lambda: of(lambda m, x: m.down_proj(F.silu(m.up_proj(x)))),
    "a sum": lambda: of(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) + m.up_proj(x))),
    "a norm": lambda: of(lambda m, x: m.down_proj(F.normalize(F.silu(m.gate_proj(x)) * m.up_proj(x)))),
    "a dropout": lambda: Mlp(act=nn.Sequential(nn.SiLU(), nn.Dropout(0.1))),
    "a dropout that drops next to nothing": lambda: Mlp(act=nn.Sequential(nn.SiLU(), nn.Dropout(1e-9))),
    "a dropout of the class's own": lambda: of(lambda m, x: F.dropout(Mlp.forward(m, x), 1e-9, m.training)),
    "random numbers": lambda: of(drawing),
    "noise": lambda: of(lambda m, x: Mlp.forward(m, x) + torch.rand_like(x)),
    "a weight more": lambda: of(lambda m, x: m.scale * Mlp.forward(m, x), scale=nn.Parameter(torch.ones(()))),
    "a weight more, below": lambda: Mlp(act=Scaled()),
    "a linear more": lambda: of(lambda m, x: Mlp.forward(m, x), extra=nn.Linear(16, 16)),
    "a tensor more": lambda: of(lambda m, x: m.scale * Mlp.forward(m, x), scale=torch.ones(())),
    "tensors in a list": lambda: of(lambda m, x: m.scales[0] * Mlp.forward(m, x), scales=[torch.ones(())]),
    "tensors in a dict": lambda: of(lambda m, x: m.by["a"] * Mlp.forward(m, x), by={"a": torch.ones(())}),
    "a buffer": lambda: Mlp(act=nn.BatchNorm1d(24, affine=False)),
    "counts": lambda: of(counting, calls=0),
    "remembers": lambda: of(remembering, seen=[]),
    "keeps": lambda: of(keeping),
    "counts below": lambda: Mlp(act=Counter()),
    "other in training": lambda: of(lambda m, x: Mlp.forward(m, x) * (2 if m.training else 1)),
    "other without gradients": lambda: of(lambda m, x: Mlp.forward(m, x) * (1 if torch.is_grad_enabled() else 2)),
    "other of sequences": lambda: of(lambda m, x: Mlp.forward(m, x).cumsum(0) if x.dim() == 3 else Mlp.forward(m, x)),
    "over tokens": lambda: of(lambda m, x: Mlp.forward(m, x.cumsum(-2))),
    "no gradient of x": lambda: of(lambda m, x: Mlp.forward(m, x.detach())),
    "no gradient of gates": lambda: of(
        lambda m, x: m.down_proj(F.silu(m.gate_proj(x)).detach() * m.up_proj(x)),
    ),
    "weights taken without a call": lambda: of(taking_weights),
    "a linear called twice": lambda: of(lambda m, x: Mlp.forward(m, x) + 0 * m.gate_proj(x).sum()),
    "a bias lost": lambda: of(lambda m, x: Mlp.forward(m, x) - (0 if m.down_proj.bias is None else m.down_proj.bias)),
    "16 bits within": lambda: of(lambda m, x: Mlp.forward(m, x.bfloat16().to(x.dtype))),
    "two outputs": lambda: of(lambda m, x: (Mlp.forward(m, x), None)),
    "another shape": lambda: of(lambda m, x: Mlp.forward(m, x).flatten()),
    "an error": lambda: of(lambda m, x: 1 / 0),
    "two arguments": lambda: of(lambda m, x, y: Mlp.forward(m, x)),
    "a forward of the instance": lambda: made_by(lambda m: lambda x: 2 * type(m).forward(m, x)),
    "a call of its own": Doubling,
    "a hook": lambda: with_hook("register_forward_hook"),
    "a hook before": lambda: with_hook("register_forward_pre_hook"),
    "a hook of gradients": lambda: with_hook("register_full_backward_hook"),
    "a hook below": lambda: with_hook("register_forward_hook", "act_fn"),
    "no module of its own": lambda: nn.ModuleDict(dict(Mlp().named_children())),
}
TRUE: dict[str, Any] = {
    "plain": Mlp,
    "with biases": lambda: Mlp(bias=True),
    "a function that is no module": lambda: of(
        lambda m, x: m.down_proj(m.act(m.gate_proj(x)) * m.up_proj(x)), act=F.silu
    ),
    "a dropout that does nothing": lambda: Mlp(act=nn.Sequential(nn.SiLU(), nn.Dropout(0.0))),
    "a function in place": lambda: Mlp(act=nn.SiLU(inplace=True)),
    "fields that say something": lambda: of(Mlp.forward, sizes=[16, 24], names={"a": (1, None)}, config=object()),
    "a dtype that is asked for": lambda: of(lambda m, x: Mlp.forward(m, x.to(m.down_proj.weight.dtype))),
    "float32 within": lambda: of(
        lambda m, x: m.down_proj((F.silu(m.gate_proj(x).float()) * m.up_proj(x).float()).to(x.dtype))
    ),
    "a state dict's hook": lambda: with_hook("register_state_dict_post_hook"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_left(name: str) -> None:
    assert live._activation_of_mlp(IMPOSTORS[name]()) == ""


@pytest.mark.parametrize("name", TRUE)
def test_what_does_the_same_is_found(name: str) -> None:
    assert live._activation_of_mlp(TRUE[name]()) == "silu_gated"


def test_names_of_linears() -> None:
    *apart, halves = gated.TRIPLES
    assert halves[0] == halves[1]
    for names in apart:
        forward = "lambda m, x: m.{2}(F.silu(m.{0}(x)) * m.{1}(x))".format(*names)
        made = type("Named", (nn.Module,), {"forward": eval(forward, {"F": F})})()
        for name in names:
            setattr(made, name, nn.Linear(8, 8))
        assert gated.triple_of(made) == names
        assert live._activation_of_mlp(made) == "silu_gated"
        delattr(made, names[2])
        assert gated.triple_of(made) is None and gated.tried_mlp(made) is None
    assert tuple(names[:2] for names in apart) == groups._GATE_UP


def test_of_an_accelerated_class_what_it_stands_for_is_tried() -> None:
    class Accelerated(Mlp):
        replaces = Mlp

        def forward(self, x: Any) -> Any:
            raise AssertionError

        def __reduce__(self) -> Any:
            raise AssertionError

    assert live._activation_of_mlp(Accelerated()) == "silu_gated"


def everything(module: Any) -> Any:
    parts = [(id(part), id(vars(part)), part.training, dict(vars(part))) for part in module.modules()]
    return parts, {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", [*TRUE, *IMPOSTORS])
def test_trying_changes_nothing(name: str) -> None:
    module = {**TRUE, **IMPOSTORS}[name]()
    module.train(name in TRUE)
    former, (states, random) = everything(module), (copy.deepcopy(getattr(module, "seen", 0)), torch.get_rng_state())
    grads = [p.grad for p in module.parameters()]
    live._activation_of_mlp(module)
    (parts, tensors), (known, held) = everything(module), former
    for one, other in zip(parts, known, strict=True):
        assert one[:3] == other[:3] and one[3].keys() == other[3].keys()
        assert all(one[3][key] is other[3][key] for key in one[3] if key != "training")
    assert tensors.keys() == held.keys() and all(torch.equal(tensors[key], held[key]) for key in held)
    assert states == getattr(module, "seen", 0)
    assert torch.equal(random, torch.get_rng_state())
    assert grads == [p.grad for p in module.parameters()] == [None] * len(grads)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference", "autocast", "meta"],
)
def test_whatever_is_around(around: Any) -> None:
    # Autocast makes float32's products coarse, but not those of float64.
    product = of(lambda m, x: m.down_proj(as_product(F.silu(m.gate_proj(x))) * m.up_proj(x)))
    module = Mlp()
    with around():
        assert live._activation_of_mlp(module) == live._activation_of_mlp(product) == "silu_gated"


def as_product(x: Any) -> Any:
    """The same, by a product with float32's identity."""
    return (x.float() @ torch.eye(x.shape[-1], device=x.device)).to(x.dtype)


def test_a_trial_says_what_another_function_makes() -> None:
    """As generated packages ask it: of functions of two tensors, which know no gradients."""
    trial = gated.tried_mlp(Mlp())

    def activated(gate: Any, up: Any) -> Any:
        assert gate.shape == up.shape == (20, 5) and gate.dtype == torch.float64
        return F.silu(gate) * up

    def backward(dx: Any, gate: Any, up: Any) -> Any:
        s = torch.sigmoid(gate)
        return dx * up * (s + gate * s * (1 - s)), dx * F.silu(gate)

    assert trial.is_made_by(activated, backward)
    assert not trial.is_made_by(lambda gate, up: activated(gate, up) * 1.001, backward)
    assert not trial.is_made_by(activated, lambda *given: backward(*given)[::-1])
    for place in (0, 1):
        wrong = [1.0, 1.0]
        wrong[place] = 1.001
        assert not trial.is_made_by(
            activated, lambda *g, w=wrong: [d * f for d, f in zip(backward(*g), w, strict=True)]
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert trial.is_made_by(lambda *given: as_product(activated(*given)), backward)


def test_the_text_stands_by_itself() -> None:
    """Generated packages hold it, and beside it what it takes of ``copies``."""
    tree = ast.parse(Path(gated.__file__).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) or node.names[0].name for node in imported} == {
        "__future__",
        "copies",
        "copy",
        "typing",
        "torch",
    }
    head, _, body = Path(gated.__file__).read_text(encoding="utf-8").partition("\n\n\n")
    assert head.rstrip().endswith("from .copies import copied, fields, is_plain, lasting") and body.startswith(
        "class MlpTrial"
    )
