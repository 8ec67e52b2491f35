"""Measuring a machine: a whole run on this CPU, what it writes, and that it can be interrupted and resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib
from runlora_gen.algebra.operations import Fused, dimensions, signature
from runlora_gen.algebra.table import KERNELS, OPERATIONS
from runlora_gen.cost.device import DTYPE_NAMES, load_device
from runlora_gen.measure import tune
from runlora_gen.measure.modules import module_of_everything
from runlora_gen.spec.errors import SpecError
from runlora_gen.spec.workload import Workload

SIZE = ("--shapes", "24x40", "--tokens", "16", "--rank", "4")
ON_CPU = ("tune", "--device", "cpu", "-q", *SIZE)


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "mine.toml"
    assert run(*ON_CPU, "-o", path).ok().out == f"{path}\n"
    return path


def test_every_torch_operation_is_measured(tuned: Path) -> None:
    data = tomllib.loads(tuned.read_text(encoding="utf-8"))
    dims = {"T": 16, "I": 24, "O": 40, "R": 4}
    expected = {signature(op): [dims[d] for d in dimensions(op)] for op in OPERATIONS if not isinstance(op, Fused)}
    assert {name: row[:-1] for name, (row,) in data["times"]["fp32"].items()} == expected
    assert all(0.1 < row[-1] < 1e6 for (row,) in data["times"]["fp32"].values())
    assert not data.get("tiles") and "kernel_host_us" not in data
    assert re.fullmatch(r"measured by runlora-gen tune on .*, torch \S+", data["source"])
    assert os.fspath(tuned.parent) not in tuned.read_text(encoding="utf-8")


def test_the_profile_prices_a_generation(run, tuned: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    options = ("--device", os.fspath(tuned), "--dtype", "fp32")
    run(*small, *options, "-o", tmp_path).ok()
    manifest = (tmp_path / "llama_9m_r4" / "manifest.json").read_text()
    assert json.loads(manifest)["workload"]["device"] == "mine.toml"
    texts = manifest + (tmp_path / "llama_9m_r4" / "linear_128x128_r4.py").read_text()
    assert os.fspath(tuned.parent) not in texts and "--device mine.toml" in texts
    assert f"by what was measured on {load_device(os.fspath(tuned)).title}" in " ".join(texts.split())
    run(*small, *options, "-o", tmp_path, "--check").ok()


def test_what_is_known_is_not_measured_again(run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuned.read_bytes()
    monkeypatch.setattr(tune, "interleaved", None)
    run(*ON_CPU, "-o", tuned).ok()
    assert tuned.read_bytes() == before


def test_an_interrupted_run_is_resumed(run, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(tuned.read_bytes())
    real = tune._measure
    points = []

    def measure(*arguments: object) -> None:
        points.append(arguments[-1])
        if len(points) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    more = ("tune", "--device", "cpu", "-q", "--shapes", "24x40", "--tokens", "16,32,48", "--rank", "4", "-o", path)
    monkeypatch.setattr(tune, "_measure", measure)
    assert run(*more).code == 130
    half = tomllib.loads(path.read_text(encoding="utf-8"))
    assert [row[0] for row in half["times"]["fp32"]["S = s X Aᵀ"]] == [16, 32]
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"
    run(*more).ok()
    whole = tomllib.loads(path.read_text(encoding="utf-8"))
    assert [row[0] for row in whole["times"]["fp32"]["S = s X Aᵀ"]] == [16, 32, 48]
    assert whole["times"]["fp32"]["S = s X Aᵀ"][:2] == half["times"]["fp32"]["S = s X Aᵀ"]
    assert [point.tokens for point in points] == [32, 48, 48]


def test_shapes_of_an_architecture(run, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    run("tune", "--device", "cpu", "-q", "--arch", "llama-9m", "--tokens", "8", "--rank", "4", "-o", path).ok()
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    assert [row[:3] for row in data["times"]["fp32"]["G = dYᵀ X"]] == [[8, 128, 128], [8, 128, 352], [8, 352, 128]]


def test_kernels_are_measured_with_all_their_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, where there is no GPU: what is tried, and what the profile then holds."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.4")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for name, value in (("ROUNDS", 1), ("MOST_SETS", 1), ("LEAST_S", 0)):
        monkeypatch.setattr(tune, name, value)
    tried = []
    runner = tune._Workbench.runner
    monkeypatch.setattr(
        tune._Workbench, "runner", lambda bench, trial, *rest: tried.append(trial) or runner(bench, trial, *rest)
    )
    data: dict = {"times": {}, "tiles": {}}
    with tune._Workbench(torch.device("cpu")) as bench:
        bench.kernels = True
        bench.module = module_of_everything(Workload(device="h200", launch="graph"), tmp_path / "kernels")
        tune._measure(bench, data, "fp16", tune.Point(24, 16, 32, 8))
        assert bench.trials("fp16", tune.Point(24, 16, 32, 8), data) == []
    fused = {signature(op): KERNELS[op.kernel] for op in OPERATIONS if isinstance(op, Fused)}
    measured = {name: kernel for name, kernel in fused.items() if not kernel.seeded}
    assert data["tiles"]["fp16"].keys() == measured.keys() < data["times"]["fp16"].keys()
    for name, kernel in measured.items():
        ((*_, best),) = data["tiles"]["fp16"][name]
        assert best in ({}, *kernel.candidates)
        constants = [dict(trial.constants) for trial in tried if signature(trial.operation) == name]
        assert constants == [{}, *kernel.candidates]
    rendered = tmp_path / "x.toml"
    basics = {"title": "a", "source": "b", "memory_gb_per_s": 1.0, "launch_us": 1.0, "host_us": 1.0}
    tune._write(rendered, {**basics, "kernel_host_us": 1.0, "tflops": dict.fromkeys(DTYPE_NAMES, 1.0), **data})
    device = load_device(os.fspath(rendered))
    for name, rows in data["tiles"]["fp16"].items():
        ((*at, best),) = rows
        assert device.tiles_for(name, "bf16", tuple(at)) == best


def test_progress_goes_to_stderr(run, tmp_path: Path) -> None:
    outcome = run("tune", "--device", "cpu", *SIZE, "-o", tmp_path / "x.toml")
    assert outcome.out == f"{tmp_path / 'x.toml'}\n" and "1/1" in outcome.err


class TestBadInput:
    def refused(self, run, path: Path, *options: str) -> str:
        existing = path.read_bytes() if path.exists() else None
        message = run("tune", "--device", "cpu", "-o", path, *options).error()
        assert (path.read_bytes() if path.exists() else None) == existing
        return message

    def test_another_machine_s_file(self, run, tuned: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        path.write_text(tuned.read_text(encoding="utf-8").replace("torch ", "tensor "), encoding="utf-8")
        assert "is not of this machine" in self.refused(run, path)

    @pytest.mark.parametrize("text", ["x = ", "a" + ".a" * 50_000 + " = 1", "x = " + "[" * 50_000], ids=len)
    def test_no_profile(self, run, tmp_path: Path, text: str) -> None:
        path = tmp_path / "x.toml"
        path.write_text(text, encoding="utf-8")
        assert "is no profile" in self.refused(run, path)

    def test_what_is_no_file(self, run, tmp_path: Path, odd: Callable[[Path], None]) -> None:
        odd(tmp_path / "x.toml")
        before = sorted(tmp_path.iterdir())
        message = run(*ON_CPU, "-o", tmp_path / "x.toml").error()
        assert message.startswith("--output: ") and message.endswith("x.toml': not a regular file")
        assert sorted(tmp_path.iterdir()) == before

    def test_a_fifo_where_the_file_is_staged(self, tuned: Path, tmp_path: Path, odd: Callable[[Path], None]) -> None:
        """It is removed, not written to; a folder is neither."""
        data = {"tiles": {}, **tomllib.loads(tuned.read_text(encoding="utf-8"))}
        odd(tmp_path / ".x.toml.new")
        if (tmp_path / ".x.toml.new").is_dir() and not (tmp_path / ".x.toml.new").is_symlink():
            with pytest.raises(SpecError, match=r"^--output: cannot write '[^\n]*x.toml': [^\n]+$"):
                tune._write(tmp_path / "x.toml", data)
        else:
            tune._write(tmp_path / "x.toml", data)
            assert (tmp_path / "x.toml").read_bytes() == tuned.read_bytes()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--shapes", "3y4"), "--shapes: '3y4' is not allowed; give shapes in x out such as 4096x11008"),
            (("--shapes", "0x4"), "--shapes: '0x4'"),
            (("--arch", "llama-9m", "--shapes", "3x4"), "--shapes: given beside --arch"),
            (("--arch", "llama-9"), "did you mean llama-9m?"),
            (("--shapes", "8x8", "--rank", "9"), "--rank: "),
            (("--tokens", "0"), "--tokens: '0'"),
            (("--title", 'a"""b'), "--title: "),
            (("--title", "a\nb"), "--title: "),
        ],
    )
    def test_options(self, run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
        assert message in self.refused(run, tmp_path / "x.toml", *options)

    def test_a_file_of_another_kind(self, run, tmp_path: Path) -> None:
        assert "give a file that ends in .toml" in self.refused(run, tmp_path / "x.json")

    def test_no_gpu(self, run, tmp_path: Path) -> None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        assert "torch sees no GPU" in run("tune", "-o", tmp_path / "x.toml").error()
