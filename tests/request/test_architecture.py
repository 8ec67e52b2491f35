"""Architectures: the catalogue, the families, real configs and hostile ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runlora_gen.request import architecture as module
from runlora_gen.request import files
from runlora_gen.request.architecture import (
    Architecture,
    Projection,
    architecture_names,
    load_architecture,
)
from runlora_gen.request.errors import SpecError, shorten

DATA = Path(module.__file__).parent
FAMILY_FILES = sorted((DATA / "families").glob("*.toml"))

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def write(folder: Path, config: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def error_of(name_or_path: str, *, model_type: str | None = None) -> str:
    """Return the message of the SpecError, after the checks that hold for every one."""
    with pytest.raises(SpecError) as caught:
        load_architecture(name_or_path, model_type=model_type)
    message = str(caught.value)
    assert message.isprintable(), message  # so it is one line, and no terminal is steered by it
    assert len(message) < 400
    return message


def find(architecture: Architecture, name: str) -> Projection:
    (found,) = (p for p in architecture.projections if p.name == name)
    return found


def check_invariants(architecture: Architecture) -> None:
    assert architecture.projections
    assert architecture.slug.isidentifier()
    shared: dict[str, tuple[int, int]] = {}
    for projection in architecture.projections:
        for size in (projection.in_features, projection.out_features, projection.count):
            assert type(size) is int
            assert 1 <= size <= 1_048_576
        assert type(projection.bias) is bool
        assert projection.layout in ("out_in", "in_out")
        read = (projection.in_features, projection.count)
        assert shared.setdefault(projection.input, read) == read


# The data files


@pytest.mark.parametrize("file", FAMILY_FILES, ids=lambda file: file.stem)
def test_family_file_is_sound(file: Path) -> None:
    family = module._load_family(file)
    assert family.model_types
    known: set[str] = set()
    for symbol, size in family.sizes.items():
        used = [*size.product, *size.quotient]
        used += size.default if isinstance(size.default, dict) else []
        assert set(used) <= known, f"{symbol} refers to sizes that come later"
        assert size.fields or size.product
        assert len(size.product) in (0, 2)
        assert len(size.quotient) in (0, 2)
        known.add(symbol)
    assert "layers" in known
    assert all(set(pair) <= known and len(pair) == 2 for pair in family.multiples)
    for rule in family.projections:
        assert {*rule.in_features, *rule.out_features, *rule.if_different} <= known
        assert isinstance(rule.bias, bool) or rule.bias in family.flags


def test_each_model_type_belongs_to_one_family() -> None:
    served = [name for file in FAMILY_FILES for name in module._load_family(file).model_types]
    assert len(served) == len(set(served))


@pytest.mark.parametrize("name", architecture_names())
def test_catalogue_entry_loads(name: str) -> None:
    architecture = load_architecture(name)
    check_invariants(architecture)
    assert architecture.name == name
    assert architecture.source == "catalogue"
    assert load_architecture(name.upper()) == architecture
    table = tomllib.loads((DATA / "architectures" / f"{name}.toml").read_text(encoding="utf-8"))
    assert table["source"], "say where the numbers come from"
    assert table["model_type"] == architecture.model_type


def test_catalogue_slugs_are_distinct() -> None:
    names = architecture_names()
    assert len({load_architecture(name).slug for name in names}) == len(names)
    assert list(names) == sorted(names)
    assert load_architecture("llama-3.1-405b").slug == "llama_3_1_405b"


@pytest.mark.parametrize(
    ("name", "projection", "expected"),
    [  # in_features, out_features, bias, count
        ("llama-13b", "q_proj", (5120, 5120, False, 40)),
        ("llama-13b", "gate_proj", (5120, 13824, False, 40)),
        ("llama-13b", "down_proj", (13824, 5120, False, 40)),
        ("llama-1.3b", "up_proj", (2048, 5461, False, 24)),
        ("llama-2-70b", "v_proj", (8192, 1024, False, 80)),
        ("llama-3-8b", "k_proj", (4096, 1024, False, 32)),
        ("llama-3.1-405b", "gate_proj", (16384, 53248, False, 126)),
        ("llama-3.2-1b", "k_proj", (2048, 512, False, 16)),
        ("llama-3.2-3b", "q_proj", (3072, 3072, False, 28)),
        ("mistral-7b", "v_proj", (4096, 1024, False, 32)),
        ("qwen2.5-7b", "q_proj", (3584, 3584, True, 28)),
        ("qwen2.5-7b", "k_proj", (3584, 512, True, 28)),
        ("qwen2.5-7b", "v_proj", (3584, 512, True, 28)),
        ("qwen2.5-7b", "o_proj", (3584, 3584, False, 28)),
        ("qwen2.5-7b", "gate_proj", (3584, 18944, False, 28)),
        ("qwen3-32b", "q_proj", (5120, 8192, False, 64)),
        ("qwen3-32b", "o_proj", (8192, 5120, False, 64)),
        ("gemma-2-9b", "q_proj", (3584, 4096, False, 42)),
        ("gemma-2-9b", "k_proj", (3584, 2048, False, 42)),
        ("gemma-2-9b", "o_proj", (4096, 3584, False, 42)),
        ("phi-3-mini", "qkv_proj", (3072, 9216, False, 32)),
        ("phi-3-mini", "gate_up_proj", (3072, 16384, False, 32)),
        ("phi-3-mini", "down_proj", (8192, 3072, False, 32)),
        ("gpt2", "c_attn", (768, 2304, True, 12)),
        ("gpt2", "c_fc", (768, 3072, True, 12)),
        ("opt-350m", "project_in", (512, 1024, False, 1)),
        ("opt-350m", "project_out", (1024, 512, False, 1)),
        ("opt-350m", "fc1", (1024, 4096, True, 24)),
        ("roberta-large", "query", (1024, 1024, True, 24)),
        ("vit-base", "v_proj", (768, 768, True, 12)),
    ],
)
def test_published_shape(name: str, projection: str, expected: tuple[int, int, bool, int]) -> None:
    found = find(load_architecture(name), projection)
    assert (found.in_features, found.out_features, found.bias, found.count) == expected


@pytest.mark.parametrize(
    ("name", "projection", "shapes"),
    [
        ("gpt2", "c_proj", [(768, 768), (3072, 768)]),
        ("roberta-base", "dense", [(768, 768), (768, 3072), (3072, 768)]),
    ],
)
def test_projections_may_share_a_name(name: str, projection: str, shapes: list[tuple[int, int]]) -> None:
    kept = load_architecture(name).restricted([projection]).projections
    assert [(p.in_features, p.out_features) for p in kept] == shapes
    assert len({p.input for p in kept}) == len(kept)


def test_only_gpt2_stores_its_weights_transposed() -> None:
    for name in architecture_names():
        layouts = {p.layout for p in load_architecture(name).projections}
        assert layouts == ({"in_out"} if name == "gpt2" else {"out_in"})


def test_parameter_count_of_llama_7b() -> None:
    layers = sum(p.in_features * p.out_features * p.count for p in load_architecture("llama-7b").projections)
    assert layers == 6_476_005_376  # 6.74 billion less embeddings, head and norms


# Architecture


def test_restricted_keeps_the_order_of_the_model() -> None:
    architecture = load_architecture("llama-13b").restricted(["v_proj", "q_proj", "v_proj"])
    assert [p.name for p in architecture.projections] == ["q_proj", "v_proj"]
    assert architecture.name == "llama-13b"


def test_restricted_refuses_unknown_and_empty() -> None:
    architecture = load_architecture("gpt2")
    with pytest.raises(SpecError, match=r"'q_proj' is not in gpt2.*c_attn, c_proj, c_fc$"):
        architecture.restricted(["c_attn", "q_proj"])
    with pytest.raises(SpecError, match="empty"):
        architecture.restricted([])


@pytest.mark.parametrize(
    ("folder", "slug"),
    [
        ("My Model (v2)", "my_model_v2"),
        ("7b", "model_7b"),
        ("class", "model_class"),
        ("модель", "model"),
        ("a..b{{ 7*7 }}", "a_b_7_7"),
        ("x\n\x1b[31m`rm`\"'", "x_31m_rm"),
        ("n" * 200, "n" * 64),
    ],
)
def test_folder_names_yield_clean_names(tmp_path: Path, folder: str, slug: str) -> None:
    architecture = load_architecture(write(tmp_path / folder, LLAMA))
    assert architecture.name == architecture.slug == slug
    assert architecture.source.endswith("/config.json")
    assert architecture.source.isascii()
    assert not set(architecture.source) & set("\n\x1b`\"'{} ")
    assert ".." not in architecture.source


# Paths


def test_folder_file_and_relative_path_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "My-Model", LLAMA)
    expected = load_architecture(folder)
    assert (expected.name, expected.source) == ("my_model", "My-Model/config.json")
    assert load_architecture(f"{folder}/config.json") == expected
    monkeypatch.chdir(folder)
    assert load_architecture(".") == expected
    assert load_architecture("config.json") == expected


def test_other_file_names_give_the_name(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8-sig")  # with a byte order mark
    assert load_architecture(str(path)).name == "tiny"


def test_linked_config_is_named_after_the_link(tmp_path: Path) -> None:
    write(tmp_path / "blobs", LLAMA)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "blobs" / "config.json")
    assert load_architecture(str(tmp_path / "snapshot")).name == "snapshot"


def test_catalogue_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gpt2", LLAMA)
    monkeypatch.chdir(tmp_path)
    assert load_architecture("gpt2").model_type == "gpt2"
    assert load_architecture("./gpt2").model_type == "llama"


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("llama13b", ["did you mean llama-13b?", "runlora-gen archs"]),
        ("Lama-13B", ["did you mean llama-13b?"]),
        ("zzzzzz", ["unknown architecture 'zzzzzz'", "runlora-gen archs"]),
        ("", ["unknown architecture ''"]),
        ("x" * 100_000, ["unknown architecture"]),
        ("a\x1b[2Jb\n`{{", ["unknown architecture"]),
        ("nul\0", ["unknown architecture"]),
        ("surrogate\ud800", ["unknown architecture"]),
        ("missing/model", ["no such file or folder"]),
        ("missing.JSON", ["'missing.JSON': no such file or folder"]),
        ("/dev/zero", ["zero: not a regular file"]),
        ("/dev/null", ["null: not a regular file"]),
    ],
)
def test_unknown_names_and_missing_paths(argument: str, parts: list[str]) -> None:
    message = error_of(argument)
    assert all(part in message for part in parts), message


# Families, each with a config as found in the wild

COMMON = {
    "_name_or_path": "x/y",
    "architectures": ["SomeModelForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "vocab_size": 32000,
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "pretraining_tp": 1,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]


RealConfig = tuple[str, dict[str, Any], list[str], dict[str, tuple[int, int]]]
REAL_CONFIGS: list[RealConfig] = [
    ("llama", {**DECODER, "head_dim": None}, [], {"k_proj": (64, 32), "o_proj": (64, 64)}),
    (
        "llama",
        {**DECODER, "head_dim": 8, "attention_bias": True, "num_key_value_heads": None},
        QKVO,
        {"k_proj": (64, 32), "o_proj": (32, 64)},
    ),
    ("granite", {**DECODER, "mlp_bias": True}, GATED, {"down_proj": (96, 64)}),
    ("mistral", {**DECODER, "sliding_window": None, "head_dim": 24}, [], {"v_proj": (64, 48)}),
    ("qwen2", {**DECODER, "use_sliding_window": False}, QKVO[:3], {"k_proj": (64, 32)}),
    *((name, DECODER, QKVO[:3], {"k_proj": (64, 32)}) for name in ("qwen2_vl_text", "qwen2_5_vl_text")),
    ("qwen3", {**DECODER, "attention_bias": True}, QKVO, {"q_proj": (64, 512)}),
    ("gemma", {**DECODER, "head_dim": 32}, [], {"k_proj": (64, 64)}),
    ("gemma2", {**DECODER, "final_logit_softcapping": 30.0}, [], {"q_proj": (64, 1024)}),
    ("gemma3_text", {**DECODER, "head_dim": 8}, [], {"o_proj": (32, 64)}),
    ("olmo", {**DECODER, "clip_qkv": None}, [], {"k_proj": (64, 32)}),
    ("olmo2", {**DECODER, "attention_bias": True}, QKVO, {"k_proj": (64, 32)}),
    (
        "starcoder2",
        {**DECODER, "use_bias": True},
        [*QKVO, "c_fc", "c_proj"],
        {"c_fc": (64, 96), "c_proj": (96, 64)},
    ),
    ("phi3", DECODER, [], {"qkv_proj": (64, 128), "gate_up_proj": (64, 192)}),
    (
        "gpt2",
        {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_inner": None, "n_ctx": 1024},
        ["c_attn", "c_fc", "c_proj"],
        {"c_attn": (64, 192), "c_fc": (64, 256)},
    ),
    (
        "gpt2",
        {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_inner": 80},
        ["c_attn", "c_fc", "c_proj"],
        {"c_fc": (64, 80)},
    ),
    (
        "opt",
        {**ENCODER, "ffn_dim": 128, "word_embed_proj_dim": 32},
        [*QKVO[:3], "out_proj", "fc1", "fc2"],
        {"project_in": (32, 64), "fc2": (128, 64)},
    ),
    ("opt", {**ENCODER, "ffn_dim": 128, "enable_bias": False}, [], {"fc1": (64, 128)}),
    *(
        (name, ENCODER, ["query", "key", "value", "dense"], {"query": (64, 64)})
        for name in ("bert", "camembert", "electra", "roberta", "xlm-roberta")
    ),
    ("vit", {**ENCODER, "qkv_bias": False, "patch_size": 16}, ["o_proj", "fc1", "fc2"], {"k_proj": (64, 64)}),
]


@pytest.mark.parametrize(("model_type", "config", "biased", "shapes"), REAL_CONFIGS)
def test_family_reads_a_real_config(
    tmp_path: Path,
    model_type: str,
    config: dict[str, object],
    biased: list[str],
    shapes: dict[str, tuple[int, int]],
) -> None:
    folder = write(tmp_path / "m", {**COMMON, **config, "model_type": model_type})
    architecture = load_architecture(folder)
    check_invariants(architecture)
    assert architecture.model_type == model_type
    assert {p.name for p in architecture.projections if p.bias} == set(biased)
    for name, shape in shapes.items():
        found = find(architecture, name)
        assert (found.in_features, found.out_features) == shape
    assert {p.count for p in architecture.projections} <= {1, 3}
    assert any(p.name == "project_in" for p in architecture.projections) == ("word_embed_proj_dim" in config)


def test_every_model_type_is_tried_above() -> None:
    """Those with more than linears are read elsewhere: tests/from_model/test_live.py."""
    assert {case[0] for case in REAL_CONFIGS} == set(module._whole_families())


# Model types


@pytest.mark.parametrize("absent", [{}, {"model_type": None}])
def test_no_model_type_is_read_as_llama(tmp_path: Path, absent: dict[str, None]) -> None:
    config = {name: value for name, value in LLAMA.items() if name != "model_type"}
    architecture = load_architecture(write(tmp_path / "m", {**config, **absent}))
    assert architecture.model_type == "llama"
    del config["intermediate_size"]
    message = error_of(write(tmp_path / "m", {**config, **absent}))
    assert "config.json: missing field intermediate_size (no model_type, so read as" in message


def test_model_type_can_be_overridden(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {**LLAMA, "model_type": "brand_new", "num_key_value_heads": 2})
    message = error_of(folder)
    assert "config.json: model_type = 'brand_new': expected one of bert, " in message
    assert "--model-type NAME" in message
    architecture = load_architecture(folder, model_type="qwen2")
    assert architecture.model_type == "qwen2"
    assert find(architecture, "q_proj").bias
    assert "expected one of bert" in error_of(folder, model_type="no\nsuch")


@pytest.mark.parametrize(
    "model_type",
    [
        "LLAMA",
        "",
        7,
        True,
        ["llama"],
        {"llama": 1},
        "llama\nimport os",
        "../../etc",
        "`id`",
        "{{ 7 * 7 }}",
        "\x1b[31mred",
        "\"'\\",
        "\u202eevil",
        "\ud800",
        "x" * 10_000,
    ],
)
def test_other_model_types_are_refused(tmp_path: Path, model_type: object) -> None:
    message = error_of(write(tmp_path / "m", {**LLAMA, "model_type": model_type}))
    assert message.startswith("config.json: model_type = ")


# Hostile values and files


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_size": "64"}, ["hidden_size = '64'", "integer from 1 to 1048576"]),
        ({"hidden_size": True}, ["hidden_size = True"]),
        ({"hidden_size": 64.0}, ["hidden_size = 64.0"]),
        ({"hidden_size": [64]}, ["hidden_size = [64]"]),
        ({"hidden_size": 0}, ["hidden_size = 0"]),
        ({"hidden_size": -64}, ["hidden_size = -64"]),
        ({"hidden_size": 10**12}, ["hidden_size = 1000000000000"]),
        ({"hidden_size": 10**99}, ["hidden_size = 1000"]),
        ({"hidden_size": None}, ["missing field hidden_size", "integer from 1"]),
        ({"hidden_size": 65}, ["hidden_size = 65", "num_attention_heads = 4 without head_dim"]),
        ({"num_hidden_layers": 10_001}, ["num_hidden_layers", "from 1 to 10000"]),
        ({"num_attention_heads": 65_537}, ["num_attention_heads", "from 1 to 65536"]),
        (
            {"num_key_value_heads": 3},
            ["num_attention_heads = 4", "multiple of num_key_value_heads = 3"],
        ),
        ({"num_key_value_heads": 8}, ["multiple of num_key_value_heads = 8"]),
        ({"head_dim": 1_048_576}, ["num_attention_heads * head_dim = 4194304"]),
        ({"attention_bias": 1}, ["attention_bias = 1", "true or false"]),
        ({"mlp_bias": "false"}, ["mlp_bias = 'false'"]),
        (
            {"model_type": "phi3", "intermediate_size": 1_000_000},
            ["gate_up_proj out_features = 2000000"],
        ),
        ({"model_type": "gpt2", "hidden_size": 66}, ["hidden_size = 66", "must be a multiple"]),
        ({"model_type": "bert", "hidden_size": 66}, ["hidden_size = 66", "must be a multiple"]),
        ({"model_type": "mistral"}, ["missing field num_key_value_heads"]),
        ({"model_type": "gpt2", "hidden_size": None}, ["missing field n_embd or hidden_size"]),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: dict[str, object], parts: list[str]) -> None:
    message = error_of(write(tmp_path / "m", {**LLAMA, **change}))
    assert message.startswith("config.json: ")
    assert str(tmp_path) not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not valid JSON"),
        (b"hidden_size: 64", "not valid JSON"),
        (b'{"hidden_size": 64,', "not valid JSON"),
        (b'{"a": "\x1b[31m"}', "not valid JSON"),
        (b"[]", "expected a JSON object, found []"),
        (b'"text"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"{}", "missing field num_hidden_layers"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": "\xff\xfe"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 1000 + b"]" * 1000, ""),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"hidden_size":' + b"[" * 900 + b"]" * 900 + b"}", ""),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, data: bytes, part: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    message = error_of(str(tmp_path))
    assert message.startswith("config.json: ")
    assert part in message


def test_duplicate_keys_are_read_as_json_does(tmp_path: Path) -> None:
    text = json.dumps(LLAMA).replace("{", '{"hidden_size": "x", ', 1)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert find(load_architecture(str(tmp_path)), "q_proj").in_features == 64


def test_folders_without_a_readable_config(tmp_path: Path) -> None:
    assert "holds no readable config.json" in error_of(str(tmp_path))
    (tmp_path / "config.json").mkdir()
    assert error_of(str(tmp_path)) == "config.json: not a regular file"
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    assert "cannot be read" in error_of(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert error_of(str(tmp_path)) == "config.json: not a regular file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / "config.json").chmod(0)
    assert "cannot be read" in error_of(str(tmp_path))


def test_a_failing_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, LLAMA)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/config.json")

    monkeypatch.setattr(files, "open", fail, raising=False)
    assert error_of(str(tmp_path)) == "config.json: cannot be read: Permission denied"


SIZE_FIELDS = {name for family in module._families().values() for size in family.sizes.values() for name in size.fields}
FLAG_FIELDS = {name for family in module._families().values() for flag in family.flags.values() for name in flag.fields}
GOOD = st.sampled_from([1, 2, 4, 8, 64, 128, 1024, 65_536])
NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 1 << 21),
    st.floats(),
    st.text(max_size=80),
    st.sampled_from(["\n", "\x1b[0m", "{{ x }}", "`id`", "../..", 10**12, 10**90]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.one_of(st.sampled_from(sorted(module._families())), NASTY),
    good=st.fixed_dictionaries(dict.fromkeys(sorted(SIZE_FIELDS), GOOD)),
    nasty=st.dictionaries(st.sampled_from(sorted(SIZE_FIELDS | FLAG_FIELDS)), NASTY, max_size=3),
)
def test_any_config_gives_an_architecture_or_one_line(
    tmp_path: Path, model_type: object, good: dict[str, int], nasty: dict[str, object]
) -> None:
    folder = write(tmp_path / "m", {"model_type": model_type, **good, **nasty})
    try:
        architecture = load_architecture(folder)
    except SpecError as error:
        assert str(error).isprintable()
        assert str(error).startswith("config.json: ")
    else:
        check_invariants(architecture)
        assert architecture.model_type in module._families()


@settings(max_examples=200, deadline=None)
@given(name=st.text())
def test_any_name_yields_a_package_name(name: str) -> None:
    slug = Architecture(name, "llama", "catalogue", ()).slug
    assert slug.isidentifier()
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    assert not slug[0].isdigit()


@settings(max_examples=200, deadline=None)
@given(value=st.one_of(NASTY, st.binary(), st.recursive(NASTY, st.lists, max_leaves=30)))
def test_shorten_is_short_and_printable(value: object) -> None:
    text = shorten(value)
    assert text.isprintable()
    assert 0 < len(text) <= 60


def test_shorten_survives_what_python_cannot_print() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shorten(deep)) <= 60
    assert shorten(10**5000) == "<int>"
    assert shorten("a\nb") == r"'a\nb'"


def test_an_architecture_needs_no_torch() -> None:
    code = (
        "import sys; from runlora_gen.request.architecture import load_architecture;"
        "load_architecture('llama-13b'); assert 'torch' not in sys.modules"
    )
    root = str(DATA.parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
