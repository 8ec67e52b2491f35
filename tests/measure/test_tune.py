"""Measuring a machine: a whole run on this CPU, what it writes, and that it can be interrupted and resumed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.experts import ACTIVATED, COMBINED, GATHERED
from runlora_gen.algebra.linear import FLOAT8, LINEAR
from runlora_gen.algebra.mlp import MLP
from runlora_gen.algebra.operations import Convert, Fused, Operation, dimensions
from runlora_gen.algebra.work import work
from runlora_gen.cost.device import load_device
from runlora_gen.cost.price import price_operation
from runlora_gen.cost.profile import Profile, parse_toml, read_profile, render_profile
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import WORKS, operations_of
from runlora_gen.measure import clock, tune
from runlora_gen.measure.modules import module_of_everything
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import Experts
from runlora_gen.request.workload import DTYPE_NAMES, Workload
from runlora_gen.search.candidates import goals, setting_of

SIZE = ("--shapes", "24x40", "--tokens", "16", "--rank", "4")
ON_CPU = ("tune", "--device", "cpu", "-q", *SIZE)


def read(path: Path) -> Profile:
    """What a file holds."""
    return read_profile(parse_toml(path.read_bytes()))


def begun() -> Profile:
    """One without measurements of operations."""
    rates = dict.fromkeys(DTYPE_NAMES, 1.0)
    return Profile("a", "b", memory_gb_per_s=1, launch_us=1, host_us=1, kernel_host_us=1, tflops=rates)


REAL = {name: getattr(tune, name) for name in ("AT_REST", "TOLERANCE", "ROUNDS")}
REAL_COMPILED, REAL_EAGER = tune._compiled_host_us, tune._eager_host_us


@pytest.fixture(scope="module", autouse=True)
def _any_timing_will_do() -> Iterator[None]:
    """What is measured here need not be right, and tests run side by side are no machine at rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "AT_REST", float("inf"))
        patch.setattr(tune, "TOLERANCE", {"cpu": float("inf")})
        patch.setattr(tune, "ROUNDS", 1)
        patch.setattr(tune, "SQUARE", {"cpu": {2: 64, 4: 64}})  # a CPU needs seconds for large ones in 16 bits
        # They take seconds, and one a compiler; what they do is tested below.
        patch.setattr(tune, "_compiled_host_us", lambda bench: (2.5, None))
        patch.setattr(tune, "_eager_host_us", lambda bench: (10.0, 20.0, 15.0 if bench.kernels else None))
        yield


