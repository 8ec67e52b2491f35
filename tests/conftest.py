"""What the tests of the command line and of the emission share."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Before anything imports Triton: where there is no GPU, its interpreter runs the kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Hypothesis makes a folder where it is first used: not in one that a test looks into.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parents[1] / ".hypothesis"))
# What is proved here of the committed sample, the catalogue of mutants proves with all examples.
os.environ.setdefault("RUNLORA_EXAMPLES", "5")
# Workers share the cores: with a thread for each core in each of them, a run takes three times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# On every processor alike: with AMX and AVX-512's float16, oneDNN takes scratch memory from torch's allocator, and its
# products in bfloat16 read what is beside a row (torch 2.13).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import black
import pytest
from hypothesis import HealthCheck, settings
from runlora_gen import cli as command_line
from runlora_gen.emit import package
from runlora_gen.measure import interpreter

# Before its first draw Hypothesis reads all loaded sources for constants: 2.4 s in a full run, for which it would blame
# the test that happens to draw first.
settings.register_profile("not_blamed", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("not_blamed")

#: One small shape, so that a run takes a tenth of a second.
SMALL = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "4")


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left on the terminal."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The message of a run on bad input, after the checks that hold for every one."""
        assert self.code == 2, self
        assert self.out == ""
        assert self.err.startswith("runlora-gen: error: "), self.err
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        message = self.err[:-1]
        assert message.isprintable(), message
        return message.removeprefix("runlora-gen: error: ")

    def ok(self) -> Outcome:
        assert self.code == 0 and not self.err, self
        return self


Run = Callable[..., Outcome]
Tree = dict[str, bytes | None]


def run_in_process(*arguments: str | os.PathLike[str]) -> Outcome:
    """Call the real entry point, in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
    former, sys.argv = sys.argv, ["runlora-gen", *map(os.fspath, arguments)]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                command_line.run()
            except SystemExit as end:
                code = end.code
    finally:
        sys.argv = former
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    assert isinstance(code, int)
    return Outcome(code, *texts)


def tree_of(folder: Path) -> Tree:
    """Every path below a folder: a file's content, a link's target, None for a folder; hidden ones too."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            tree[name] = b"-> " + os.fsencode(os.readlink(path))
        else:
            tree[name] = path.read_bytes() if path.is_file() else None
    return tree


#: Constants in whose place the emitted test puts smaller ones for the interpreter.
SHRUNK = {"BM", "BN", "BK", "BT", "BI", "BO", "GROUP_M"}


class _Kernels(ast.NodeTransformer):
    """What a module is to its kernels' properties in the interpreter: no docstrings, layer sizes, sides of tiles.

    Nor what selects a program: those properties name it.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        self.generic_visit(node)
        return None if node.name in ("_select", "_select_forward") else node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
        sizes = {"IN_FEATURES", "OUT_FEATURES"}
        return None if isinstance(node.targets[0], ast.Name) and node.targets[0].id in sizes else node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        for i, key in enumerate(node.keys):
            if isinstance(key, ast.Constant) and key.value in SHRUNK:
                node.values[i] = ast.Constant(0)
        self.generic_visit(node)
        return node


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter is slow: of modules of the sample that differ by sizes alone it runs one module's kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    if "triton" in sys.modules:  # else a test imports it late, if at all: a run of few tests does not wait for that
        interpreter.quicken()  # the properties of one module's kernels take 6 seconds instead of 15
    first: dict[str, str] = {}
    kept, left_out = [], []
    for item in items:
        module = getattr(item, "callspec", None) and item.callspec.params.get("module")
        if item.path.name == "test_equivalence.py" and item.name.startswith("test_kernels_") and module:
            if module.__file__ not in first:
                code = ast.dump(_Kernels().visit(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
                first[module.__file__] = first.setdefault(code, module.__file__)
            if first[module.__file__] != module.__file__:
                left_out.append(item)
                continue
        kept.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def _black_once_a_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every text is formatted once, by whichever worker comes first, and the part of a file with its header too.

    That names the command and differs from spec to spec, but is a comment, of which black leaves the text alone.
    """
    real, known = black.format_str, dict[str, str]()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers
    shared /= "black"
    shared.mkdir(exist_ok=True)

    def format_str(source: str, *, mode: black.Mode) -> str:
        lines = source.splitlines(keepends=True)
        count = next((i for i, line in enumerate(lines) if not line.startswith("# ")), 0)
        stand_in = "# .\n" * count
        body = "".join([stand_in, *lines[count:]])
        key = hashlib.sha256(f"{mode.get_cache_key()}\n{body}".encode()).hexdigest()
        if key not in known:
            path = shared / key
            if not path.exists():
                formatted = real(body, mode=mode)
                assert formatted.startswith(stand_in)
                own = path.with_name(f"{key}.{os.getpid()}")
                own.write_text(formatted, encoding="utf-8")
                own.replace(path)
            known[key] = path.read_text(encoding="utf-8")
        return "".join(lines[:count]) + known[key].removeprefix(stand_in)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(black, "format_str", format_str)
        yield


@pytest.fixture(scope="session", autouse=True)
def _decide_once_a_spec() -> Iterator[None]:
    """The choice is a function of the spec, too: most runs here are of a spec that was run before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "decide_model", cache(package.decide_model))
        yield


@pytest.fixture(params=["folder", "FIFO", "link to a FIFO", "link to a folder", "link to an endless device"])
def odd(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], None]]:
    """Puts at a path what is no file; the test fails if something waits for a FIFO's other end or a device's."""

    def put(path: Path) -> None:
        place = path
        if request.param.startswith("link"):
            place = path.with_name(f"target_of_{path.name}")
            path.symlink_to("/dev/zero" if "device" in request.param else place)
        if "folder" in request.param:
            place.mkdir()
        elif "FIFO" in request.param:
            os.mkfifo(place)

    def fail(*_: object) -> None:
        raise AssertionError("still running after 20 seconds")

    former = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    try:
        yield put
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.fixture(scope="session")
def run() -> Run:
    return run_in_process


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], Tree]:
    return tree_of


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    return SMALL


@pytest.fixture(scope="session")
def generated_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of one small package that tests only read: two ranges, a 16-bit fallback."""
    out = tmp_path_factory.mktemp("generated")
    options = ("--dtype", "fp32", "--device", "cpu", "--tokens", "16,65536")
    run_in_process(*SMALL, *options, "-o", out).ok()
    return out


@pytest.fixture(scope="session")
def pristine(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT as a plain run of the small spec leaves it; tests only read it."""
    out = tmp_path_factory.mktemp("pristine")
    run_in_process(*small, "-o", out).ok()
    return out


@pytest.fixture
def fresh(pristine: Path, tmp_path: Path) -> Path:
    """OUT of a fresh small package that a test may change: OUT/llama_9m_r4."""
    return Path(shutil.copytree(pristine, tmp_path / "fresh"))


@pytest.fixture(scope="session")
def multiplies_float8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of a device of which nothing is measured: there products of float8 are chosen for many tokens."""
    profile = tmp_path_factory.mktemp("device") / "machine.toml"
    figures = {"memory_gb_per_s": 2984, "launch_us": 0.84, "host_us": 35, "kernel_host_us": 89, "multiprocessors": 132}
    lines = [
        'title = "A machine that multiplies float8"',
        'source = "a test"',
        'compute_capability = "9.0"',
        *(f"{name} = {figure}" for name, figure in figures.items()),
        "tflops = { bf16 = 770, fp16 = 770, fp32 = 66.9, fp8 = 1446 }",
    ]
    profile.write_text("\n".join(lines), encoding="utf-8")
    return profile
