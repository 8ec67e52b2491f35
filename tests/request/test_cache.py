"""The local Hugging Face cache: found where its variables say, and nothing but a revision is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.cache import hub_folder, is_model_name, own_folder
from runlora_gen.request.errors import SpecError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
MODEL = "meta-llama/Llama-3.1-8B"
REVISION = "0e9e39f249a16976918f6564b8830bc894c89659"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, laid out as the hub's own client does."""
    hub = tmp_path / "hub"
    folder = hub / "models--meta-llama--Llama-3.1-8B"
    for part in ("refs", "blobs", f"snapshots/{REVISION}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "blobs" / "abc").write_text(json.dumps(LLAMA))
    (folder / "snapshots" / REVISION / "config.json").symlink_to("../../blobs/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    return hub


def error_of(name: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_architecture(name)
    return str(caught.value)


def test_a_cached_model_is_read(hub: Path) -> None:
    architecture = load_architecture(MODEL)
    assert (architecture.name, architecture.slug, architecture.source) == ("llama_3_1_8b", "llama_3_1_8b", MODEL)
    assert architecture.projections[0].in_features == 64


def test_a_path_that_exists_comes_first(hub: Path) -> None:
    here = hub.parent / "meta-llama" / "Llama-3.1-8B"
    here.mkdir(parents=True)
    (here / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 32}))
    architecture = load_architecture(MODEL)
    assert architecture.projections[0].in_features == 32
    assert architecture.source == "Llama-3.1-8B/config.json"


def test_what_is_not_there_is_said_with_the_folder(hub: Path) -> None:
    said = error_of("meta-llama/Llama-9")
    assert said == (
        "'meta-llama/Llama-9': no such file or folder, and no model of that name in the Hugging Face cache " + str(hub)
    )
    (hub / f"models--meta-llama--Llama-3.1-8B/snapshots/{REVISION}/config.json").unlink()
    assert f"the Hugging Face cache {hub} holds no config.json of its main revision" in error_of(MODEL)


@pytest.mark.parametrize("revision", ["", "../../..", "..", "x/y", "a\0b", "\xff", "x" * 300])
def test_a_revision_is_the_name_of_one_folder(hub: Path, revision: str) -> None:
    (hub / "config.json").write_text(json.dumps(LLAMA))  # where such a revision would lead
    (hub / "models--meta-llama--Llama-3.1-8B" / "refs" / "main").write_text(revision)
    assert "config.json of its main revision" in error_of(MODEL) or "larger than" in error_of(MODEL)


def test_only_names_of_models_are_looked_for() -> None:
    for name in (MODEL, "openai-community/gpt2", "a/b"):
        assert is_model_name(name)
    for name in ("gpt2", "a/b/c", "/a", "a/", "../b", "a/..", "none/config.json", "a--b/c", "a\n/b", "a/b\n", "./a"):
        assert not is_model_name(name)


def test_the_folder_follows_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_folder() == tmp_path / ".cache/huggingface/hub"
    assert own_folder() == tmp_path / ".cache/runlora_gen"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub_folder() == tmp_path / "xdg/huggingface/hub"
    assert own_folder() == tmp_path / "xdg/runlora_gen"
    monkeypatch.setenv("HF_HOME", "~/home")
    assert hub_folder() == tmp_path / "home/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert hub_folder() == tmp_path / "cache"