class Machine:
    """Timings that are made up: nothing runs, and time passes by what each is said to take.

    An operation takes 40 µs and anything else 10 ms, with 2 % of noise, times ``slowness`` of the operation's name (of
    anything else: None), of the number of its batch, counted from 0, and of the time.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness: Callable[[str | None, int, float], float] = lambda what, batch, now: 1.0
        self.timings: Counter[str | None] = Counter()
        self.order: list[str] = []
        self._random = random.Random(0)

    def seconds(self, run: object, *_: object, **__: object) -> float:
        what: str | None = getattr(run, "name", None)
        batch = (self.timings[what] - 3) // tune.ROUNDS  # two calls before the first round, and its warm-up
        self.timings[what] += 1
        self.order += [what] if what is not None else []
        took = (10e-3 if what is None else 40e-6) * self._random.uniform(1, 1.02) * self.slowness(what, batch, self.now)
        self.now += took
        return took

    def sleep(self, duration: float) -> None:
        self.now += duration

    def batches(self, what: str) -> int:
        return (self.timings[what] - 3) // tune.ROUNDS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()

    def runner(bench: object, trial: tune.Trial, *_: object) -> Callable[[], None]:
        def run() -> None: ...

        run.name = tune._described(trial)  # type: ignore[attr-defined]
        return run

    for name, value in REAL.items():
        monkeypatch.setattr(tune, name, value)
    for module in (clock, tune):
        monkeypatch.setattr(module, "seconds", machine.seconds)
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: machine.now, sleep=machine.sleep))
    monkeypatch.setattr(tune._Workbench, "runner", runner)
    monkeypatch.setattr(tune, "repeated", lambda run, calls: run)
    monkeypatch.setattr(tune, "LEAST_S", 0)
    monkeypatch.setattr(tune, "MOST_SETS", 1)
    return machine


@pytest.fixture(scope="module")
def bench() -> Iterator[tune._Workbench]:
    """One that knows what it takes at rest."""
    torch = pytest.importorskip("torch")
    with tune._Workbench(torch.device("cpu")) as bench:
        bench.bytes_per_s = bench.pair.nbytes / 10e-3
        yield bench


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "mine.toml"
    assert run(*ON_CPU, "-o", path).ok().out == f"{path}\n"
    return path


def test_every_torch_operation_is_measured(tuned: Path) -> None:
    profile = read(tuned)
    dims = {"T": 16, "I": 24, "O": 40, "R": 4}
    # In one dtype there is nothing to cast.
    measured = [op for op in operations_of(LINEAR) if not isinstance(op, Convert | Fused)]
    expected = {work(op): [tuple(dims[d] for d in dimensions(op))] for op in measured}
    times = profile.times["fp32"]
    assert {key: list(figures) for key, figures in times.items()} == expected
    assert all(0.1 < time < 1e6 for figures in times.values() for time in figures.values())
    assert not profile.tiles and profile.kernel_host_us is None
    assert profile.compiled_host_us == 2.5 and profile.compiled_kernel_host_us is None
    assert re.fullmatch(r"measured by runlora-gen tune on .*, torch \S+", profile.source)
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

    def measure(*arguments: object) -> object:
        points.append(arguments[-1])
        if len(points) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    more = ("tune", "--device", "cpu", "-q", "--shapes", "24x40", "--tokens", "16,32,48", "--rank", "4", "-o", path)
    monkeypatch.setattr(tune, "_measure", measure)
    assert run(*more).code == 130
    half = read(path).times["fp32"]["TI,RI->TR scaled"]
    assert [tokens for tokens, *_ in half] == [16, 32]
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"
    run(*more).ok()
    whole = read(path).times["fp32"]["TI,RI->TR scaled"]
    assert [tokens for tokens, *_ in whole] == [16, 32, 48] and half.items() <= whole.items()
    assert [point.tokens for point in points] == [32, 48, 48]


def test_shapes_of_an_architecture(run, machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    run("tune", "--device", "cpu", "-q", "--arch", "llama-9m", "--tokens", "8", "--rank", "4", "-o", path).ok()
    assert list(read(path).times["fp32"]["TO,TI->OI"]) == [(8, 128, 128), (8, 128, 352), (8, 352, 128)]


def test_kernels_are_measured_with_all_their_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, where there is no GPU: what is tried, and what the profile then holds."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.4")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for name, value in (("MOST_SETS", 1), ("LEAST_S", 0)):
        monkeypatch.setattr(tune, name, value)
    tried = []
    real = tune._Workbench.runner

    def runner(bench: tune._Workbench, trial: tune.Trial, *rest: Any) -> Callable[[], object]:
        """What really runs the first time only: the interpreter's times are no matter."""
        tried.append(trial)
        return functools.cache(real(bench, trial, *rest))

    monkeypatch.setattr(tune._Workbench, "runner", runner)
    profile, size = begun(), tune.Point(24, 16, 32, 8)
    with tune._Workbench(torch.device("cpu")) as bench:
        bench.kernels = True
        bench.module = module_of_everything(Workload(device="h200", launch="graph"), tmp_path / "kernels")
        bench._modules["plain"] = bench.module
        tune._measure(bench, profile, "fp16", size)
        assert bench.trials("fp16", size, profile.times["fp16"]) == []
    fused = {work(op): KERNELS[op.kernel] for op in operations_of(LINEAR) if isinstance(op, Fused)}
    measured = {key: kernel for key, kernel in fused.items() if not kernel.seeded}
    assert profile.tiles["fp16"].keys() == measured.keys() < profile.times["fp16"].keys()
    for key, kernel in measured.items():
        (best,) = profile.tiles["fp16"][key].values()
        assert best in ({}, *kernel.candidates)
        constants = [dict(trial.constants) for trial in tried if work(trial.operation) == key]
        assert constants[0] == {}
        # Once each of what a launch makes of them: p_db takes 256 rows a program at so few tokens, of 512 too.
        ran, possible = (
            [tuple(kernel.at({**kernel.tiles, **own}, 24, 16, 8).values()) for own in sets]
            for sets in (constants, ({}, *kernel.candidates))
        )
        assert ran == list(dict.fromkeys(possible)) and (len(ran) < len(possible)) == key.startswith(("p_db", "x_at"))
    tune._write(tmp_path / "x.toml", profile)
    device = load_device(os.fspath(tmp_path / "x.toml"))
    assert device.tiles_for("bf16") == {key: tuple(best.items()) for key, best in profile.tiles["fp16"].items()}


