"""`verify`: right modules pass, whichever way they were generated; any mutation of the arithmetic fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from runlora_gen import cli
from runlora_gen.emit import render
from runlora_gen.measure.verify import verify_folder
from runlora_gen.spec.errors import SpecError

SMALL = ["--arch", "llama-9m", "--rank", "4", "--target-modules", "q_proj"]


def generate(out: Path, *options: str) -> Path:
    result = CliRunner().invoke(cli.main, [*SMALL, *options, "-o", str(out), "-q"], catch_exceptions=False)
    assert result.exit_code == 0
    return out / "llama_9m_r4"


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--train", "a"),
        ("--train", "b"),
        ("--no-input-grad",),
        ("--criterion", "memory"),
        ("--criterion", "flops", "--dtype", "fp32"),
        ("--dtype", "fp32", "--device", "cpu", "--tokens", "16,64,4096,1000000"),
        ("--allow-lossy-merge", "--criterion", "flops", "--tokens", "100000"),
    ],
    ids=" ".join,
)
def test_generated_folders_are_proved(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert verify_folder(generate(tmp_path, *options), examples=10, quiet=True) == 0


def test_every_variant_is_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = generate(tmp_path, "--all-variants")
    assert verify_folder(folder, examples=3, quiet=False) == 0
    # 310 variants and the selected one, three properties each, and one of the layer.
    assert f"proved, {311 * 3 + 1} properties" in capsys.readouterr().out


#: A slip of a careful engineer: in the text of the template, or of the line that an operation emits.
MUTATIONS = {
    "dropped scaling": ("alpha=scaling)", "alpha=1.0)"),
    "sign of S or P": ("beta=0, alpha=scaling", "beta=0, alpha=-scaling"),
    "sign of dA": ("dA = (P.t() @ X)", "dA = (-P.t() @ X)"),
    "transposed dB": ("dB = (dY.t() @ S)", "dB = (S.t() @ dY).t().flip(0)"),
    "update lost": ("Y = _accumulate(Y, S, B.t())", "Y = Y.clone()"),
    "update gradient lost": ("dX = _accumulate(dX, P, A)", "dX = dX.clone()"),
    "transposed weight": ("dX = dY @ W", "dX = dY @ W.t().reshape(W.shape)"),
    "bias lost": ("F.linear(X, W, b)", "F.linear(X, W)"),
    "bias gradient doubled": ("dY.sum(0)", "2 * dY.sum(0)"),
    "wrong condition": ("if need_dB:", "if need_dX:"),
    "swapped returns": ("return dX, None, dA, dB, db, None", "return dX, None, None, dB, db, None"),
    "subtracted": ("dX = _accumulate(dX, P, A)", "dX = _accumulate(dX, -P, A)"),
    "leading dimensions": ("Y.view(*x.shape[:-1], weight.shape[0])", "Y"),
    "saved too little": ("S if need_dB else None", "None"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_module_fails(tmp_path: Path, mutation: str) -> None:
    folder = generate(tmp_path)
    old, new = MUTATIONS[mutation]
    module = folder / "linear_128x128_r4.py"
    text = module.read_text(encoding="utf-8")
    assert old in text
    module.write_text(text.replace(old, new), encoding="utf-8")
    assert verify_folder(folder, examples=30, quiet=True) == 1


def test_a_mutated_template_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = tmp_path / "templates"
    shutil.copytree(render.template_folder(), templates)
    path = templates / "linear.py.jinja"
    text = path.read_text(encoding="utf-8")
    assert "beta=0, alpha=scaling" in text
    path.write_text(text.replace("beta=0, alpha=scaling", "beta=0, alpha=scaling * scaling"), encoding="utf-8")
    render._environment.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(render, "template_folder", lambda: templates)
        folder = generate(tmp_path / "out")
    render._environment.cache_clear()
    assert verify_folder(folder, examples=30, quiet=True) == 1


def test_the_folder_s_own_test_is_not_what_is_trusted(tmp_path: Path) -> None:
    folder = generate(tmp_path)
    (folder / "test_equivalence.py").write_text("", encoding="utf-8")
    module = folder / "linear_128x128_r4.py"
    module.write_text(module.read_text(encoding="utf-8").replace("P.t() @ X", "-P.t() @ X"), encoding="utf-8")
    assert verify_folder(folder, examples=30, quiet=True) == 1


def test_folders_below_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path)
    assert verify_folder(tmp_path, examples=2, quiet=False) == 0
    assert "linear_128x128_r4.py: proved, 7 properties" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", ["empty", "no manifest", "odd manifest", "missing module", "foreign module", "bytes", "syntax"]
)
def test_bad_folders_are_one_clear_error(tmp_path: Path, kind: str) -> None:
    folder = generate(tmp_path)
    module, manifest = folder / "linear_128x128_r4.py", folder / "manifest.json"
    match kind:
        case "empty":
            shutil.rmtree(folder)
        case "no manifest":
            manifest.unlink()
        case "odd manifest":
            manifest.write_text('{"layers": [{"module": 3}]}', encoding="utf-8")
        case "missing module":
            module.unlink()
        case "foreign module":
            module.write_text("print('hello')\n", encoding="utf-8")
        case "bytes":
            module.write_bytes(module.read_bytes() + b"# \xff\n")
        case "syntax":
            module.write_text(module.read_text(encoding="utf-8") + "\ndef (", encoding="utf-8")
    with pytest.raises(SpecError, match=r"^verify: [^\n]+$"):
        verify_folder(folder, examples=2, quiet=True)


def test_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    folder = generate(tmp_path)
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(SpecError, match=r"^verify: [^\n]+$"):
        verify_folder(folder, examples=2, quiet=True)


@pytest.mark.parametrize("name", ["manifest.json", "linear_128x128_r4.py"])
def test_what_is_no_file(tmp_path: Path, name: str, odd: Callable[[Path], None]) -> None:
    folder = generate(tmp_path)
    (folder / name).unlink()
    odd(folder / name)
    for path in (folder, tmp_path):
        with pytest.raises(SpecError, match=rf"^verify: '[^\n]*{name}': not a regular file$"):
            verify_folder(path, examples=2, quiet=True)
