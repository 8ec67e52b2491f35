"""`verify`: right modules pass, wherever they lie; mutated ones fail; what did not run is not proved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.measure import proof
from runlora_gen.measure import verify as verification
from runlora_gen.measure.verify import verify
from runlora_gen.request.errors import SpecError

MODULE = "linear_128x128_r4.py"


def first_error(path: Path, examples: int = 3, least: int = 16) -> str | None:
    """What the torch path's properties find first, in this process."""
    proof.load({"proved": path})
    checks = list(proof.checks(["proved"], proof.TORCH, examples))
    assert len(checks) >= least
    found = ((check, proof.outcome(check)) for check in checks)
    return next((f"{check.title}: {outcome['error']}" for check, outcome in found if "error" in outcome), None)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--train", "a"),
        ("--train", "b"),
        ("--no-input-grad", "--adapter-dtype", "bf16"),
        ("--criterion", "memory"),
        ("--criterion", "flops", "--dtype", "fp32"),
        ("--dtype", "fp32", "--device", "cpu", "--tokens", "16,64,4096,1000000"),
        ("--allow-lossy-merge", "--criterion", "flops", "--tokens", "100000"),
        ("--base", "int8", "--tokens", "16,4096"),
        ("--base", "fp8", "--dropout", "0.1"),
        ("--base", "fp8-block", "--criterion", "memory"),
    ],
    ids=" ".join,
)
def test_generated_modules_are_proved(run, small: tuple[str, ...], tmp_path: Path, options: tuple[str, ...]) -> None:
    run(*small, "--no-kernels", *options, "-o", tmp_path).ok()
    # A quantized base has fewer properties: its weight is never merged, transposed or in another dtype.
    assert first_error(tmp_path / "llama_9m_r4" / MODULE, least=11 if "--base" in options else 16) is None