@pytest.mark.parametrize(("slower", "lean"), [(1.09, True), (1.11, False)])
def test_what_sums_in_fewer_parts_may_take_a_little_more(slower: float, lean: bool) -> None:
    """Tiles of twice as many columns give half as many parts of P, which a step of a model holds."""
    (operation,) = {op for op in operations_of(MLP) if isinstance(op, Fused) and op.kernel == "mlp_activate_backward"}
    wide = tune.Trial(operation)
    narrow = tune.Trial(operation, (("BT", 32), ("BI", 64)))
    assert KERNELS[operation.kernel].tiles["BI"] == 128
    point = tune.Point(16384, 4096, 14336, 16, mlp=True)
    assert tune._best({wide: slower, narrow: 1.0}, "bf16", point) == (wide if lean else narrow)
    merged = LINEAR.parse("merge: M = W + s * B @ A")
    fast, slow = tune.Trial(merged, (("BO", 32),)), tune.Trial(merged)
    assert tune._best({slow: 1.01, fast: 1.0}, "bf16", tune.Point(8, 16, 32, 4)) == fast, "which has no parts"


def noted(name: str, real: Callable[..., Any], launched: Counter[str]) -> Callable[..., Any]:
    """A launch that must not refuse its operands, counted."""

    def launch(*operands: Any) -> Any:
        made = real(*operands)
        assert made is not None, f"{name} refused what it is measured on"
        launched[name] += 1
        return made

    return launch


def test_what_products_of_float8_take_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is called on what it would be given: codes with scales, codes alone, the largest of each row.

    One that refused its operands would be measured as torch.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.4")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for name, value in (("MOST_SETS", 1), ("LEAST_S", 0)):
        monkeypatch.setattr(tune, name, value)
    expected = [op for op in operations_of(FLOAT8) if isinstance(op, Fused) and KERNELS[op.kernel].float8]
    profile, launched = begun(), Counter[str]()
    with tune._Workbench(torch.device("cpu")) as bench:
        bench.kernels = True
        bench.workload = Workload(adapter_dtype="bf16", device="h100", launch="graph")
        bench._operations = tuple({work(op): op for op in expected}.values())
        bench.module = module = bench.module_on("fp8")
        assert module.BASE == "fp8" and bench.module_on("fp8") is module, "made once"
        assert {bench.module_on(tune._base_of(op)) for op in expected} == {module}
        for name in {f"_launch_{op.kernel}" for op in expected}:
            monkeypatch.setattr(module, name, noted(name, getattr(module, name), launched))
        tune._measure(bench, profile, "fp16", tune.Point(24, 16, 32, 8))
    assert profile.times["fp16"].keys() == set(map(work, expected)) and len(launched) == 6
    tune._write(tmp_path / "x.toml", profile)
    assert read(tmp_path / "x.toml").times["fp16"].keys() == set(map(work, expected))
    # A transpose has neither tokens nor a rank.
    assert profile.times["fp16"]["transpose: OI->IO transpose"].keys() == {(16, 32)}


def of_experts() -> list[Operation]:
    """What experts do, in one dtype and without kernels."""
    every = (op for site in (GATHERED, COMBINED, ACTIVATED) for op in operations_of(site))
    return [op for op in every if not isinstance(op, Convert | Fused)]


def test_every_torch_operation_of_experts_is_measured(run, tmp_path: Path) -> None:
    """And no linear's, where only experts are asked for; rows are as many as tokens have experts."""
    path = tmp_path / "x.toml"
    size = ("--experts", "4x2:24x40", "--tokens", "8", "--rank", "4")
    outcome = run("tune", "--device", "cpu", "-q", *size, "-o", path).ok()
    dims = {"T": 16, "N": 8, "E": 4, "I": 24, "O": 40, "R": 4, "F": 48, "RU": 4}
    times = read(path).times["fp32"]
    expected = {work(op): [tuple(dims[d] for d in dimensions(op))] for op in of_experts()}
    assert {key: list(figures) for key, figures in times.items()} == expected
    assert expected["TI,EOI->TO biased"] == [(16, 24, 40, 4)] and expected["TR,T->TR weigh"] == [(16, 4)]
    assert expected["NI->TI gather"] == [(16, 24, 8)]
    assert "warning" not in outcome.err
    # The prices of experts are those times.
    site = Experts(4, 24, 40, True, 2, False, 1, ("up_proj",))
    workload = Workload(dtype="fp32", device=os.fspath(path))
    setting = setting_of(workload, site, 4, 8)
    product = GATHERED.parse("Y = Xr @ W[e].T + b[e]")
    (measured,) = times["TI,EOI->TO biased"].values()
    assert price_operation(product, setting).device_s == pytest.approx(measured * 1e-6)
    # What is known is not measured again.
    before = path.read_bytes()
    run("tune", "--device", "cpu", "-q", *size, "-o", path).ok()
    assert path.read_bytes() == before


