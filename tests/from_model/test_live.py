"""Live models: what is read of them is what they hold, and what is left out is named."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tomllib
from runlora_gen.request import architecture as data
from runlora_gen.request.architecture import Projection, architecture_names, family_projections, load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import UNASKED

torch: Any = pytest.importorskip("torch", reason="a live model needs torch")
nn: Any = torch.nn
read_model: Any = pytest.importorskip("runlora_gen.from_model.live").read_model
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers", reason="the models are Transformers'")
    peft: Any = pytest.importorskip("peft", reason="the adapters are PEFT's")

#: Decoders of Transformers 5 whose linears are all 2-D and all taken.
DENSE = (
    "apertus arcee biogpt bitnet bloom codegen cohere cohere2 diffllama ernie4_5 exaone4 falcon gemma gemma2 "
    "gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium hunyuan_v1_dense internlm3 llama "
    "ministral mistral mpt nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 "
    "stablelm starcoder2 xglm"
)
#: And those with something that is left out, with how its reason begins.
MIXED = {
    "bamba": "BambaMixer takes",
    "dbrx": "2-D parameters of DbrxExpertGLU",
    "deepseek_v2": UNASKED,
    "deepseek_v3": UNASKED,
    "ernie4_5_moe": "2-D parameters of Ernie4_5_MoeStatics",
    "falcon_h1": "FalconH1Mixer takes",
    "falcon_mamba": "FalconMambaMixer takes",
    "glm4_moe": UNASKED,
    "gpt_oss": UNASKED,
    "granitemoe": UNASKED,
    "granitemoehybrid": "GraniteMoeHybridMambaLayer takes",
    "jamba": "JambaMambaMixer takes",
    "llama4_text": "a linear with a forward of its own (Llama4Router)",
    "mamba": "MambaMixer takes",
    "mamba2": "Mamba2Mixer takes",
    "minimax": UNASKED,
    "minimax_m2": UNASKED,
    "mixtral": UNASKED,
    "nemotron_h": "NemotronHMamba2Mixer takes",
    "olmoe": UNASKED,
    "phimoe": UNASKED,
    "qwen2_moe": UNASKED,
    "qwen3_5_moe_text": "convolution",
    "qwen3_moe": UNASKED,
    "qwen3_next": "convolution",
}
#: What a default config needs so that two layers show all that a deep model has.
OPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8}},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 6},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"full_attention_interval": 2},
}


def build(config: Any, auto: Any = None, **options: Any) -> Any:
    """A model without weights."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return (auto or transformers.AutoModelForCausalLM).from_config(config, attn_implementation="eager", **options)


def decoder(model_type: str, **options: Any) -> Any:
    return build(transformers.CONFIG_MAPPING[model_type](num_hidden_layers=2, **OPTIONS.get(model_type, {}), **options))


def shapes(read: Any) -> Counter[tuple[str, int, int, bool]]:
    counts: Counter[tuple[str, int, int, bool]] = Counter()
    for p in read.architecture.projections:
        counts[p.name, p.in_features, p.out_features, p.bias] += p.count
    return counts


def reason_of(read: Any, path: str) -> str | None:
    """Why a module, or a stack of experts, is left out; None where it isn't."""
    reason: str | None = read.left_out.get(path, read.left_out.get(re.sub(r"\b\d+\b", "*", path)))
    return reason


def check_inputs(projections: tuple[Projection, ...]) -> None:
    """Whatever shares an activation has its width and is there as often."""
    widths: dict[str, tuple[int, int]] = {}
    for p in projections:
        assert widths.setdefault(p.input, (p.in_features, p.count)) == (p.in_features, p.count)