#: A slip of a careful engineer: in the text of the template, or of the line that an operation emits. Those of kernels,
#: launchers, prices and all others are in the catalogue of mutants.
MUTATIONS = {
    "dropped scaling": ("alpha=scaling)", "alpha=1.0)"),
    "update lost": ("Y = _accumulate(Y, S, B.t())", "Y = Y.clone()"),
    "wrong above 64 tokens": ("        return Y\n", "        return Y * (1 if X.shape[0] <= 64 else 2)\n"),
    "wrong above rank 9": ("        return Y\n", "        return Y * (1 if A.shape[0] <= 9 else 2)\n"),
    "autocast lost": ("torch.is_autocast_enabled(device)", "False"),
    "second derivatives allowed": (
        "not _transformed():\n            _refuse_second",
        "False:\n            _refuse_second",
    ),
    "arguments unchecked": ("    _check_arguments(x, weight", "    if False: _check_arguments(x, weight"),
    "a negative scaling wrong": ("ctx.scaling = scaling", "ctx.scaling = abs(scaling)"),
    "wide gradients rounded": ("if dtype.itemsize <= left.dtype.itemsize:", "if True:"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_module_fails(fresh: Path, mutation: str) -> None:
    module = fresh / "llama_9m_r4" / MODULE
    old, new = MUTATIONS[mutation]
    text = module.read_text(encoding="utf-8")
    assert old in text
    module.write_text(text.replace(old, new), encoding="utf-8")
    assert first_error(module)


@pytest.fixture(scope="module")
def kernels(run, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose one module has one program, with a kernel: the interpreter takes seconds for each more."""
    out = tmp_path_factory.mktemp("kernels")
    run(*small, "--launch", "graph", "--tokens", "65536", "--train", "b", "--no-input-grad", "-o", out).ok()
    return out / "llama_9m_r4"


class TestCommand:
    """Whole runs: in processes of their own, the kernels in Triton's interpreter."""

    def test_kernels_run_in_the_interpreter(self, run, kernels: Path) -> None:
        pytest.importorskip("triton", minversion="3.4")
        done = run("verify", "--examples", "2", "--require-kernels", kernels)
        assert done.code == 0 and done.out.startswith(f"{kernels / MODULE}: proved, ")
        assert done.out.endswith(" properties, kernels in Triton's interpreter\n") or "kernels on " in done.out

    def test_a_mutated_kernel_fails(self, run, kernels: Path, tmp_path: Path) -> None:
        pytest.importorskip("triton", minversion="3.4")
        text = (kernels / MODULE).read_text(encoding="utf-8")
        old = "acc = tl.dot(left_tile, right_tile, acc)"
        assert text.count(old) == 1
        (tmp_path / "alone.py").write_text(text.replace(old, "acc = tl.dot(left_tile, right_tile)"), encoding="utf-8")
        done = run("verify", "--examples", "2", "-x", tmp_path / "alone.py")
        assert done.code == 1 and "alone.py: FAILED 1 of " in done.out

    def test_products_of_float8_are_proved(self, run, multiplies_float8: Path, tmp_path: Path) -> None:
        """Each of their kernels, against a reference that rounds what they round."""
        pytest.importorskip("triton", minversion="3.4")
        asked = ("--arch", "llama-7b", "--target-modules", "q_proj", "--rank", "4", "--adapter-dtype", "bf16")
        base = ("--base", "fp8", "--float8", "both")
        run(*asked, *base, "--device", multiplies_float8, "--launch", "graph", "--tokens", "8192", "-o", tmp_path).ok()
        module = tmp_path / "llama_7b_r4" / "linear_4096x4096_r4.py"
        text = module.read_text(encoding="utf-8")
        assert text.count("def _launch_fused_gemm_8(") == 1 and "_p_db_largest(dY" in text
        done = run("verify", "--examples", "1", "--require-kernels", module)
        assert done.code == 0 and done.out.startswith(f"{module}: proved, ")

    def test_what_did_not_run_is_said(
        self, run, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copy(kernels / MODULE, tmp_path / "alone.py")
        (tmp_path / "triton.py").write_text("raise ImportError", encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        prove, proved = verification._prove, list[dict[str, verification._Verdict]]()

        def prove_once(*arguments: Any) -> dict[str, verification._Verdict]:
            if not proved:
                proved.append(prove(*arguments))
            return proved[0]

        monkeypatch.setattr(verification, "_prove", prove_once)
        done = run("verify", "--examples", "1", tmp_path / "alone.py")
        assert done.code == 0
        assert done.out.startswith(f"{tmp_path / 'alone.py'}: proved (torch path; kernels not run: no triton), ")
        done = run("verify", "--examples", "1", "--require-kernels", tmp_path / "alone.py")
        assert done.code == 1 and done.out == f"{tmp_path / 'alone.py'}: FAILED: kernels not run: no triton\n"

    def test_a_module_that_ends_the_process(self, run, fresh: Path) -> None:
        module = fresh / "llama_9m_r4" / MODULE
        text = module.read_text(encoding="utf-8")
        module.write_text(f"{text}\nimport os; os._exit(0)\n", encoding="utf-8")
        assert "can't be imported: " in run("verify", "--examples", "1", module).error()
        late = text.replace(
            "    tokens, dtype = x.numel()", "    import os; os._exit(0)\n    tokens, dtype = x.numel()"
        )
        assert late != text
        module.write_text(late, encoding="utf-8")
        done = run("verify", "--examples", "1", module)
        assert done.code == 1 and "the process ended before the property was proved" in done.out


class TestWhereItLies:
    """Which modules are found; nothing is run."""

    @pytest.fixture(autouse=True)
    def found(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        groups: list[list[str]] = []

        def prove(modules: dict[str, Path], *_: object) -> dict[str, object]:
            groups.append([str(path) for path in modules.values()])
            return {name: verification._Verdict(proved=1) for name in modules}

        monkeypatch.setattr(verification, "_prove", prove)
        return groups

    def test_a_folder_with_a_manifest_or_without_one_or_above_or_a_file(
        self, fresh: Path, tmp_path: Path, found: list[list[str]]
    ) -> None:
        module = fresh / "llama_9m_r4" / MODULE
        vendored = tmp_path / "vendored"
        vendored.mkdir()
        shutil.copy(module, vendored / "my lora.py")  # no name that Python imports
        (vendored / "mine.py").write_text("def lora_linear(): ...\n", encoding="utf-8")
        for path in (module.parent, module, fresh, vendored, vendored / "my lora.py"):
            assert verify(path, examples=1, quiet=True) == 0
        assert found == [[str(module)]] * 3 + [[str(vendored / "my lora.py")]] * 2

    @pytest.mark.parametrize(
        "kind", ["empty", "odd manifest", "no json", "missing module", "foreign module", "bytes", "other file"]
    )
    def test_bad_input_is_one_clear_error(self, fresh: Path, kind: str, found: list[list[str]]) -> None:
        folder = fresh / "llama_9m_r4"
        module, manifest = folder / MODULE, folder / "manifest.json"
        path = folder
        match kind:
            case "empty":
                shutil.rmtree(folder)
            case "odd manifest":
                manifest.write_text('{"generator": "runlora-gen", "layers": [{"module": 3}]}', encoding="utf-8")
            case "no json":
                manifest.write_text("{", encoding="utf-8")
            case "missing module":
                module.unlink()
            case "foreign module":
                module.write_text("print('hello')\n", encoding="utf-8")
            case "bytes":
                module.write_bytes(module.read_bytes() + b"# \xff\n")
            case "other file":
                path = folder / "test_equivalence.py"
        with pytest.raises(SpecError, match=r"^verify: [^\n]+$"):
            verify(path, examples=2, quiet=True)
        assert not found

    @pytest.mark.parametrize("name", ["manifest.json", MODULE])
    def test_what_is_no_file(self, fresh: Path, name: str, odd: Callable[[Path], None]) -> None:
        folder = fresh / "llama_9m_r4"
        (folder / name).unlink()
        odd(folder / name)
        for path in (folder, fresh):
            with pytest.raises(SpecError, match=rf"^verify: '[^\n]*{name}': not a regular file$"):
                verify(path, examples=2, quiet=True)


def test_a_module_that_is_no_python(run, fresh: Path) -> None:
    module = fresh / "llama_9m_r4" / MODULE
    module.write_text(module.read_text(encoding="utf-8") + "\ndef (", encoding="utf-8")
    assert "can't be imported: " in run("verify", module).error()


def test_the_folder_s_own_test_is_not_what_is_trusted(run, fresh: Path) -> None:
    folder = fresh / "llama_9m_r4"
    (folder / "test_equivalence.py").write_text("", encoding="utf-8")
    text = (folder / MODULE).read_text(encoding="utf-8")
    (folder / MODULE).write_text(text.replace("_mm_as(P.t(), X", "_mm_as(-P.t(), X"), encoding="utf-8")
    assert run("verify", "-x", "--examples", "5", folder).code == 1


def test_every_emitted_property_is_a_check(fresh: Path) -> None:
    """What pytest runs of the emitted test is what verify runs, but for the process of the kernels' own."""
    folder = fresh / "llama_9m_r4"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(folder)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    collected = sum("::" in line for line in listed.splitlines())
    proof.load({"proved": folder / MODULE})
    checks = [check for part in (proof.TORCH, proof.KERNELS) for check in proof.checks(["proved"], part, 1)]
    assert len(checks) == collected - 1