def test_experts_of_an_architecture(run, machine: Machine, tmp_path: Path) -> None:
    """Beside its linears; without any sizes a grid of both."""
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, **sizes})
    )
    path = tmp_path / "x.toml"
    spec = ("tune", "--device", "cpu", "-q", "--tokens", "8", "--rank", "4", "-o", path)
    run(*spec, "--arch", tmp_path / "config.json").ok()
    times = read(path).times["fp32"]
    assert list(times["TI,EOI->TO biased"]) == [(16, 64, 192, 4), (16, 96, 64, 4)]
    assert list(times["TI,OI->TO biased"]) == [(8, 64, 32), (8, 64, 64)]
    path.unlink()
    run("tune", "--device", "cpu", "-q", "-o", path).ok()
    (stack,), tokens, _ = tune.GRID_OF_EXPERTS["cpu"]
    measured = list(read(path).times["fp32"]["TI,EOI->TO biased"])
    assert measured == [(stack[1] * count, *stack[2:], stack[0]) for count in tokens]


@pytest.mark.parametrize("name", sorted({name for name in KERNELS if name.startswith("experts_")}))
def test_kernels_of_experts_are_measured(name: str, bench_of_experts: tune._Workbench, tmp_path: Path) -> None:
    """Each on rows that are sorted by expert; one that gathers is priced as that which does not."""
    bench, profile = bench_of_experts, begun()
    mine = [op for op in bench._of_experts if isinstance(op, Fused) and op.kernel == name]
    assert bool(mine) == (KERNELS[name].priced_as is None)
    if not mine:
        return
    launched = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        for module in {bench.module_for(op) for op in mine}:
            patch.setattr(module, f"_launch_{name}", noted(name, getattr(module, f"_launch_{name}"), launched))
        patch.setattr(bench, "_of_experts", tuple(mine))
        for constant, value in (("MOST_SETS", 1), ("LEAST_S", 0)):
            patch.setattr(tune, constant, value)
        tune._measure(bench, profile, "fp16", tune.Point(8, 16, 32, 8, experts=4, top_k=2))
    assert profile.times["fp16"].keys() == set(map(work, mine)) and launched[name] >= len(mine)
    for key, best in profile.tiles["fp16"].items():
        assert all(constants in ({}, *KERNELS[name].candidates) for constants in best.values()), key
    tune._write(tmp_path / "x.toml", profile)
    assert read(tmp_path / "x.toml").times["fp16"] == profile.times["fp16"]