@pytest.mark.parametrize("model_type", [*DENSE.split(), *MIXED])
def test_decoders_are_read_right(model_type: str) -> None:
    model = decoder(model_type)
    read = read_model(model)
    # Another walk: by parameters, not by modules.
    expected: Counter[tuple[str, int, int, bool]] = Counter()
    experts: Counter[tuple[str, str, tuple[int, ...], bool, bool, int]] = Counter()
    for path, weight in model.named_parameters():
        owner, _, field = path.rpartition(".")
        module = model.get_submodule(owner)
        if reason_of(read, path) == UNASKED:
            given_rows = model_type == "llama4_text"  # every expert has all tokens, whoever was chosen
            asked = getattr(model.config, "num_experts_per_tok", None) or model.config.moe_k
            choices = weight.shape[0] if given_rows else asked
            transposed = given_rows or module.is_transposed
            where = f"{owner.rpartition('.')[0].rpartition('.')[2]}.experts"
            sides = tuple(weight.shape[1:] if transposed else weight.shape[:0:-1])
            biased = getattr(module, f"{field}_bias", None) is not None
            experts[where, field, (weight.shape[0], *sides), transposed, biased, choices] += 1
            continue
        if weight.dim() < 2 or reason_of(read, owner) or reason_of(read, path.removesuffix("_bias")):
            continue
        assert field == "weight", f"{path} is neither taken nor left out"
        assert isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
        rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
        expected[owner.rpartition(".")[2], columns, rows, module.bias is not None] += 1
    assert shapes(read) == expected
    stacks = read.architecture.offered
    assert {
        (s.module, s.name, (s.experts, s.in_features, s.out_features), s.layout == "in_out", s.bias, s.top_k): s.count
        for s in stacks
    } == experts
    assert [stack.gathers for stack in stacks] == [True, False] * (len(stacks) // 2)
    assert bool(stacks) == (UNASKED in read.left_out.values())
    check_inputs(read.architecture.projections)
    assert read.architecture.model_type == model_type
    assert read.architecture.slug == model_type
    assert read.dtypes == (model.dtype,)
    plain = {"embedding", "output embedding"}
    if model_type in DENSE.split():
        assert set(read.left_out.values()) == plain
    else:
        assert plain < set(read.left_out.values())
        assert any(reason.startswith(MIXED[model_type]) for reason in read.left_out.values()), read.left_out


#: Every family, in configs small where Transformers asks for it.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
FLAGS = {"attention_bias": True, "mlp_bias": True, "qkv_bias": False, "use_bias": False, "enable_bias": False}
ENCODERS = (*data._load_family(Path(data.__file__).parent / "families" / "roberta.toml").model_types, "vit")


def without_pooler(model_type: str) -> dict[str, bool]:
    """A pooler belongs to a task; data files are of the layers."""
    return {"add_pooling_layer": False} if model_type in ENCODERS and model_type != "electra" else {}


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "other biases"])
@pytest.mark.parametrize("model_type", sorted(data._families()))
def test_families_say_what_transformers_builds(model_type: str, flags: dict[str, bool]) -> None:
    known = transformers.CONFIG_MAPPING[model_type]
    head = {"head_dim": 24} if model_type in ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen3") else {}
    special = {"opt": {"ffn_dim": 96, "word_embed_proj_dim": 32}, "electra": {"embedding_size": 64}}
    config = known(**{**TINY, "pad_token_id": 0, **head, **flags, **special.get(model_type, {})})
    read = read_model(build(config, transformers.AutoModel, **without_pooler(model_type)))
    described = family_projections(config.to_dict(), model_type)
    assert described
    # Equal with names of inputs and order: only where all else agrees is the family's own text taken.
    assert read.architecture.projections == described


@pytest.mark.parametrize("name", architecture_names())
def test_the_catalogue_says_what_transformers_builds(name: str) -> None:
    values = tomllib.loads((Path(data.__file__).parent / "architectures" / f"{name}.toml").read_text(encoding="utf-8"))
    architecture = load_architecture(name)
    known = transformers.CONFIG_MAPPING[architecture.model_type]
    # Layers cost time: three tell as much as a hundred, and the rest is counted.
    layers = max(p.count for p in architecture.projections)
    depth = "n_layer" if "n_layer" in values else "num_hidden_layers"
    assert values[depth] == layers
    config = known(**{**values, depth: 3})
    read = read_model(build(config, transformers.AutoModel, **without_pooler(architecture.model_type)))
    scaled = [(p.name, p.in_features, p.out_features, p.bias, p.layout, p.count) for p in architecture.projections]
    assert [
        (p.name, p.in_features, p.out_features, p.bias, p.layout, layers if p.count == 3 else p.count)
        for p in read.architecture.projections
    ] == scaled


