"""Bad input through the real entry point: one line on stderr, exit code 2, nothing on stdout, nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runlora_gen import cli
from runlora_gen.request.errors import SpecError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}

ARCH = ("--arch", "llama-9m")
RANK = ("--rank", "4")

CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # arguments, what the message must say
    "no arch": (RANK, ("--arch", "missing", "runlora-gen archs")),
    "no rank": (ARCH, ("--rank", "missing")),
    "check without a spec": (("--check",), ("--arch", "missing")),
    "arch, mistyped": (("--arch", "lama-13b", *RANK), ("'lama-13b'", "did you mean llama-13b?")),
    "arch, unlike any": (("--arch", "\x1b[31m\n", *RANK), (r"\x1b[31m\n", "runlora-gen archs")),
    "arch, empty": (("--arch", "", *RANK), ("unknown architecture ''",)),
    "arch, no such path": (("--arch", "none/config.json", *RANK), ("no such file or folder",)),
    "rank 0": ((*ARCH, "--rank", "0"), ("--rank", "'0'", "from 1 to")),
    "rank -1": ((*ARCH, "--rank", "-1"), ("--rank", "'-1'")),
    "rank text": ((*ARCH, "--rank", "abc"), ("--rank", "'abc'")),
    "rank 1.5": ((*ARCH, "--rank", "1.5"), ("--rank", "'1.5'")),
    "rank huge": ((*ARCH, "--rank", str(10**12)), ("--rank", "1000000000000")),
    "rank of many digits": ((*ARCH, "--rank", "9" * 5000), ("--rank", "from 1 to")),
    "rank in other digits": ((*ARCH, "--rank", "٨"), ("--rank",)),
    "rank list with a hole": ((*ARCH, "--rank", "4,,8"), ("--rank", "''")),
    "rank list with one bad": ((*ARCH, "--rank", "4,x"), ("--rank", "'x'")),
    "rank above min(in, out)": ((*ARCH, "--rank", "129"), ("129", "128x128", "largest rank allowed is 128")),
    "tokens 0": ((*ARCH, *RANK, "--tokens", "0"), ("--tokens", "'0'")),
    "tokens huge": ((*ARCH, *RANK, "--tokens", str(2**31 + 1)), ("--tokens", str(2**31))),
    "tokens text": ((*ARCH, *RANK, "--tokens", "4m"), ("--tokens", "'4m'", "4k for 4096")),
    "tokens huge in k": ((*ARCH, *RANK, "--tokens", "2097153k"), ("--tokens", "'2097153k'")),
    "rank in k": ((*ARCH, "--rank", "1k"), ("--rank", "'1k'")),
    "name": ((*ARCH, *RANK, "--name", "../x"), ("--name", "'../x'", "letters")),
    "name, empty": ((*ARCH, *RANK, "--name", ""), ("--name", "''")),
    "name, a keyword": ((*ARCH, *RANK, "--name", "class"), ("--name", "'class'", "keyword")),
    "name of a command without": (("explain", *ARCH, *RANK, "--name", "x"), ("--name",)),
    "all-linear and more": (
        (*ARCH, *RANK, "--target-modules", "all-linear,q_proj"),
        ("target_modules", "'all-linear'", "q_proj"),
    ),
    "adapter dtype": ((*ARCH, *RANK, "--adapter-dtype", "int8"), ("--adapter-dtype", "int8", "bfloat16")),
    "dtype": ((*ARCH, *RANK, "--dtype", "int8"), ("--dtype", "bf16", "int8")),
    "train": ((*ARCH, *RANK, "--train", "c"), ("--train", "'c'", "a,b")),
    "train, empty": ((*ARCH, *RANK, "--train", ""), ("--train", "''")),
    "dropout 1": ((*ARCH, *RANK, "--dropout", "1"), ("--dropout", "'1'", "from 0 up to but not 1")),
    "dropout below 0": ((*ARCH, *RANK, "--dropout", "-0.1"), ("--dropout", "'-0.1'")),
    "dropout nan": ((*ARCH, *RANK, "--dropout", "nan"), ("--dropout", "'nan'")),
    "dropout in percent": ((*ARCH, *RANK, "--dropout", "10%"), ("--dropout", "'10%'")),
    "dropout, and merges rounded": (
        (*ARCH, *RANK, "--dropout", "0.05", "--merge-rounding", "stochastic", "--allow-lossy-merge"),
        ("--merge-rounding", "--dropout 0", "nothing is merged"),
    ),
    "bias": ((*ARCH, *RANK, "--bias", "some"), ("--bias", "some", "lora_only")),
    "bias, and none is there": ((*ARCH, *RANK, "--bias", "all"), ("--bias", "all", "none has", "lora_bias")),
    "criterion": ((*ARCH, *RANK, "--criterion", "speed"), ("--criterion", "time")),
    "device": ((*ARCH, *RANK, "--device", "h10"), ("--device", "did you mean h100?", "rtx-4090")),
    "device, a path": ((*ARCH, *RANK, "--device", "../../x"), ("--device", "'../../x'")),
    "target modules": ((*ARCH, *RANK, "--target-modules", "q"), ("target_modules", "'q'", "q_proj")),
    "target modules, empty": ((*ARCH, *RANK, "--target-modules", ""), ("target_modules", "''")),
    "target parameters": (
        (*ARCH, *RANK, "--target-parameters", "mlp.experts.down_proj"),
        ("target_parameters", "'mlp.experts.down_proj'", "no experts"),
    ),
    "target parameters, empty": ((*ARCH, *RANK, "--target-parameters", ""), ("target_parameters", "''")),
    "target parameters, all": (
        (*ARCH, *RANK, "--target-parameters", "all-linear"),
        ("target_parameters", "'all-linear'"),
    ),
    "model type": ((*ARCH, *RANK, "--model-type", "mamba"), ("model_type", "mamba", "llama")),
    "max saved bytes 0": ((*ARCH, *RANK, "--max-saved-bytes", "0"), ("--max-saved-bytes", "'0'")),
    "max saved bytes text": ((*ARCH, *RANK, "--max-saved-bytes", "1GB"), ("--max-saved-bytes", "'1GB'")),
    "unknown option": (("--spam\x1b[31m\n",), (r"--spam\x1b[31m\n",)),
    "unknown option, long": (("--" + "x" * 10_000 + "y",), ("No such option", "xxx", "y")),
    "unknown command": (("generate",), ("generate",)),
    "unknown command, long": (("x" * 10_000 + "y",), ("No such command", "xxx", "y")),
    "unknown command in many words": (("x\n\t\x1b[31m " * 3_000,), ("No such command", "x")),
    "dtype, long": ((*ARCH, *RANK, "--dtype", "x" * 10_000), ("--dtype", "xxx", "bf16", "fp32")),
    "output, long": ((*ARCH, *RANK, "-o", "x" * 10_000), ("-o", "xxx", "File name too long")),
    "output, long, dry": ((*ARCH, *RANK, "--dry-run", "-o", "x" * 10_000), ("-o", "xxx", "File name too long")),
    "device, long": ((*ARCH, *RANK, "--device", "x" * 10_000 + ".toml"), ("--device", "xxx", "File name too long")),
    "device, no such file": ((*ARCH, *RANK, "--device", "no\x1b.toml"), ("--device: there is no file 'no\\x1b.toml'",)),
    "option without a value": (("--arch",), ("--arch",)),
    "spec before the command": ((*ARCH, *RANK, "explain"), ("--arch", "explain", "after")),
    "explain without a spec": (("explain",), ("--arch", "missing")),
    "explain of two ranks": (("explain", *ARCH, "--rank", "4,8"), ("explain", "--rank")),
    "explain of two token counts": (("explain", *ARCH, *RANK, "--tokens", "1,2"), ("explain", "--tokens")),
    "explain as JSON": (("explain", "--json", *ARCH, "--rank", "0"), ("--rank", "'0'")),
    "estimate without a sequence": (("estimate", *ARCH, *RANK), ("--sequence", "missing")),
    "estimate of no sequences": (("estimate", *ARCH, *RANK, "-s", "8", "--batch", "0"), ("--batch", "'0'")),
    "estimate of two batches": (("estimate", *ARCH, *RANK, "-s", "8", "--batch", "1,2"), ("estimate", "--batch")),
    "estimate of two ranks": (("estimate", *ARCH, "--rank", "4,8", "-s", "8"), ("estimate", "--rank")),
    "estimate of too many tokens": (
        ("estimate", *ARCH, *RANK, "-s", "65536", "--batch", "65536"),
        ("--batch", "65536 sequences", "2147483648"),
    ),
    "estimate with tokens": (("estimate", *ARCH, *RANK, "--tokens", "8"), ("--tokens",)),
    "estimate of GPT-2": (("estimate", "--arch", "gpt2", *RANK, "-s", "8"), ("gpt2", "only the linears", "llama")),
    "devices with an argument": (("devices", "h100"), ("h100",)),
    "archs with an argument": (("archs", "llama"), ("llama",)),
    "verify of nothing": (("verify", "none"), ("verify: no generated module at 'none'", "give a file or a folder")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_options(run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, said = CASES[name]
    if arguments[0] == "verify":
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    message = run(*arguments).error()
    assert all(text in message for text in said), message
    assert len(message) <= 500
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=30)
@given(
    option=st.sampled_from(["--rank", "--tokens", "--train", "--dropout", "--max-saved-bytes"]),
    value=st.one_of(
        st.text(st.characters(exclude_characters="\0"), max_size=12),
        st.text("0123456789,.-+e ab", max_size=8),
        st.integers(-(10**20), 10**20).map(str),
    ),
)
def test_any_text_is_taken_or_refused_on_one_line(run, option: str, value: str) -> None:
    base = [*ARCH, "--target-modules", "q_proj", "--dry-run", "-q", "-o", "/nonexistent/out"]
    outcome = run(*base, *(() if option == "--rank" else RANK), f"{option}={value}")
    if outcome.code:
        assert option in outcome.error()
    else:
        assert (outcome.out, outcome.err) == ("", "")


#: What an argument can hold: bytes that are no text arrive as lone surrogates.
ARGUMENTS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.binary().map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(
        lambda text: text * 2000
    ),
)
DRY = (*ARCH, "--target-modules", "q_proj", *RANK, "--dry-run", "-q")
#: Where an argument stands. Nothing of this writes.
PLACES: dict[str, Callable[[str], tuple[str, ...]]] = {
    "option": lambda text: (*DRY, f"--{text}"),
    "short option": lambda text: (*DRY, f"-{text}"),
    "command": lambda text: (text,),
    "argument": lambda text: ("archs", text),
    "value": lambda text: (*DRY, text),
    "folder": lambda text: ("verify", text),
    "profile": lambda text: (*DRY, "--device", f"{text}.toml"),
    "new profile": lambda text: ("tune", "--shapes", "1x1", "--rank", "2", "-o", f"{text}.toml"),
    **{
        f"value of {name}": lambda text, name=name: (*DRY, f"{name}={text}")
        for option in cli.main.params
        for name in option.opts
        if name.startswith("--")
    },
}


@pytest.mark.parametrize("place", PLACES)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="\x1b[31m\n\r\u2028\u202e")
@example(text="x" * 100_000)
@given(text=ARGUMENTS)
def test_any_argument_anywhere_is_taken_or_refused_on_one_line(
    run, place: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place in ("folder", "new profile"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    outcome = run(*PLACES[place](text))
    if outcome.code not in (0, cli.EXIT_STALE):  # -h and --check are arguments, too
        outcome.error()
        assert len(outcome.err) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (click.UsageError("raw \x1b[31m\n\u202e " + "x" * 10_000 + " end"), r"raw \x1b[31m \u202e xxx"),
        (SpecError("field: " + "\udcff x" * 10_000), r"field: \udcff x"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a\x1b\nb"),
            r"cannot access 'a\x1b\nb': Permission denied",
        ),
        (OSError(errno.EIO, "I/O\nerror", b"\xff"), r"cannot access b'\xff': I/O error"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write the output: No space left on device"),
        (OSError("odd\x00"), r"cannot write the output: odd\x00"),
    ],
    ids=["click", "ours", "path", "bytes", "no path", "no number"],
)
def test_whatever_was_raised_is_one_line(run, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.main, "main", raise_it)
    message = run("archs").error()
    assert message.startswith(said) and len(message) <= 500
    assert message.endswith("end") or not message.startswith("raw")


HOSTILE_CONFIGS: dict[str, tuple[str, str]] = {
    # text of config.json, what the message must say
    "empty": ("", "not valid JSON"),
    "no object": ("[1]", "expected a JSON object"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "text for a number": (json.dumps({**LLAMA, "hidden_size": "{{7*7}}"}), "hidden_size"),
    "negative": (json.dumps({**LLAMA, "intermediate_size": -1}), "intermediate_size"),
    "NaN": (json.dumps({**LLAMA, "hidden_size": float("nan")}), "NaN"),
    "10^12": (json.dumps({**LLAMA, "hidden_size": 10**12}), "hidden_size"),
    "missing": (json.dumps({"model_type": "llama"}), "missing field"),
    "model type": (json.dumps({**LLAMA, "model_type": "x\n'''\x1b[2J"}), "model_type"),
    "huge": (" " * (2 << 20), "larger than"),
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_hostile_configs(run, name: str, tmp_path: Path) -> None:
    text, said = HOSTILE_CONFIGS[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(text)
    message = run("--arch", tmp_path / "model", *RANK, "-o", tmp_path / "out").error()
    assert said in message and "config.json" in message
    assert not (tmp_path / "out").exists()


HOSTILE_NAMES = [
    'a\nimport os; os.system("x")',
    '"""',
    "'''\\",
    "`id`",
    "$(x)",
    "..evil..",
    "{{7*7}}",
    "{% raw %}",
    "--force",
    "#}\r\n# x",
    "ünïcödé\u202e",
    "49",
    "class",
    os.fsdecode(b"\xff\xfe"),
    "x" * 200,
]


