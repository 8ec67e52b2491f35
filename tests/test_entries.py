"""The Python entries: what they take, what they refuse, what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
from runlora_gen.into_model.packages import imported
from runlora_gen.request.errors import SpecError
from torch import nn

#: Few programs to choose from.
FEW: dict[str, Any] = {"kernels": False, "adapter_dtype": "bf16", "tokens": 64}


class Small(nn.Module):
    """Two linears, and what is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_the_package_has_the_names_of_what_it_generates() -> None:
    sample = imported(Path(__file__).parents[1] / "generated" / "llama_13b_r8")
    entries = {name for name in sample.__all__ if not name.startswith("LoRALinear")} - {"Report", "WarmupReport"}
    assert entries == set(runlora_gen.__all__) - {"generate", "read_model"}
    assert all(callable(getattr(runlora_gen, name)) for name in runlora_gen.__all__)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = runlora_gen.other


def test_torch_is_not_imported_for_a_name(tmp_path: Path) -> None:
    code = (
        "import sys, runlora_gen\nassert 'torch' not in sys.modules\n"
        f"options = {{'output': {str(tmp_path)!r}, **{FEW}}}\n"
        "print(*runlora_gen.generate('llama-9m', rank=4, target_modules='q_proj', **options))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'llama_9m_r4'}\n" and done.stderr.count("\n") == 1
    assert manifest(tmp_path / "llama_9m_r4")["workload"]["target_modules"] == ["q_proj"]


def test_a_live_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"rank": (2, 4), "name": "Mine", "output": tmp_path, "kernels": False, "tokens": 64}
    folders = runlora_gen.generate(Small(), **options)
    assert [folder.name for folder in folders] == ["mine_r2", "mine_r4"]
    assert "left out: embed: embedding\n" in capsys.readouterr().err, "nothing is left out in silence"
    found = manifest(folders[0])
    assert [(p["name"], p["in_features"], p["bias"]) for p in found["projections"]] == [
        ("up_proj", 8, True),
        ("down_proj", 24, False),
    ]
    assert (found["workload"]["dtype"], found["workload"]["device"]) == ("fp32", "cpu")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert runlora_gen.generate(Small(), **options) == folders
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shapes = folders[0] / "shapes.py"
    shapes.write_text(shapes.read_text() + "# edited\n")
    runlora_gen.generate(Small(), **options)
    assert "edited" not in shapes.read_text()


def test_a_package_is_generated_anew_from_its_manifest(tmp_path: Path, run: Any) -> None:
    """As the header of its files says: the model need not be at hand."""
    (folder,) = runlora_gen.generate(Small().bfloat16(), rank=4, output=tmp_path, kernels=False, tokens=64)
    command = manifest(folder)["command"].split()
    assert command[:3] == ["runlora-gen", "--arch", f"{folder.name}/manifest.json"]
    command[2] = str(tmp_path / command[2])
    assert run(*command[1:-1], tmp_path, "--check").ok().out == ""
    broken = tmp_path / "manifest.json"
    for projections in ([], [{"name": "a\nb"}], [{**manifest(folder)["projections"][0], "in_features": 2**40}]):
        broken.write_text(json.dumps({**manifest(folder), "projections": projections}))
        assert "projections = " in run("--arch", broken, "--rank", "4", "-o", tmp_path / "none").error()


def test_what_is_there_in_another_layout_is_not_what_is_asked_for(tmp_path: Path) -> None:
    """And what is there in the same one is used as it is."""
    options = {"rank": 4, "target_modules": ["up_proj"], "output": tmp_path, "kernels": False, "tokens": 64}
    times = []
    for layout in ("folder", "folder", "standalone"):
        (package,) = runlora_gen.generate(Small(), layout=layout, **options)
        assert (package / "base.py").exists() == (layout == "folder")
        assert ("--layout folder" in manifest(package)["command"]) == (layout == "folder")
        times.append((package / "manifest.json").stat().st_mtime_ns)
    assert times[0] == times[1] != times[2]


def test_a_model_is_read() -> None:
    read = runlora_gen.read_model(Small())
    shapes = {p.name: (p.in_features, p.out_features) for p in read.architecture.projections}
    assert shapes == {"up_proj": (8, 24), "down_proj": (24, 8)} and read.left_out == {"embed": "embedding"}


def test_a_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (the test extra)")
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    (folder,) = runlora_gen.generate(config, rank=4, target_modules=["up_proj"], output=tmp_path, **FEW)
    assert folder.name == "llama_r4" and [path.name for path in folder.glob("linear*")] == ["linear_64x96_r4.py"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": None}, "rank: missing"),
        ({"rank": 0}, "rank: '0' is not allowed"),
        ({"rank": True}, "rank: 'True' is not allowed"),
        ({"rank": 9}, r"--rank: 9 is above min\(in, out\)"),
        ({"name": "1"}, "name: '1' is not allowed"),
        ({"tokens": 0}, "tokens: '0' is not allowed"),
        ({"dtype": torch.int8}, "dtype: 'int8' is not allowed"),
        ({"layout": "flat"}, "layout: 'flat' is not allowed; give one of standalone, folder"),
        ({"launch": "jit"}, "launch: 'jit' is not allowed; give one of eager, compile, graph"),
        ({"kernels": 1}, "kernels: 1 is not allowed; give True or False"),
        ({"token": 1}, "unknown field 'token'; did you mean tokens"),
        ({"device": "h1000"}, "unknown device"),
        ({"target_modules": ["w1"]}, "target_modules: 'w1' is not in small"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        runlora_gen.generate(Small(), **{"rank": 4, "output": tmp_path, **options})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="model: 'int' is not allowed"):
        runlora_gen.generate(7, rank=4, output=tmp_path)
    for act in (runlora_gen.merge, runlora_gen.unmerge, runlora_gen.disable_adapter):
        with pytest.raises(SpecError, match="no generated layers in it"):
            act(Small())
    assert runlora_gen.restore(Small()) == ()


def test_a_gpu_without_a_profile_takes_the_nearest_and_says_so() -> None:
    from runlora_gen.cost.device import nearest_profile

    assert nearest_profile("NVIDIA H100 80GB HBM3", (9, 0)) == ("h100", "")
    assert nearest_profile("NVIDIA GeForce RTX 4090", (8, 9)) == ("rtx-4090", "")
    name, said = nearest_profile("NVIDIA A10", (8, 6))
    assert name == "rtx-4090" and "'NVIDIA A10' has no profile; `runlora-gen tune` makes one" in said
    assert nearest_profile("NVIDIA B200", (10, 0))[0] in ("h100", "h200")