# What is left out


class Plain(nn.Module):
    """Two layers with whatever a test puts into them."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: make() for n, make in parts.items()}) for _ in range(2))


class Doubling(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Packed(nn.Module):
    """As quantizers that are no ``nn.Linear`` and keep their codes in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 8))


def eight_bits() -> nn.Linear:
    linear = nn.Linear(8, 8, bias=False)
    linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return linear


def float8() -> nn.Linear:
    linear = nn.Linear(8, 8, bias=False)
    linear.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def replaced() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubling(8, 8), "a linear with a forward of its own (Doubling)"),
        (eight_bits, "quantized (Parameter of int8)"),
        (float8, "quantized (Parameter of float8_e4m3fn)"),
        (Packed, "quantized (Packed)"),
        (Experts, "3-D weights of Experts"),
        (lambda: nn.Embedding(8, 8), "embedding"),
        (lambda: nn.Conv2d(8, 8, 3), "convolution"),
        (lambda: nn.LazyLinear(8), "not initialised (lazy)"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is parametrized"),
        (replaced, "its forward was replaced"),
        (lambda: nn.Bilinear(8, 8, 8), "3-D weights of Bilinear"),
    ],
)
def test_what_is_no_linear_is_named_with_the_reason(make: Any, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = read_model(Plain(taken=lambda: nn.Linear(8, 4), other=make))
    assert dict(read.left_out) == {"layers.*.other": reason}
    assert shapes(read) == {("taken", 8, 4, True): 2}
    assert read.architecture.source == "live" and read.architecture.slug == "plain"


def test_attention_of_torch_takes_its_weights_without_a_call() -> None:
    read = read_model(Plain(taken=lambda: nn.Linear(8, 4), attention=lambda: nn.MultiheadAttention(8, 2)))
    assert read.left_out == {
        "layers.*.attention": "2-D parameters of MultiheadAttention, which is no linear",
        "layers.*.attention.out_proj": "MultiheadAttention takes its weight without calling it",
    }


def test_nothing_to_take_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"^'plain': no linear .*; left out: layers\.\*\.other: embedding$"):
        read_model(Plain(other=lambda: nn.Embedding(8, 8)))


def test_tied_and_untied_output_embeddings_and_heads_are_left_out() -> None:
    for tied in (False, True):
        assert read_model(decoder("llama", tie_word_embeddings=tied)).left_out["lm_head"] == "output embedding"
    config = transformers.LlamaConfig(num_hidden_layers=1, num_labels=3)
    read = read_model(build(config, transformers.AutoModelForSequenceClassification))
    assert read.left_out["score"] == "a head that classifies sequences"
    model = Plain(taken=lambda: nn.Linear(8, 8))
    model.embed, model.out = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    model.out.weight = model.embed.weight
    assert read_model(model).left_out == {"embed": "embedding", "out": "output embedding"}


def test_a_module_that_is_used_twice_is_read_once() -> None:
    shared = nn.Linear(8, 8)
    read = read_model(Plain(one=lambda: shared, two=lambda: nn.Linear(8, 8)))
    assert shapes(read) == {("one", 8, 8, True): 1, ("two", 8, 8, True): 2}


def test_layers_of_several_shapes_do_not_share_an_input() -> None:
    model = Plain(q_proj=lambda: nn.Linear(8, 8), k_proj=lambda: nn.Linear(8, 8))
    model.layers[1]["k_proj"] = nn.Linear(8, 4)
    projections = read_model(model).architecture.projections
    check_inputs(projections)
    assert [(p.name, p.out_features, p.count, p.input) for p in projections] == [
        ("q_proj", 8, 1, "layers.*.q_proj"),
        ("k_proj", 8, 1, "layers.*.q_proj"),
        ("q_proj", 8, 1, "layers.*.q_proj (2)"),
        ("k_proj", 4, 1, "layers.*.q_proj (2)"),
    ]