def generate_from(run, folder: Path, out: Path) -> tuple[str, dict[str, str]]:
    """Generate from a config in this folder; the package's name, and its files without the two places for a name."""
    folder.mkdir()
    name = folder.name
    hostile = {**LLAMA, "_name_or_path": name, "architectures": [name], "torch_dtype": "{{7*7}}", name: name}
    (folder / "config.json").write_text(json.dumps(hostile))
    outcome = run("--arch", folder, "--target-modules", "q_proj", *RANK, "-o", out).ok()
    (package,) = out.iterdir()
    assert outcome.out.startswith(f"{package}: ")
    files = {}
    for path in package.iterdir():
        text, sources = re.subn(
            r" --arch [A-Za-z0-9._-]*/config\.json --rank ", " --arch CONFIG --rank ", path.read_text()
        )
        assert path.suffix == ".typed" or sources == 1
        slug = package.name.removesuffix("_r4")
        text = text.replace(f"LoRA linears for {slug}, rank", "LoRA linears for NAME, rank")
        text = text.replace(f'"arch": "{slug}"', '"arch": "NAME"')
        files[path.name] = re.sub(r'"sha256:\w+"', '"sha256"', text)
    return package.name, files


@pytest.fixture(scope="module")
def harmless(run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("harmless")
    return generate_from(run, folder / "model_9", folder / "out")[1]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_hostile_names_reach_no_file(run, name: str, harmless: dict[str, str], tmp_path: Path) -> None:
    """What is written differs from what a harmless name gives in that name only, and there it is an identifier."""
    package, files = generate_from(run, tmp_path / name, tmp_path / "out")
    assert re.fullmatch(r"[a-z][a-z0-9_]*_r4", package) and len(package) < 80
    assert files == harmless
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out"])


@pytest.mark.parametrize("folder", ["a\nb", '"""', "{{7*7}}", "\x1b[2J"], ids=ascii)
def test_errors_about_hostile_names_stay_on_one_line(run, folder: str, tmp_path: Path) -> None:
    model = tmp_path / folder
    model.mkdir()
    assert "holds no readable config.json" in run("--arch", model, *RANK, "-o", tmp_path / "out").error()
    (model / "config.json").write_text("{")
    assert "not valid JSON" in run("--arch", model, *RANK, "-o", tmp_path / "out").error()
    (tmp_path / "file\n").write_text("")
    assert "give a folder" in run(*ARCH, *RANK, "-o", tmp_path / "file\n").error()
