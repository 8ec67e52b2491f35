"""Configs without a data file: read from Transformers' model on the meta device, or refused on one line."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.from_model import meta
from runlora_gen.request import architecture as module
from runlora_gen.request.architecture import Architecture, load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import UNASKED, Stack

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
LLAMA = {"model_type": "llama", **SIZES}
needs_transformers = pytest.mark.skipif(not meta.is_installed(), reason="needs torch and transformers")


def read(folder: Path, config: object, **options: Any) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_architecture(str(folder), others=meta, **options)


def error_of(folder: Path, config: object, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        read(folder, config, **options)
    message = str(caught.value)
    assert message.isprintable() and message.startswith("config.json: "), message
    return message


def names(architecture: Architecture) -> dict[str, tuple[int, int, int]]:
    return {p.name: (p.in_features, p.out_features, p.count) for p in architecture.projections}


ATTENTION = {"q_proj": (64, 64, 2), "k_proj": (64, 32, 2), "v_proj": (64, 32, 2), "o_proj": (64, 64, 2)}
GATED = {"gate_proj": (64, 96, 2), "up_proj": (64, 96, 2), "down_proj": (96, 64, 2)}


@needs_transformers
def test_a_family_without_a_data_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = {"auto_map": {"AutoModel": "evil--code.Model"}, "quantization_config": {"quant_method": "awq"}}
    # What makes Transformers look for packages or code stays out; what it warns of is not heard.
    odd = {"_attn_implementation": "flash_attention_2", "torch_dtype": "no dtype", "rope_scaling": {"type": "linear"}}
    architecture = read(tmp_path, {"model_type": "mixtral", **SIZES, "num_local_experts": 4, **remote})
    assert (architecture.model_type, architecture.source) == ("mixtral", f"{tmp_path.name}/config.json")
    assert names(architecture) == ATTENTION
    assert architecture.left_out == {
        "embed_tokens": "embedding",
        "layers.*.mlp.gate": "2-D parameters of MixtralTopKRouter, which is no linear",
        "layers.*.mlp.experts.gate_up_proj": UNASKED,
        "layers.*.mlp.experts.down_proj": UNASKED,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(read(tmp_path, {"model_type": "arcee", **SIZES, **odd, "rope_scaling": None})) == {
            **ATTENTION,
            "up_proj": (64, 96, 2),
            "down_proj": (96, 64, 2),
        }
    assert capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == 0


@needs_transformers
@pytest.mark.parametrize(("model_type", "layout"), [("mixtral", "out_in"), ("gpt_oss", "in_out")])
def test_experts_of_a_config_are_offered(tmp_path: Path, model_type: str, layout: str) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 16}
    architecture = read(tmp_path, {"model_type": model_type, **SIZES, **experts})
    shape = {"experts": 4, "top_k": 3, "bias": layout == "in_out", "count": 2, "layout": layout}
    shape["activation"] = "gpt_oss" if model_type == "gpt_oss" else "silu_gated"
    assert architecture.stacks == ()
    assert architecture.offered == (
        Stack("gate_up_proj", in_features=64, out_features=192, gathers=True, module="mlp.experts", **shape),
        Stack("down_proj", in_features=96, out_features=64, gathers=False, module="mlp.experts", **shape),
    )


def test_the_text_model_is_entered(tmp_path: Path) -> None:
    vision = {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32}}
    text = {"model_type": "mistral", **SIZES}
    architecture = read(tmp_path, {"model_type": "mistral3", "text_config": text, **vision})
    assert names(architecture) == ATTENTION | GATED
    assert architecture.model_type == "mistral"
    assert architecture.left_out == {"vision_config": "not of the text model"}
    # Gemma 3's published files leave the heads to the defaults; other files leave the text's type.
    partial = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    for kind in ({"model_type": "gemma3_text"}, {}):
        architecture = read(tmp_path, {"model_type": "gemma3", "text_config": {**partial, **kind}, **vision})
        assert names(architecture)["q_proj"] == (64, 2048, 2)
        assert architecture.model_type == "gemma3_text"
    said = error_of(tmp_path, {"model_type": "mistral3", "text_config": {**text, "hidden_size": "64"}})
    assert said.startswith("config.json: text_config: hidden_size = '64'")
    for own in (["mistral3"], 7, None):
        assert names(read(tmp_path, {"model_type": own, "text_config": text})) == ATTENTION | GATED


@needs_transformers
def test_the_text_model_of_other_families_is_entered(tmp_path: Path) -> None:
    llama4 = {
        "model_type": "llama4",
        "text_config": {**SIZES, "head_dim": 16, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
        "vision_config": {"hidden_size": 32},
    }
    architecture = read(tmp_path, llama4)
    assert names(architecture)["k_proj"] == (64, 32, 2)
    # Every expert has all tokens.
    assert [(stack.name, stack.experts, stack.top_k) for stack in architecture.offered] == [
        ("gate_up_proj", 16, 16),
        ("down_proj", 16, 16),
    ]
    assert architecture.left_out["vision_config"] == "not of the text model"
    flat = {"model_type": "qwen2_5_vl", **SIZES, "vision_config": {"depth": 1}}
    architecture = read(tmp_path, flat)
    assert names(architecture) == ATTENTION | GATED
    assert architecture.left_out == {"embed_tokens": "embedding", "vision_config": "not of the text model"}
    # Llava's files leave even the sizes to the defaults of their text's type.
    llava = {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 2}}
    assert names(read(tmp_path, llava))["down_proj"] == (11008, 4096, 2)


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_without_transformers_it_is_said_that_it_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    real = meta.importlib.util.find_spec
    monkeypatch.setattr(meta.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    said = error_of(tmp_path, {**LLAMA, "model_type": "mixtral"})
    assert said.startswith("config.json: model_type = 'mixtral': expected one of bert, ")
    assert said.endswith("; with torch and transformers installed other families can be read, too")


@needs_transformers
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "64\x1b[2J"}, "Transformers builds no 'mixtral' of it: "),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: expected at most 10000"),
        ({"layer_types": [10**9]}, "layer_types = 1000000000: expected at most 10000"),
        ({"anything": {"deep": [{"max_position_embeddings": 10**12}]}}, "max_position_embeddings = 1000000000000"),
        ({"num_attention_heads": 0}, "Transformers builds no 'mixtral' of it: "),
        ({"hidden_size": -64}, "Transformers builds no 'mixtral' of it: "),
        ({"hidden_size": 2_000_000}, "q_proj in_features = 2000000: expected an integer from 1 to 1048576"),
        ({"num_local_experts": 2**17}, "gate_up_proj experts = 131072: expected an integer from 1 to 65536"),
        ({"num_experts_per_tok": 2000}, "gate_up_proj top_k = 2000: expected an integer from 1 to 1024"),
        ({"rope_parameters": "x" * 10_000}, "Transformers builds no 'mixtral' of it: "),
        ({"hidden_act": "__import__('os')"}, "Transformers builds no 'mixtral' of it: "),
    ],
    ids=["text", "layers", "list", "deep", "zero", "negative", "wide", "experts", "choices", "long", "code"],
)
def test_hostile_configs_are_refused_on_one_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    message = error_of(tmp_path, {"model_type": "mixtral", **SIZES, **change})
    assert said in message and len(message) <= 500


@needs_transformers
def test_models_of_too_many_modules_or_seconds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_MODULES", "MAX_SECONDS"):
        with monkeypatch.context() as patch:
            patch.setattr(meta, limit, -1)
            assert "more than " in error_of(tmp_path, {"model_type": "mixtral", **SIZES})
    assert not sys.modules["torch"].nn.modules.module._global_module_registration_hooks


@needs_transformers
def test_models_are_built_offline_without_weights_and_remote_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers
    from huggingface_hub import constants

    def build(config: Any, **options: Any) -> None:
        assert constants.is_offline_mode() and torch.get_default_device().type == "meta"
        assert not hasattr(config, "auto_map") and not hasattr(config, "quantization_config")
        assert options == {"trust_remote_code": False, "attn_implementation": "eager"}
        torch.rand(1, device="cpu")
        raise ImportError("no such\nbackbone")

    monkeypatch.setattr(transformers.AutoModel, "from_config", build)
    former, state = constants.HF_HUB_OFFLINE, torch.random.get_rng_state()
    remote = {"auto_map": {"AutoModel": "evil--code.Model"}, "quantization_config": {"quant_method": "awq"}}
    said = error_of(tmp_path, {"model_type": "mixtral", **SIZES, **remote})
    assert said == "config.json: Transformers builds no 'mixtral' of it: ImportError: no such backbone"
    assert former == constants.HF_HUB_OFFLINE and torch.equal(torch.random.get_rng_state(), state)


# A model type by request


GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
BERT = {"model_type": "bert", **SIZES, "num_key_value_heads": None}


@pytest.mark.parametrize(
    ("config", "asked", "said"),
    [
        (GPT2, "llama", "n_layer = 2: a field of gpt2, whose layers llama doesn't have"),
        ({**GPT2, "model_type": None}, None, "n_layer = 2: a field of gpt2, whose layers llama doesn't have"),
        (BERT, "llama", "model_type = 'bert': its layers are not llama's: there are no 2 q_proj of 64x64 without a"),
        ({**LLAMA, "model_type": "own"}, "bert", "num_key_value_heads = 2: a field of gemma, "),
        ({**LLAMA, "model_type": "own", "ffn_dim": 96}, "llama", "ffn_dim = 96: a field of opt"),
        ({**LLAMA, "model_type": "own", "use_bias": True}, "llama", "use_bias = True: a field of starcoder2"),
        ({**LLAMA, "model_type": "own", "attention_bias": False}, "qwen2", "attention_bias = False: a field of "),
        ({**LLAMA, "model_type": "own", "num_experts": 8}, "qwen3", "num_experts = 8: stands for experts"),
        ({**LLAMA, "model_type": "own", "kv_lora_rank": 8}, "llama", "stands for latent attention, which llama"),
        ({**LLAMA, "model_type": "qwen2"}, "llama", "its layers are not llama's"),
    ],
)
def test_a_request_invents_no_model(tmp_path: Path, config: dict[str, object], asked: str | None, said: str) -> None:
    assert said in error_of(tmp_path, config, model_type=asked)


def test_what_is_alike_is_read_by_request(tmp_path: Path) -> None:
    for config, asked in (
        ({**LLAMA, "model_type": "own", "attention_bias": False, "use_bias": False}, "llama"),
        ({**LLAMA, "model_type": "mistral"}, "llama"),
        ({**LLAMA, "model_type": "own", "attention_bias": True}, "qwen2"),
        ({**LLAMA, "num_experts": 0}, "mistral"),
        ({"model_type": "wrapper", "text_config": {**LLAMA, "model_type": "own"}, "vision_config": {}}, "llama"),
    ):
        architecture = read(tmp_path, config, model_type=asked)
        assert (architecture.model_type, names(architecture)) == (asked, ATTENTION | GATED)


@needs_transformers
def test_a_request_is_held_against_what_transformers_knows(tmp_path: Path) -> None:
    # Arcee's fields are Llama's, but its MLP has no gate.
    said = error_of(tmp_path, {**LLAMA, "model_type": "arcee"}, model_type="llama")
    assert "model_type = 'arcee': its layers are not llama's: there are no 2 gate_proj of 64x96" in said
    assert read(tmp_path, {**LLAMA, "model_type": "ministral", "head_dim": 16}, model_type="llama")
    # And the other way about: a type without a data file.
    config = {**SIZES, "num_local_experts": 4, "model_type": "own"}
    assert names(read(tmp_path, config, model_type="mixtral")) == ATTENTION
    # The same attention, but no experts, or others.
    experts = {**SIZES, "num_local_experts": 4, "head_dim": 16}
    for own in ("olmo", "qwen3_moe"):
        said = error_of(tmp_path, {**experts, "model_type": own}, model_type="mixtral")
        assert f"model_type = '{own}': its experts are not mixtral's" in said
    assert read(tmp_path, {**experts, "model_type": "phimoe"}, model_type="mixtral")
    assert "its layers are not mamba's" in error_of(tmp_path, LLAMA, model_type="mamba")
    assert "model_type = 'nothing': expected one of bert" in error_of(tmp_path, LLAMA, model_type="nothing")


def test_nothing_is_imported_that_a_config_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    code = (
        "import sys; from runlora_gen.request.architecture import load_architecture;"
        "from runlora_gen.from_model import meta; import runlora_gen.cli;"
        f"load_architecture({str(tmp_path)!r}, others=meta);"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    root = str(Path(module.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