def test_queries_across_sequences_share_nothing() -> None:
    config = transformers.BartConfig(encoder_layers=1, decoder_layers=1)
    projections = read_model(build(config, transformers.AutoModel)).architecture.projections
    inputs = {p.name: p.input for p in projections if "encoder_attn" in p.input}
    assert inputs["k_proj"] == inputs["v_proj"] != inputs["q_proj"]
    own = {p.name: p.input for p in projections if "decoder.layers.*.self_attn" in p.input}
    assert own["q_proj"] == own["k_proj"] == own["v_proj"] != own["out_proj"]


# Through PEFT, compile and the like


def tiny_llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TINY, "vocab_size": 32, **options}, attn_implementation="eager")
    )


def adapted(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def test_a_peft_model_is_seen_through() -> None:
    base = read_model(tiny_llama())
    model = adapted(tiny_llama(), r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    for wrapped in (model, torch.compile(model, backend="eager")):
        read = read_model(wrapped)
        assert read.architecture == base.architecture
        assert read.left_out == base.left_out
    (group,) = read.adapters
    assert (group.adapter, group.rank, group.alpha, group.scaling, group.dropout) == ("default", 4, 8.0, 2.0, 0.1)
    assert (group.dtype, group.bias, group.variant) == (torch.float32, False, None)
    assert group.projections == base.architecture.projections
    assert read.adapted == {4: base.architecture}


def test_ranks_alphas_and_targets_are_those_of_each_layer() -> None:
    model = adapted(
        tiny_llama().to(torch.bfloat16),
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
        rank_pattern={"down_proj": 8, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 32},
    )
    model.add_adapter("second", peft.LoraConfig(r=16, target_modules=["o_proj"], use_dora=True, lora_bias=False))
    read = read_model(model)
    assert (read.dtype, read.dtypes) == (torch.bfloat16, (torch.bfloat16,))
    assert {(g.rank, g.alpha, round(g.scaling, 4), g.dtype) for g in read.adapters} == {
        (4, 8.0, 4.0, torch.float32),
        (2, 8.0, round(8 / 2**0.5, 4), torch.float32),
        (8, 32.0, round(32 / 8**0.5, 4), torch.float32),
    }
    assert {rank: [(p.name, p.count) for p in a.projections] for rank, a in read.adapted.items()} == {
        2: [("q_proj", 1)],
        4: [("q_proj", 1), ("v_proj", 1), ("v_proj", 1), ("lm_head", 1)],
        8: [("down_proj", 2)],
    }
    assert "lm_head" not in read.left_out  # it was asked for
    model.set_adapter("second")
    (group,) = read_model(model).adapters
    assert (group.adapter, group.rank, group.variant) == ("second", 16, "DoraLinearVariant")
    assert [(p.name, p.count) for p in group.projections] == [("o_proj", 2)]


def test_other_adapters_and_copies_are_left_out() -> None:
    model = adapted(tiny_llama(), r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "o_proj"])
    read = read_model(model)
    assert read.left_out["lm_head"] == read.left_out["model.layers.*.self_attn.o_proj"]
    assert read.left_out["lm_head"] == "trained in full (modules_to_save)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(tiny_llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    reason = read_model(other).left_out["model.layers.*.self_attn.k_proj"]
    assert reason == "has an adapter of another kind (peft.tuners.ia3.layer.Linear)"


def test_a_model_is_left_as_it_was() -> None:
    model = adapted(tiny_llama(), r=4, target_modules=["q_proj"])
    before = {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    read_model(model)
    assert {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()} == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_names_are_asked_for_or_the_model_types() -> None:
    assert read_model(tiny_llama()).architecture.name == "llama"
    assert read_model(tiny_llama(), name="My Llama 3.1").architecture.name == "my_llama_3_1"


# Bases of 4 bits


def quantized_linear(
    kind: str = "nf4", compute: Any = None, *, device: str | None = "cpu", bias: bool = False, out_features: int = 4
) -> Any:
    modules = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes")
    with torch.device("meta" if device == "meta" else "cpu"):  # as models are built to look at their shapes
        linear = modules.Linear4bit(64, out_features, bias=bias, compute_dtype=compute, quant_type=kind)
    return linear.to("cpu") if device == "cpu" else linear


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bases_of_4_bits_are_read_by_their_features(kind: str, device: str) -> None:
    """Whatever shape their codes have, and on the meta device too, where there are none."""
    read = read_model(
        Plain(
            q_proj=lambda: quantized_linear(kind, torch.bfloat16, device=device, bias=True),
            v_proj=lambda: quantized_linear(kind, torch.bfloat16, device=device, out_features=8),
        )
    )
    assert shapes(read) == {("q_proj", 64, 4, True): 2, ("v_proj", 64, 8, False): 2}
    assert read.base == kind and read.bases == (kind,) and not read.left_out
    assert read.dtype == torch.bfloat16, "that in which they are computed"


def test_what_is_not_quantized_yet_is_named() -> None:
    read = read_model(Plain(taken=lambda: nn.Linear(8, 4), other=lambda: quantized_linear(device=None)))
    reason = "quantized (Linear4bit), but not yet: move it to its device first"
    assert dict(read.left_out) == {"layers.*.other": reason} and read.bases == ("plain",)


def test_one_base_is_read_at_a_time() -> None:
    """That of most linears with adapters, or else of most, unless one is asked for."""
    model = Plain(
        q_proj=lambda: quantized_linear(compute=torch.float16),
        k_proj=lambda: quantized_linear(compute=torch.float16),
        o_proj=lambda: nn.Linear(8, 4),
    )
    read, plain = read_model(model), read_model(model, base="plain")
    assert (read.base, read.bases) == ("nf4", ("nf4", "plain")) and (plain.base, plain.bases) == ("plain", read.bases)
    assert {p.name for p in read.architecture.projections} == {"q_proj", "k_proj"}
    assert dict(read.left_out) == {"layers.*.o_proj": "not quantized"} and read.dtype == torch.float16
    assert shapes(plain) == {("o_proj", 8, 4, True): 2} and plain.dtype == torch.float32
    assert set(plain.left_out.values()) == {"quantized to 4 bits by bitsandbytes"}
    with pytest.raises(SpecError, match=r"no linear that LoRA can be generated for; left out: .*quantized to 4 bits"):
        read_model(model, base="fp4")
    with_adapters = read_model(adapted(model, r=2, target_modules=["o_proj"]))
    assert (with_adapters.base, with_adapters.bases) == ("plain", ("plain",))


def test_a_subclass_with_a_forward_of_its_own_is_no_linear_of_4_bits() -> None:
    modules = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes")

    class Other(modules.Linear4bit):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    read = read_model(Plain(taken=lambda: nn.Linear(8, 4), other=lambda: Other(64, 4, quant_type="nf4").to("cpu")))
    assert read.base == "plain" and list(read.left_out) == ["layers.*.other"]


# Bases of 8 bits


def linear_of_8_bits(
    base: str, *, device: str | None = "cpu", bias: bool = False, out_features: int = 4, wide: bool = False
) -> Any:
    """``wide``: an int8 that keeps its 16-bit weights, as for training without adapters."""
    with torch.device("meta" if device == "meta" else "cpu"):  # as models are built to look at their shapes
        if base == "int8":
            modules = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes")
            linear = modules.Linear8bitLt(64, out_features, bias=bias, has_fp16_weights=wide)
            return linear.to("cpu") if device == "cpu" else linear
        if base == "fbgemm":
            fbgemm = pytest.importorskip("transformers.integrations.fbgemm_fp8", reason="needs Transformers")
            return fbgemm.FbgemmFp8Linear(64, out_features, bias)
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs Transformers")
        return fp8.FP8Linear(64, out_features, (16, 16) if base == "fp8-block" else None, has_bias=bias)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "base"), [("int8", "int8"), ("fp8", "fp8"), ("fbgemm", "fp8"), ("fp8-block", "fp8-block")]
)
def test_bases_of_8_bits_are_read_by_their_class(kind: str, base: str, device: str) -> None:
    read = read_model(
        Plain(
            q_proj=lambda: linear_of_8_bits(kind, device=device, bias=True),
            v_proj=lambda: linear_of_8_bits(kind, device=device, out_features=8),
        )
    )
    assert shapes(read) == {("q_proj", 64, 4, True): 2, ("v_proj", 64, 8, False): 2}
    assert read.base == base and read.bases == (base,) and not read.left_out


