"""Experts of live models: which stacks are read, with what adapters, and what is left out."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from runlora_gen.generation import Request, read_request
from runlora_gen.request.architecture import family_projections
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import UNASKED, Stack

torch: Any = pytest.importorskip("torch", reason="a live model needs torch")
nn: Any = torch.nn
read_model: Any = pytest.importorskip("runlora_gen.from_model.live").read_model
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers", reason="the models are Transformers'")
    peft: Any = pytest.importorskip("peft", reason="the adapters are PEFT's")

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
#: Of models with small experts, a shared one beside them, and attention of two kinds: their config, and their stacks.
BESIDE_SHARED = {
    **DELTA,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
    "full_attention_interval": 2,
}
FINE = {"gate_up_proj": (6, 64, 48, 3, False, 2), "down_proj": (6, 24, 64, 3, False, 2)}
#: Tiny models: their configs, where their experts lie, and each stack's E, I, O, top_k, bias and count.
MODELS: dict[str, tuple[dict[str, Any], str, dict[str, tuple[int, int, int, int, bool, int]]]] = {
    "qwen3_moe": (
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
        "mlp.experts",
        {"gate_up_proj": (6, 64, 48, 3, False, 1), "down_proj": (6, 24, 64, 3, False, 1)},
    ),
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "mlp.experts",
        {"gate_up_proj": (4, 64, 192, 2, False, 2), "down_proj": (4, 96, 64, 2, False, 2)},
    ),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        "mlp.experts",
        {"gate_up_proj": (4, 64, 192, 2, True, 2), "down_proj": (4, 96, 64, 2, True, 2)},
    ),
    "deepseek_v3": (
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
        "mlp.experts",
        {"gate_up_proj": (8, 64, 48, 3, False, 1), "down_proj": (8, 24, 64, 3, False, 1)},
    ),
    "nemotron_h": (
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 24,
            "layers_block_type": ["attention", "moe"],
        },
        "mixer.experts",
        {"up_proj": (4, 64, 24, 2, False, 1), "down_proj": (4, 24, 64, 2, False, 1)},
    ),
    "granitemoehybrid": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            **MAMBA,
            "layer_types": ["attention", "attention"],
        },
        "block_sparse_moe.experts",
        {"gate_up_proj": (4, 64, 192, 2, False, 2), "down_proj": (4, 96, 64, 2, False, 2)},
    ),
    **{
        model_type: (
            {
                **LINEAR_ATTENTION,
                "num_experts": 6,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 32,
                "head_dim": 16,
            },
            "mlp.experts",
            {"gate_up_proj": (6, 64, 48, 3, False, 2), "down_proj": (6, 24, 64, 3, False, 2)},
        )
        for model_type in ("qwen3_next", "qwen3_5_moe_text")
    },
    "glm4_moe": (
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": 16,
        },
        "mlp.experts",
        {"gate_up_proj": (4, 64, 48, 2, False, 1), "down_proj": (4, 24, 64, 2, False, 1)},
    ),
    "minimax_m2": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        "mlp.experts",
        {"gate_up_proj": (4, 64, 192, 2, False, 2), "down_proj": (4, 96, 64, 2, False, 2)},
    ),
    "ernie4_5_moe": (
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
        "mlp.experts",
        {"gate_up_proj": (4, 64, 48, 2, False, 1), "down_proj": (4, 24, 64, 2, False, 1)},
    ),
    # Every expert has all tokens, whatever the router makes of them.
    "llama4_text": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "head_dim": 16,
        },
        "feed_forward.experts",
        {"gate_up_proj": (4, 64, 192, 4, False, 1), "down_proj": (4, 96, 64, 4, False, 1)},
    ),
}
#: What is between their projections, where it is not silu(gate) * up.
ACTIVATIONS = {"gpt_oss": "gpt_oss", "nemotron_h": "relu2"}
#: Families whose experts are given rows, of which PEFT takes the matrices for transposed.
ROWS = ("llama4_text",)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(model_type: str = "mixtral", device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**{**SIZES, **MODELS[model_type][0]})
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def adapted(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def stacks(model_type: str) -> tuple[Stack, ...]:
    layout = "in_out" if model_type in ("gpt_oss", *ROWS) else "out_in"
    between = ACTIVATIONS.get(model_type, "silu_gated")
    _, module, shapes = MODELS[model_type]
    return tuple(
        Stack(name, experts, wide, out, name != "down_proj", top_k, bias, count, layout, module, between)
        for name, (experts, wide, out, top_k, bias, count) in shapes.items()
    )


def experts_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def counts(found: tuple[Stack, ...]) -> list[tuple[str, int]]:
    return [(stack.name, stack.count) for stack in found]


@pytest.mark.parametrize("model_type", MODELS)
def test_stacks_are_read_as_the_model_has_them(model_type: str) -> None:
    model = build(model_type)
    read = read_model(model)
    expected = stacks(model_type)
    assert read.architecture.offered == expected and read.architecture.stacks == ()
    on_meta = read_model(build(model_type, "meta"))
    assert on_meta.architecture == read.architecture and on_meta.left_out == read.left_out
    assert on_meta.architecture.offered == expected
    reasons = {where for where, why in read.left_out.items() if why == UNASKED}
    assert {re.sub(r".*\d\.|.*\*\.", "", where) for where in reasons} == {stack.parameter for stack in expected}
    # What the model does: as many choices a token as its router makes, of which each has a row.
    seen: list[tuple[int, ...]] = []

    def hook(_: Any, inputs: tuple[Any, ...]) -> None:
        tokens = 8
        rows = len(inputs[0]) if model_type in ROWS else inputs[1].numel()
        seen.append((inputs[0].shape[-1], rows // tokens))

    for module in experts_of(model).values():
        module.register_forward_pre_hook(hook)
    model(input_ids=torch.arange(8)[None])
    assert seen == [(expected[0].in_features, expected[0].top_k)] * expected[0].count


@pytest.mark.parametrize("model_type", MODELS)
def test_all_weights_are_taken_or_left_out_with_a_reason(model_type: str) -> None:
    """Another walk: each weight is of a linear, of a stack, or of something that is named."""
    model = build(model_type, "meta")
    read = read_model(model)
    linears: Counter[tuple[str, int, int, bool]] = Counter()
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for path, weight in model.named_parameters():
        owner, _, name = path.rpartition(".")
        left = {re.sub(r"\b\d+\b", "*", where) for where in (owner, path)} | {owner, path}
        if weight.dim() < 2 or name.endswith("_bias"):
            continue
        reasons = [why for where, why in read.left_out.items() if where in left]
        if reasons == [UNASKED]:
            found[name, tuple(weight.shape)] += 1
        elif not reasons:
            assert name == "weight" and weight.dim() == 2, path
            linear = model.get_submodule(owner)
            linears[owner.rpartition(".")[2], weight.shape[1], weight.shape[0], linear.bias is not None] += 1
        else:
            assert len(reasons) == 1 and reasons[0], path
    taken: Counter[tuple[str, int, int, bool]] = Counter()
    for p in read.architecture.projections:
        taken[p.name, p.in_features, p.out_features, p.bias] += p.count
    assert taken == linears
    assert found == {
        (stack.name, (stack.experts, *sides[:: 1 if stack.layout == "in_out" else -1])): stack.count
        for stack in read.architecture.offered
        for sides in [(stack.in_features, stack.out_features)]
    }
    described = family_projections(model.config.to_dict(), model_type)  # of few families, the linears beside experts
    assert {replace(p, input="") for p in described} <= {replace(p, input="") for p in read.architecture.projections}


@pytest.mark.parametrize("model_type", MODELS)
def test_stacks_with_adapters_are_seen_through_peft(model_type: str) -> None:
    """Each of two ranks, and PEFT's own factors have the sizes that were read."""
    first, down = expected = stacks(model_type)
    model = adapted(
        build(model_type),
        r=2,
        lora_alpha=8,
        target_modules=[],
        target_parameters=[stack.parameter for stack in expected],
        rank_pattern={down.parameter: 4},
    )
    read = read_model(model)
    assert read.architecture.stacks == expected and read.architecture.offered == ()
    assert UNASKED not in read.left_out.values()
    assert {rank: (a.projections, a.stacks) for rank, a in read.adapted.items()} == {
        2: ((), (first,)),
        4: ((), (down,)),
    }
    assert {(g.rank, g.alpha, g.scaling, g.dtype, g.stacks) for g in read.adapters} == {
        (2, 8.0, 4.0, torch.float32, (first,)),
        (4, 8.0, 2.0, torch.float32, (down,)),
    }
    ranks = {first.name: 2, down.name: 4}
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    assert len(wrappers) == first.count + down.count
    for wrapper in wrappers:
        (stack,) = (stack for stack in expected if stack.name == wrapper.parameter_name)
        rows = ranks[stack.name] * stack.experts
        sides = (stack.in_features, stack.out_features)[:: -1 if model_type in ROWS else 1]
        assert wrapper.lora_A["default"].weight.shape == (rows, sides[0])
        assert wrapper.lora_B["default"].weight.shape == (sides[1], rows)