@pytest.fixture(scope="module")
def bench_of_experts() -> Iterator[tune._Workbench]:
    """One with kernels, in Triton's interpreter."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.4")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with tune._Workbench(torch.device("cpu")) as bench, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "kernels", True)
        patch.setattr(bench, "workload", Workload(adapter_dtype="bf16", device="h100", launch="graph"))
        patch.setattr(
            bench, "_of_experts", tuple({work(op): op for op in reversed(bench._timed_of_experts())}.values())
        )
        patch.setattr(bench, "module", bench.module_for(bench._of_experts[0]))
        yield bench


@pytest.mark.parametrize(
    ("formula", "base"),
    [
        ("S = s * X @ A.T", "plain"),
        ("rescale: W = rescale(Q)", "fp8"),
        ("largest: mX = largest(X)", "fp8"),
        ("x_at_largest: S = s * X @ A.T; mX = largest(X)", "fp8"),
        ("transpose: Qt = transpose(Q)", "fp8"),
        ("fused_gemm: Y = S @ B.T + b; Y += X @ W.T", "plain"),
    ],
)
def test_the_base_of_an_operation(formula: str, base: str) -> None:
    """Only of such is there a module that has it."""
    assert tune._base_of(FLOAT8.parse(formula)) == base


def test_rates_are_written_in_one_order() -> None:
    """Whatever was measured first: a profile that was read and written again is the same file."""
    profile = begun()
    turned = replace(profile, tflops=dict(reversed([*profile.tflops.items(), ("fp8", 1446.0)])))
    text = render_profile(turned)
    assert render_profile(read_profile(parse_toml(text.encode()))) == text


def test_the_host_is_asked_with_and_without_kernels() -> None:
    programs = enumerate_programs(LINEAR, goals(Workload()))
    plain, fused = (asked.among(programs) for asked in (tune._PLAIN, tune._FUSED))
    assert not plain.kernels and fused.kernels == {"fused_gemm", "p_db"} and plain.kept == fused.kept


class TestCompiled:
    """What launches of torch.compile cost the host: measured by rows of linears, or left out and named."""

    @pytest.mark.filterwarnings("ignore")  # torch's of itself, when Inductor is imported
    def test_it_is_measured(self, bench: tune._Workbench, capfd: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("torch")
        operator_us, kernel_us = REAL_COMPILED(bench)
        if operator_us is None:
            said = capfd.readouterr().err
            assert said.startswith("left out: what torch.compile's launches cost the host")
            pytest.skip(said)
        assert 0 < operator_us < 1e4 and kernel_us is None

    def test_it_is_what_a_longer_row_takes_more(
        self, bench: tune._Workbench, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a step that takes 700 µs, and 80 µs for each linear, eight operators take 10 µs each."""
        torch = pytest.importorskip("torch")
        compiled: list[Callable[..., object]] = []

        def steps(bench: object, step: object, count: int) -> Callable[[], None]:
            def run() -> None: ...

            run.took = count * (700e-6 + 80e-6 * tune.ROWS[len(compiled) - 1])  # type: ignore[attr-defined]
            return run

        def compile(function: Callable[..., object], **_: object) -> Callable[..., object]:
            compiled.append(function)
            return function

        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(tune, "_steps", steps)
        for module in (clock, tune):
            monkeypatch.setattr(module, "seconds", lambda run, *_, **__: getattr(run, "took", 10e-3))
        assert REAL_COMPILED(bench) == (10, None) and len(compiled) == len(tune.ROWS)

    @pytest.mark.parametrize("error", [RuntimeError("No working C++ compiler\nfound"), NotImplementedError()])
    def test_it_is_left_out_where_nothing_compiles(
        self, run, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """And measured by the next run, if that can."""
        torch = pytest.importorskip("torch")

        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(tune, "_compiled_host_us", REAL_COMPILED)
            patch.setattr(torch, "compile", fail)
            outcome = run(*ON_CPU, "-o", tmp_path / "x.toml")
        what = " ".join(str(error).split()) or "NotImplementedError"
        assert outcome.code == 0
        assert outcome.err == (f"left out: what torch.compile's launches cost the host, for --launch compile: {what}\n")
        profile = read(tmp_path / "x.toml")
        assert profile.compiled_host_us is None and profile.times
        run(*ON_CPU, "-o", tmp_path / "x.toml").ok()
        again = read(tmp_path / "x.toml")
        assert again.compiled_host_us == 2.5 and again.times == profile.times

    def test_rows_that_never_agree(
        self, bench: tune._Workbench, machine: Machine, monkeypatch: pytest.MonkeyPatch, capfd: Any
    ) -> None:
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        figures = itertools.count(1)
        monkeypatch.setattr(clock, "seconds", lambda *_, **__: 1e-3 * 1.2 ** next(figures))
        assert REAL_COMPILED(bench) == (None, None)
        assert re.search(r"in batches that never agreed; run again on an idle machine$", capfd.readouterr().err.strip())

    def test_a_busy_machine_is_an_error_as_ever(
        self, bench: tune._Workbench, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        machine.slowness = lambda *_: 1.9
        with pytest.raises(SpecError, match="when the profile was begun"):
            REAL_COMPILED(bench)

    def test_the_host_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        monkeypatch.setattr(tune, "_eager_host_us", REAL_EAGER)
        found = tune.host_figures("cpu", tune.Point(4, 16, 16, 2))
        eager = ["host_us", "function_host_us", "kernel_host_us"]
        assert list(found) == [*eager, "compiled_host_us", "compiled_kernel_host_us"]
        assert found["host_us"] > 0 and found["function_host_us"] > 0 and found["compiled_host_us"] == 2.5
        assert found["kernel_host_us"] is found["compiled_kernel_host_us"] is None


class TestEager:
    """What operators, functions and launches cost the host without a compiler: by rows of linears."""

    @pytest.fixture
    def rows(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
        """Microseconds of a step for each linear, by how many rows were built before: functions, then linears."""
        pytest.importorskip("torch")
        each, built = {0: 30.0, 2: 110.0, 4: 180.0}, itertools.count()

        def steps(bench: object, step: object, count: int) -> Callable[[], None]:
            def run() -> None: ...

            number = next(built)
            of_linear = each[number // 2 * 2]
            run.took = count * (700e-6 + of_linear * 1e-6 * tune.ROWS[number % 2])  # type: ignore[attr-defined]
            return run

        monkeypatch.setattr(tune, "_steps", steps)
        for module in (clock, tune):
            monkeypatch.setattr(module, "seconds", lambda run, *_, **__: getattr(run, "took", 10e-3))
        return each

    def test_the_function_comes_off(self, bench: tune._Workbench, rows: dict[int, float]) -> None:
        """Of 110 µs a linear 30 are its function's; eight operators take the rest."""
        assert REAL_EAGER(bench) == (10, 30, None)

    def test_a_launch_is_what_operators_leave(
        self, bench: tune._Workbench, rows: dict[int, float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three kernels take 150 µs with two operators: few rows leave nothing to add up."""
        monkeypatch.setattr(bench, "kernels", True)
        monkeypatch.setattr(bench, "module", SimpleNamespace(lora_linear=lambda x, W, A, B, **_: x + A.sum() + B.sum()))
        monkeypatch.setattr(bench, "launching", tune.Point(8, 8, 8, 8))
        kernel_us = round((150 - 2 * 10) / 3, 2)
        assert REAL_EAGER(bench) == (10, 30, kernel_us)

    def test_what_cannot_be_is_an_error(self, bench: tune._Workbench, rows: dict[int, float]) -> None:
        rows[2] = 20.0  # less than a function that does nothing
        with pytest.raises(
            SpecError, match=r"^tune: longer rows took no longer .*; run again on an idle machine; noth"
        ):
            REAL_EAGER(bench)

    def test_rows_that_never_agree(
        self, bench: tune._Workbench, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures = itertools.count(1)
        monkeypatch.setattr(clock, "seconds", lambda *_, **__: 1e-3 * 1.2 ** next(figures))
        with pytest.raises(SpecError, match=r"^tune: 50 steps of empty functions took .* never agreed; run again"):
            REAL_EAGER(bench)


def test_progress_goes_to_stderr(run, machine: Machine, tmp_path: Path) -> None:
    outcome = run("tune", "--device", "cpu", *SIZE, "-o", tmp_path / "x.toml")
    assert outcome.out == f"{tmp_path / 'x.toml'}\n" and "1/1" in outcome.err


ONE = "Y = X @ W.T + b"
ONE_WORK = "TI,OI->TO biased"
POINT = tune.Point(16, 24, 40, 4)


class TestAgreement:
    """What is written, timed again, named and left out, by how the machine behaves."""

    @pytest.fixture
    def measured(self, bench: tune._Workbench, machine: Machine) -> Callable[..., tuple[dict, dict]]:
        """What is written of one size, and what is left out: µs by the names of the operations."""

        def measured(slowness: Callable[[str | None, int, float], float]) -> tuple[dict, dict]:
            machine.slowness = slowness
            profile = begun()
            unsettled = tune._measure(bench, profile, "fp32", POINT)
            known = profile.times.get("fp32", {})
            written = {str(WORKS[key]): time for key, times in known.items() for time in times.values()}
            named = {tune._described(trial): [figure * 1e6 for figure in unsettled[trial]] for trial in unsettled}
            assert len(written) + len(named) == 18 and written.keys().isdisjoint(named)
            return written, named

        return measured

    def test_at_rest(self, measured, machine: Machine) -> None:
        written, named = measured(lambda *_: 1)
        assert not named and all(40 <= row <= 41 for row in written.values())
        assert all(machine.batches(name) == 2 for name in written)
        rounds = {tuple(machine.order[start : start + 18]) for start in range(2 * 18, len(machine.order), 18)}
        assert len(rounds) == 1 + 2 * tune.ROUNDS, "each has an order of its own, the warm-up too"

    def test_an_outlier(self, measured, machine: Machine) -> None:
        """The median of its batch is none."""
        written, _ = measured(lambda what, *_: 188 if what == ONE and machine.timings[what] == 5 else 1)
        assert 40 <= written[ONE] <= 41 and machine.batches(ONE) == 2

    @pytest.mark.parametrize("start", [0.0, 0.033, 0.05, 0.067])
    def test_another_process_for_ten_seconds(self, measured, machine: Machine, start: float) -> None:
        """A row of 7,540 µs beside others of 40: its batches agree, but the machine is busy, which is waited for."""
        written, named = measured(lambda what, batch, now: 188 if start <= now < start + 10 else 1)
        assert machine.now > 10
        assert not named and all(40 <= row <= 41 for row in written.values())

    def test_another_process_that_stays(self, measured, machine: Machine) -> None:
        with pytest.raises(
            SpecError,
            match=r"^tune: memory is copied at 1\d\.\d GB/s, and was at 26\.8 when the profile was begun; run",
        ):
            measured(lambda *_: 1.9)
        assert tune.PATIENCE_S < machine.now < tune.PATIENCE_S + 2

    def test_a_profile_begun_beside_another_process(self, measured) -> None:
        with pytest.raises(SpecError, match=r"or begin another$"):
            measured(lambda *_: 1 / 2.2)

    @pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 3), (1, 1), (1, 3)])
    def test_a_burst_that_only_one_operation_feels(self, measured, machine: Machine, first: int, count: int) -> None:
        batches = range(first, first + count)
        written, named = measured(
            lambda what, batch, now: 188 * 1.2 ** (batch - first) if what == ONE and batch in batches else 1
        )
        assert not named and all(40 <= row <= 41 for row in written.values())
        assert machine.batches(ONE) == 2 + count and machine.batches("G = dY.T @ X") == 2

    def test_a_slow_drift(self, measured) -> None:
        """What differs by less than the tolerance is one figure."""
        written, named = measured(lambda what, batch, now: 1.02**batch)
        assert not named and all(40 <= row <= 42 for row in written.values())

    def test_a_fast_drift(self, measured, machine: Machine) -> None:
        written, named = measured(lambda what, batch, now: 1.15**batch if what == ONE else 1)
        assert named.keys() == {ONE} and all(40 <= row <= 41 for row in written.values())
        assert named[ONE][:3] == pytest.approx([40, 40 * 1.15, 40 * 1.15**2], rel=0.03)
        assert machine.batches(ONE) == tune.BATCHES

    def test_a_fast_drift_that_ends(self, measured) -> None:
        """A processor that was faster while it was cool."""
        written, named = measured(lambda what, batch, now: 1 if what is None else 1.15 ** min(batch, 4))
        assert not named and all(70 <= row <= 72 for row in written.values())

    def test_two_clocks_in_turn(self, measured) -> None:
        """The faster one."""
        written, named = measured(lambda what, batch, now: 1 if what is None else (1.5, 1)[batch % 2])
        assert not named and all(40 <= row <= 41 for row in written.values())

    def test_two_clocks_at_random(self, measured) -> None:
        """One of both, and nothing between them."""
        clocks = random.Random(0)
        written, named = measured(lambda what, *_: 1 if what is None else clocks.choice((1, 1.5)))
        assert not named and all(40 <= row <= 41 or 60 <= row <= 62 for row in written.values())

    @pytest.mark.parametrize("factor", [0.9, 1.1])
    def test_constants_that_never_agree(
        self, bench, machine: Machine, monkeypatch: pytest.MonkeyPatch, factor: float
    ) -> None:
        """They leave their kernel out if they may be the best."""
        monkeypatch.setattr(bench, "kernels", True)
        monkeypatch.setattr(bench, "takes_large_tiles", lambda *_: True)
        candidates = KERNELS["merge"].candidates
        name = "merge: M = W + s * B @ A"
        never = f"{name} with BO = {candidates[0]['BO']}"
        machine.slowness = lambda what, batch, now: factor * 1.15**batch if what == never else 1
        profile = begun()
        unsettled = tune._measure(bench, profile, "fp16", POINT)
        for found in (profile.times["fp16"], profile.tiles["fp16"]):
            assert (work(LINEAR.parse(name)) in found) == (factor > 1)
        assert [tune._described(trial) for trial in unsettled] == ([never] if factor < 1 else [])

    @pytest.mark.parametrize(
        ("figures", "cpu", "cuda"),
        [
            ([], None, None),
            ([40], None, None),
            ([40, 41], 40.5, 40.5),
            ([40, 43], 41.5, None),
            ([40, 45], None, None),
            ([7540, 40, 7560, 41], 40.5, 40.5),
            ([40, 7540, 7540, 7540, 7540], None, None),
            ([35, 40, 40, 40, 40], None, None),
            ([35, 40, 40, 40, 40, 40], 40, 40),  # a clock that fell after the first batch and stays there
        ],
    )
    def test_the_two_lowest_of_the_last(self, figures: list[float], cpu: float | None, cuda: float | None) -> None:
        torch = pytest.importorskip("torch")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "TOLERANCE", REAL["TOLERANCE"])
            for device, expected in (("cpu", cpu), ("cuda", cuda)):
                assert tune._agreed(figures, torch.device(device)) == expected

    def test_what_is_left_out_is_named_and_measured_by_the_next_run(
        self, run, machine: Machine, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.toml"
        command = (*ON_CPU[:-1], "4,8", "-o", path)
        machine.slowness = lambda what, batch, now: 1.15**batch if what == ONE else 1  # r8 is no other size to it
        first = run(*command)
        assert (first.code, first.out) == (0, f"{path}\n")
        left_out, warning = first.err.splitlines()
        assert re.fullmatch(
            r"left out: fp32 16:24x40 r[48]: Y = X @ W\.T \+ b took (\d+\.?\d*, ){11}\d+\.?\d* µs in batches that "
            "never agreed; run again on an idle machine, what is finished is kept",
            left_out,
        )
        assert warning.startswith("warning: fp32: Y = X @ W.T + b has no time at any size")
        half = read(path).times["fp32"]
        assert len(half) == 17 and ONE_WORK not in half
        machine.slowness = lambda *_: 1
        machine.timings.clear()
        run(*command).ok()
        assert machine.timings.keys() == {None, ONE}, "what is known is not measured again"
        whole = read(path).times["fp32"]
        assert list(whole.pop(ONE_WORK)) == [(16, 24, 40)] and whole == half

    def test_what_another_size_made_up_for_is_not_named(self, run, machine: Machine, tmp_path: Path) -> None:
        delta = "D = s * B @ A"  # no token has a part in it
        machine.slowness = lambda what, batch, now: 1.15**batch if what == delta and batch < tune.BATCHES else 1
        run(*ON_CPU[:-3], "16,32", *ON_CPU[-2:], "-o", tmp_path / "x.toml").ok()
        assert list(read(tmp_path / "x.toml").times["fp32"]["OR,RI->OI scaled"]) == [(24, 40, 4)]

    def test_nothing_is_priced_without_the_basics(self, run, machine: Machine, tmp_path: Path) -> None:
        machine.slowness = lambda what, batch, now: 1.15**batch
        message = run(*ON_CPU, "-o", tmp_path / "x.toml").error()
        assert re.fullmatch(
            r"tune: a copy of memory took [\d., e+]+ µs in batches that never agreed, and nothing can be priced "
            "without it: run again on an idle machine",
            message,
        )
        assert not list(tmp_path.iterdir())


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

    def test_a_file_of_an_older_version(self, run, tuned: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
        path = tmp_path / "x.toml"
        path.write_text(tuned.read_text(encoding="utf-8").replace("format = 2\n", ""), encoding="utf-8")
        again = "its tables are of an older version of runlora-gen; measure the machine again, into another file"
        assert f"x.toml' is no profile: {again}" in self.refused(run, path)
        assert f"x.toml': not a device profile: {again}" in run(*small, "--device", path, "-o", tmp_path).error()

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
        profile = read(tuned)
        odd(tmp_path / ".x.toml.new")
        if (tmp_path / ".x.toml.new").is_dir() and not (tmp_path / ".x.toml.new").is_symlink():
            with pytest.raises(SpecError, match=r"^--output: cannot write '[^\n]*x.toml': [^\n]+$"):
                tune._write(tmp_path / "x.toml", profile)
        else:
            tune._write(tmp_path / "x.toml", profile)
            assert (tmp_path / "x.toml").read_bytes() == tuned.read_bytes()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--shapes", "3y4"), "--shapes: '3y4' is not allowed; give shapes in x out such as 4096x11008"),
            (("--shapes", "0x4"), "--shapes: '0x4'"),
            (("--arch", "llama-9m", "--shapes", "3x4"), "--shapes: given beside --arch"),
            (("--arch", "llama-9m", "--experts", "4x2:3x4"), "--experts: given beside --arch"),
            (("--experts", "4:3x4"), "--experts: '4:3x4' is not allowed; give experts x those of a token : in x out"),
            (("--experts", "4x5:3x4"), "--experts: '4x5:3x4' is not allowed"),
            (("--experts", "4x2:3x0"), "--experts: '3x0' is not allowed"),
            (("--experts", "4x2:8x8", "--rank", "9"), "--rank: "),
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