@pytest.mark.parametrize("base", ["int8", "fp8", "fp8-block"])
@pytest.mark.parametrize("said", [torch.bfloat16, torch.float16, None], ids=str)
def test_what_8_bits_are_computed_in_is_what_the_config_says(base: str, said: torch.dtype | None) -> None:
    """Codes don't say it: the config does, or else what is not quantized."""
    model = tiny_llama().to(torch.bfloat16)
    model.config.dtype = said
    for layer in model.model.layers:
        layer.self_attn.q_proj = linear_of_8_bits(base)
    read = read_model(model, base=base)
    assert read.base == base and read.dtypes == (said or torch.bfloat16,)
    assert set(read_model(model, base="plain").dtypes) == {torch.bfloat16}, "plain linears are what they are"


@pytest.mark.parametrize("others", ["in bf16", "none"])
def test_without_a_config_it_is_what_is_not_quantized(others: str) -> None:
    """Neither scales nor adapters, which are in float32."""
    model = Plain(q_proj=lambda: linear_of_8_bits("fp8-block"), norm=lambda: nn.LayerNorm(8, dtype=torch.bfloat16))
    if others == "none":
        model = Plain(q_proj=lambda: linear_of_8_bits("fp8-block"))
    adapted_to = adapted(model, r=2, target_modules=["q_proj"])
    expected = torch.bfloat16 if others == "in bf16" else torch.get_default_dtype()
    assert read_model(model).dtype == read_model(adapted_to).dtype == expected