def test_experts_beside_linears_and_in_half_precision() -> None:
    model = adapted(
        build().to(torch.bfloat16), r=4, use_rslora=True, target_modules=["q_proj"], target_parameters=BOTH[:1]
    )
    gate_up, down = stacks("mixtral")
    for wrapped in (model, torch.compile(model, backend="eager")):
        read = read_model(wrapped)
        assert {p.name for p in read.architecture.projections} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert (read.architecture.stacks, read.architecture.offered) == ((gate_up,), (down,))
        assert read.left_out["model.layers.*.mlp.experts.down_proj"] == UNASKED
        (group,) = read.adapters
        assert (group.rank, group.scaling, group.dtype) == (4, 4.0, torch.float32)
        assert ([p.name for p in group.projections], group.stacks) == (["q_proj"], (gate_up,))
        assert read.adapted[4].stacks == (gate_up,) and read.dtypes == (torch.bfloat16,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", peft.LoraConfig(r=8, target_modules=["k_proj"]))
    model.set_adapter("second")
    read = read_model(model)
    assert read.architecture.stacks == () and counts(read.architecture.offered) == [
        ("gate_up_proj", 2),
        ("down_proj", 2),
    ]
    assert list(read.adapted) == [8]


def test_layers_without_an_adapter_are_offered() -> None:
    read = read_model(adapted(build(), r=2, target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"]))
    assert counts(read.architecture.stacks) == [("down_proj", 1)]
    assert counts(read.architecture.offered) == [("gate_up_proj", 2), ("down_proj", 1)]
    assert read.left_out["model.layers.*.mlp.experts.down_proj"] == UNASKED


def test_experts_alone_are_a_model_only_where_they_have_an_adapter() -> None:
    block = build().model.layers[0].mlp
    with pytest.raises(SpecError, match=rf"no linear .*experts\.gate_up_proj: {UNASKED}"):
        read_model(block)
    wrapped = adapted(nn.ModuleDict({"mlp": block}), r=2, target_modules=[], target_parameters=BOTH)
    read = read_model(wrapped)
    assert read.architecture.projections == () and counts(read.adapted[2].stacks) == [
        ("gate_up_proj", 1),
        ("down_proj", 1),
    ]


def test_stacks_are_plain_where_linears_have_codes() -> None:
    """Of a model with linears in 8 bits, the experts are in the package for plain weights."""
    model = build()
    integrations = pytest.importorskip("transformers.integrations.finegrained_fp8")
    for layer in model.model.layers:
        with torch.device("meta"):
            layer.self_attn.q_proj = integrations.FP8Linear(64, 64, block_size=(64, 64))
    model = adapted(model, r=2, target_modules=["q_proj"], target_parameters=BOTH)
    read = read_model(model)
    assert set(read.bases) == {"fp8-block", "plain"}
    coded, plain = (read_model(model, base=base) for base in ("fp8-block", "plain"))
    assert coded.architecture.stacks == coded.architecture.offered == ()
    assert coded.left_out["model.layers.*.mlp.experts.down_proj"] == "not quantized"
    assert plain.adapted[2].stacks == stacks("mixtral") and plain.adapted[2].projections == ()


# What is left out


def parametrized(module: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())


def replaced(module: Any) -> None:
    module.forward = lambda *args: args[0]


def coded(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.data.to(torch.int8), requires_grad=False)


def float8(module: Any) -> None:
    """As Transformers puts its own in their place, with scales of 3 dimensions."""
    from transformers.integrations import finegrained_fp8, moe

    kind = type("FP8Experts", (finegrained_fp8.FP8Experts,), {})
    with torch.device("meta"):
        new = moe.use_experts_implementation(kind)(module.config, block_size=(64, 64))
    module.__class__, module.__dict__ = kind, new.__dict__


def flat(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.data[0])


def wider(module: Any) -> None:
    module.scales = nn.Parameter(torch.ones(4, 4))


def own(module: Any) -> None:
    module.__class__ = type("Own", (type(module),), {"forward": lambda self, x, *_: x})


def spread(module: Any) -> None:
    module._is_expert_parallel = True


def empty(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.data[:0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parametrized, "its weights are parametrized"),
        (replaced, "its forward was replaced"),
        (coded, "quantized (MixtralExperts)"),
        (float8, "quantized (FP8Experts)"),
        (flat, "experts without weights of 3 dimensions"),
        (wider, "experts with other weights than gate_up_proj, down_proj"),
        (own, "3-D weights of Own"),
        (spread, "its experts are on several devices"),
        (empty, "empty"),
    ],
)
def test_what_is_not_covered_is_named_with_the_reason(change: Any, reason: str) -> None:
    model = build()
    for module in experts_of(model).values():
        change(module)
    read = read_model(model)
    assert read.architecture.offered == ()
    assert read.left_out["model.layers.*.mlp.experts"] == reason


def test_adapters_on_other_parameters_are_left_out() -> None:
    model = adapted(
        build("gpt_oss"),
        r=2,
        target_modules=[],
        target_parameters=[*BOTH, "mlp.experts.down_proj_bias", "q_proj.weight"],
    )
    with pytest.raises(SpecError, match="no linear that LoRA"):
        read_model(nn.ModuleList([layer.mlp for layer in model.base_model.model.model.layers]))
    read = read_model(model)
    assert read.left_out["model.layers.*.mlp.experts"] == "has an adapter on down_proj_bias (target_parameters)"
    assert read.left_out["model.layers.*.self_attn.q_proj"] == "has an adapter on a parameter (target_parameters)"
    assert read.adapted == {}


def test_experts_trained_in_full_are_left_out() -> None:
    read = read_model(adapted(build(), r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    assert read.left_out["model.layers.*.mlp.experts"] == "trained in full (modules_to_save)"


# What is asked for


def asked(model: Any, **options: Any) -> Request:
    return read_request(model, **{"rank": 4, **options})


def test_what_is_asked_for_is_generated_for() -> None:
    model = build()
    gate_up, down = stacks("mixtral")
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    cases: list[tuple[dict[str, Any], tuple[str, ...], tuple[Stack, ...]]] = [
        ({}, linears, ()),
        ({"target_parameters": BOTH}, (), (gate_up, down)),
        ({"target_parameters": ["down_proj", "experts.gate_up_proj"]}, (), (gate_up, down)),
        ({"target_parameters": "down_proj"}, (), (down,)),
        ({"target_parameters": BOTH[:1], "target_modules": []}, (), (gate_up,)),
        ({"target_parameters": BOTH[:1], "target_modules": "all-linear"}, linears, (gate_up,)),
        ({"target_parameters": BOTH[:1], "target_modules": ["o_proj", "q_proj"]}, ("q_proj", "o_proj"), (gate_up,)),
        ({"target_modules": ["q_proj"]}, ("q_proj",), ()),
    ]
    for options, projections, wanted in cases:
        request = asked(model, **options)
        found = request.architecture
        assert (tuple(p.name for p in found.projections), found.stacks) == (projections, wanted), options
        assert request.workload.target_parameters == tuple(stack.parameter for stack in wanted)
        assert request.workload.target_modules == (() if not options or not projections else projections)
        left = {where.rpartition(".")[2] for where, why in found.left_out.items() if why == UNASKED}
        assert left == {"gate_up_proj", "down_proj"} - {stack.name for stack in wanted}


def test_of_several_ranks_each_has_what_was_asked_for_of_it() -> None:
    model = adapted(build(), r=4, target_modules=["q_proj"], target_parameters=BOTH, rank_pattern={"down_proj": 2})
    gate_up, down = stacks("mixtral")
    everything = asked(model, rank=None).by_rank
    assert {rank: ([p.name for p in a.projections], a.stacks) for rank, a in everything.items()} == {
        2: ([], (down,)),
        4: (["q_proj"], (gate_up,)),
    }
    for options, ranks in (
        ({"target_modules": ["q_proj"]}, [4]),
        ({"target_parameters": ["down_proj"]}, [2]),
        ({"target_parameters": BOTH}, [2, 4]),
    ):
        assert list(asked(model, rank=None, **options).by_rank) == ranks
    with pytest.raises(SpecError, match=r"^target_modules: 'k_proj' is not in mixtral, which has: q_proj$"):
        asked(model, rank=None, target_modules=["k_proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["mlp.gate_up_proj"]}, r"^target_parameters: 'mlp.gate_up_proj' is not in mixtral, "),
        ({"target_parameters": ["up_proj"]}, rf"which has: {', '.join(BOTH)}$"),
        ({"target_parameters": ""}, r"^target_parameters: '' is not in "),
        ({"target_parameters": BOTH, "target_modules": ["w1"]}, r"^target_modules: 'w1' is not in mixtral"),
        ({"target_parameters": BOTH, "rank": 65}, r"--rank: 65 is above min\(in, out\) of gate_up_proj \(64x192\)"),
        ({"target_parameters": BOTH, "base": "nf4"}, r"^--base: nf4 is of linears alone, not of experts"),
        ({"target_parameters": BOTH, "bias": "all"}, r"^--bias: all needs a linear that has one"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        asked(build(), **options)
    assert str(caught.value).isprintable()


def test_biases_of_experts_may_train() -> None:
    request = asked(build("gpt_oss"), target_parameters=BOTH, bias="all")
    assert request.workload.bias == "all" and all(stack.bias for stack in request.architecture.stacks)