def test_what_of_8_bits_is_not_quantized_yet_is_named() -> None:
    fp8 = linear_of_8_bits("fp8")
    fp8.weight = nn.Parameter(torch.zeros(4, 64))  # as ``float()`` of a whole model makes it
    others = iter([linear_of_8_bits("int8", device=None), fp8])
    read = read_model(Plain(taken=lambda: nn.Linear(8, 4), other=lambda: next(others)))
    # bitsandbytes makes codes when a linear is moved; Transformers' linear that has none gets none by that.
    assert set(read.left_out.values()) == {
        "quantized (Linear8bitLt), but not yet: move it to its device first",
        "FP8Linear with a weight of float32",
    }
    assert read.bases == ("plain",)
    wide = read_model(Plain(taken=lambda: nn.Linear(8, 4), other=lambda: linear_of_8_bits("int8", wide=True)))
    (reason,) = wide.left_out.values()
    assert wide.bases == ("plain",) and set(wide.left_out) == {"layers.*.other"}
    assert re.fullmatch(r"Linear8bitLt with a weight of float\d\d", reason), "has_fp16_weights: it never will"


def test_each_base_of_a_mixed_model_is_read() -> None:
    """Those of most linears first; what is of another is left out with how it is stored."""
    model = Plain(
        q_proj=lambda: linear_of_8_bits("fp8"),
        k_proj=lambda: linear_of_8_bits("fbgemm"),
        v_proj=lambda: linear_of_8_bits("fp8-block"),
        o_proj=lambda: linear_of_8_bits("int8"),
        up_proj=lambda: nn.Linear(8, 4),
    )
    read = read_model(model)
    assert read.base == "fp8" and set(read.bases) == {"fp8", "fp8-block", "int8", "plain"}
    names = {base: {p.name for p in read_model(model, base=base).architecture.projections} for base in read.bases}
    assert names == {"fp8": {"q_proj", "k_proj"}, "fp8-block": {"v_proj"}, "int8": {"o_proj"}, "plain": {"up_proj"}}
    assert dict(read.left_out) == {
        "layers.*.v_proj": "quantized to float8_e4m3fn, with a scale for each block",
        "layers.*.o_proj": "quantized to 8 bits by bitsandbytes",
        "layers.*.up_proj": "not quantized",
    }


@pytest.mark.parametrize("base", ["int8", "fp8-block"])
def test_a_subclass_with_a_forward_of_its_own_is_no_linear_of_8_bits(base: str) -> None:
    plain = linear_of_8_bits(base)
    other = type("Other", (type(plain),), {"forward": lambda self, x: 2 * x})
    plain.__class__ = other
    read = read_model(Plain(taken=lambda: nn.Linear(8, 4), other=lambda: plain))
    assert read.base == "plain" and list(read.left_out) == ["layers.*.other"]
