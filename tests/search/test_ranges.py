"""The choice for a whole model: what bounds its step, what runs below the asked counts, where thresholds stand."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from runlora_gen.algebra.enumerate import Program
from runlora_gen.cost import device as device_module
from runlora_gen.cost.price import price, price_frozen, price_phase
from runlora_gen.cost.setting import Setting
from runlora_gen.cost.vector import DEVICE_BOUND, HOST_BOUND
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.layers import Layer, layers
from runlora_gen.request.workload import Workload
from runlora_gen.search import ranges as module
from runlora_gen.search.candidates import setting_for
from runlora_gen.search.choose import Decision, decide, decide_forward
from runlora_gen.search.criterion import QUANTITIES, Priced
from runlora_gen.search.ranges import (
    ALONE_HOST,
    BELOW,
    COMPILED_REST_DEVICE,
    COMPILED_REST_HOST,
    REST_DEVICE,
    REST_HOST,
    LayerChoice,
    Range,
    decide_model,
    decide_step,
    with_all,
)

ROOT = Path(__file__).parents[2]
H100 = (Path(device_module.__file__).parent / "devices" / "h100.toml").read_text(encoding="utf-8")
#: Adapters in the layers' dtype: a quarter of the programs, and the same questions.
WORKLOAD = Workload(adapter_dtype="bf16")

Profile = Callable[..., str]


@cache
def sites(name: str) -> tuple[Layer, ...]:
    return layers(load_architecture(name))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The path of the H100's profile with other figures: each factor multiplies what begins with its name."""
    folder = tmp_path_factory.mktemp("profiles")
    keys = {"host": r"host_us|kernel_host_us", "kernel_host": "kernel_host_us", "device": r"launch_us|bf16|fp16|fp32"}

    def write(**factors: float) -> str:
        text = H100
        for name, factor in factors.items():
            power = {"memory": "memory_gb_per_s"}.get(name, keys.get(name, name))
            # Rates fall where times grow.
            for key, value in re.findall(rf"^({power}) = ([\d.]+)$", text, re.M):
                scaled = float(value) / factor if key in ("bf16", "fp16", "fp32") else float(value) * factor
                text = text.replace(f"\n{key} = {value}\n", f"\n{key} = {scaled}\n")
        path = folder / ("_".join(f"{name}{factor}" for name, factor in factors.items()) + ".toml")
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def settings_of(workload: Workload, name: str, rank: int, tokens: int) -> list[Setting]:
    return [setting_of(workload, layer, rank, tokens) for layer in sites(name)]


def setting_of(workload: Workload, layer: Layer, rank: int, tokens: int) -> Setting:
    return setting_for(workload, layer.in_features, layer.out_features, rank, layer.bias, tokens)


def programs(decisions: Sequence[Decision]) -> list[Program]:
    return [decision.chosen.program for decision in decisions]


def rest_of(workload: Workload) -> tuple[float, float]:
    compiled = workload.launch == "compile"
    return (COMPILED_REST_DEVICE, COMPILED_REST_HOST) if compiled else (REST_DEVICE, REST_HOST)


def sums(workload: Workload, name: str, rank: int, tokens: int, chosen: Sequence[Program]) -> tuple[float, float]:
    """What device and host need of a step, reckoned anew: all linears, and the rest in units of the frozen ones."""
    rest_device, rest_host = rest_of(workload)
    device_s = host_s = 0.0
    for layer, setting, program in zip(sites(name), settings_of(workload, name, rank, tokens), chosen, strict=True):
        cost = price(program, setting)
        device_s += layer.count * (cost.device_s + rest_device * price_frozen(setting, DEVICE_BOUND))
        host_s += layer.count * (cost.host_s + rest_host * price_frozen(setting, HOST_BOUND))
    return device_s, host_s


def at(ranges: Sequence[Range], tokens: int) -> Range:
    """The range that a module takes at a token count."""
    return next(part for part in ranges if part.last_tokens is None or tokens <= part.last_tokens)


def allowed(workload: Workload, decision: Decision) -> list[Priced]:
    candidates = with_all(workload, decision).candidates
    return [c for c in candidates if workload.dtype == "fp32" or not c.program.lossy_in_16_bit]


def test_what_a_model_does_beside_its_linears_was_measured() -> None:
    """The medians of the result file."""
    rows = json.loads((ROOT / "tools" / "results" / "step_h100.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 3
    for constant, kind in ((REST_DEVICE, "device"), (REST_HOST, "host")):
        assert constant == round(statistics.median(row["rest_over_linears"][kind] for row in rows), 2)


def test_what_a_compiled_model_does_beside_its_linears_was_measured() -> None:
    """Of the device: compiled frozen steps over their linears alone, in the two result files."""

    def rows(name: str) -> dict:
        report = json.loads((ROOT / "tools" / "results" / name).read_text(encoding="utf-8"))
        return {row["shape"]: row for row in report["rows"]}

    models, steps = rows("model_h100.json"), rows("step_h100.json")
    both = [shape for shape in models if shape in steps]
    assert len(both) >= 2 and all(models[shape]["layers"] == steps[shape]["layers"] for shape in both)
    rest = [
        models[shape]["results"]["frozen"]["compiled"]["median_ms"] / steps[shape]["linears_alone"]["device_ms"] - 1
        for shape in both
    ]
    assert round(statistics.mean(rest), 2) == COMPILED_REST_DEVICE < REST_DEVICE
    assert round((10 + 2) / 14, 2) == COMPILED_REST_HOST < REST_HOST


def test_what_a_lone_linear_needs_beside_its_launches_was_measured() -> None:
    """The median of the result file; what was chosen for the largest of the measured steps that wait for the host."""
    found = []
    report = json.loads((ROOT / "tools" / "results" / "linear_h100_bf16_r16.json").read_text(encoding="utf-8"))
    for row in report["rows"]:
        layer = Layer(*map(int, row["shape"].split("x")), bias=False, count=1, projections=())
        workload = replace(WORKLOAD, dtype="bf16", device=report["profile"], tokens=(row["tokens"],))
        frozen_us = price_frozen(setting_of(workload, layer, row["rank"], row["tokens"]), HOST_BOUND) * 1e6
        if row["tokens"] == 2048:
            found += [
                (row["results"][contender]["eager"]["median_us"] - priced_us) / frozen_us
                for contender, priced_us in row["priced_host_us"].items()
            ]
        if row["tokens"] == 4096:
            (choice,) = decide_model(workload, (layer,), row["rank"], alone=True)
            chosen = choice.ranges[-1].decision.chosen.program
            assert chosen.id == row["chosen"]["generated for eager, 16-bit adapters"]
            assert chosen.id == row["chosen"]["generated, torch only"]
    assert round(statistics.median(found), 1) == ALONE_HOST


class TestBound:
    """Time is the whole step's: what one linear costs counts only where the step waits for it."""

    def test_where_the_device_is_the_slower_one_the_host_decides_nothing(self, profile: Profile) -> None:
        chosen = set()
        for factor in (0.01, 0.3, 1.0):
            workload = replace(WORKLOAD, device=profile(host=factor))
            decisions = decide_step(workload, sites("llama-13b"), 8, 2048)
            device_s, host_s = sums(workload, "llama-13b", 8, 2048, programs(decisions))
            assert device_s > host_s
            for decision in decisions:
                assert decision.host_share == DEVICE_BOUND
                measure = QUANTITIES["device"]
                best = min(measure(c.cost) for c in allowed(workload, decision))
                assert measure(decision.chosen.cost) == best == decision.chosen.cost.time_s
            chosen.add(tuple(program.id for program in programs(decisions)))
            if factor == 1.0:
                # Judged alone, as the slower of device and host, another program would be taken here.
                alone = [
                    min(allowed(workload, d), key=lambda c: max(c.cost.device_s, c.cost.host_s)) for d in decisions
                ]
                assert [c.program for c in alone] != programs(decisions)
        assert len(chosen) == 1

    def test_where_the_host_is_the_slower_one_the_device_decides_nothing(self, profile: Profile) -> None:
        chosen = set()
        for factor in (0.1, 1.0, 1.2):
            workload = replace(WORKLOAD, device=profile(device=factor))
            decisions = decide_step(workload, sites("llama-13b"), 8, 128)
            device_s, host_s = sums(workload, "llama-13b", 8, 128, programs(decisions))
            assert host_s > device_s
            faster = False
            for decision in decisions:
                assert decision.host_share == HOST_BOUND
                measure = QUANTITIES["host"]
                best = min(measure(c.cost) for c in allowed(workload, decision))
                assert measure(decision.chosen.cost) == best == decision.chosen.cost.time_s
                device_s = decision.chosen.cost.device_s
                faster |= any(c.cost.device_s < device_s for c in allowed(workload, decision))
            assert faster or factor != 1.0
            chosen.add(tuple(program.id for program in programs(decisions)))
        assert len(chosen) == 1

    def test_few_tokens_are_chosen_for_by_what_the_launch_mode_costs_the_host(self) -> None:
        """Eagerly kernels cost the host several operators, under torch.compile not even one."""
        eager = replace(WORKLOAD, tokens=(256,))
        chosen = {}
        for launch in ("eager", "compile"):
            workload = replace(eager, launch=launch)
            decisions = decide_step(workload, sites("llama-13b"), 8, 256)
            device_s, host_s = sums(workload, "llama-13b", 8, 256, programs(decisions))
            assert host_s > device_s
            for decision in decisions:
                assert decision.host_share == HOST_BOUND
                best = min(QUANTITIES["host"](c.cost) for c in allowed(workload, decision))
                assert QUANTITIES["host"](decision.chosen.cost) == best
            chosen[launch] = programs(decisions)
        assert not any(program.kernels for program in chosen["eager"])
        assert all(program.kernels for program in chosen["compile"])

    def test_a_compiled_step_waits_for_the_device_sooner(self) -> None:
        """Its launches cost the host less, and there are fewer of them beside the linears."""
        first = {}
        for launch in ("eager", "compile", "graph"):
            workload = replace(WORKLOAD, launch=launch)
            first[launch] = next(
                tokens
                for tokens in (16, 128, 256, 512, 1024, 2048, 4096, 8192)
                if decide_step(workload, sites("llama-13b"), 8, tokens)[0].host_share == DEVICE_BOUND
            )
        assert first["graph"] == 16 < first["compile"] < first["eager"] < 8192

    @pytest.mark.parametrize(("name", "rank"), [("llama-13b", 8), ("llama-3-8b", 16)])
    def test_a_step_is_never_longer_than_by_device_or_host_alone(self, profile: Profile, name: str, rank: int) -> None:
        shorter = 0
        for factor, tokens in itertools.product((0.7, 1.0, 1.4), (768, 1024)):
            workload = replace(WORKLOAD, device=profile(host=factor))
            settings = settings_of(workload, name, rank, tokens)
            decisions = decide_step(workload, sites(name), rank, tokens)
            (share,) = {decision.host_share for decision in decisions}
            # What stands in a decision was chosen under its share.
            assert programs(decisions) == [decide(workload, s, share).chosen.program for s in settings]
            ours = max(sums(workload, name, rank, tokens, programs(decisions)))
            ends = [
                max(sums(workload, name, rank, tokens, [decide(workload, s, end).chosen.program for s in settings]))
                for end in (DEVICE_BOUND, HOST_BOUND)
            ]
            assert ours <= min(ends) * (1 + 1e-12)
            shorter += ours < min(ends) * (1 - 1e-6)
            if DEVICE_BOUND < share < HOST_BOUND:
                assert ours < ends[0]
        assert shorter >= 2  # so that a mixture is found where there is one

    def test_the_rest_of_the_model_counts_and_does_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def share(device: float, host: float) -> float:
            monkeypatch.setattr(module, "REST_DEVICE", device)
            monkeypatch.setattr(module, "REST_HOST", host)
            return decide_step(replace(WORKLOAD, tokens=(1536,)), sites("llama-13b"), 8, 1536)[0].host_share

        assert DEVICE_BOUND < share(0.0, 0.0) < HOST_BOUND
        assert share(REST_DEVICE, REST_HOST) == DEVICE_BOUND
        alone, *_ = decide_model(replace(WORKLOAD, tokens=(1536,)), sites("llama-13b"), 8, alone=True)
        assert share(0.0, ALONE_HOST) == alone.ranges[-1].decision.host_share
        assert share(0.0, 100.0) == HOST_BOUND
        assert share(100.0, 100.0) == DEVICE_BOUND

    def test_a_layer_counts_as_often_as_the_model_has_it(self) -> None:
        """The same two shapes: many small ones and the host is the slower, many large ones and the device is."""
        small, large = (Layer(size, size, False, 1, ("x",)) for size in (512, 12288))

        def share(small_count: int, large_count: int) -> float:
            both = (replace(small, count=small_count), replace(large, count=large_count))
            return decide_step(WORKLOAD, both, 8, 2048)[0].host_share

        assert share(100, 1) == HOST_BOUND and share(1, 100) == DEVICE_BOUND

    def test_graphs_ignore_the_host(self, profile: Profile) -> None:
        found = set()
        for factor in (1.0, 100.0):
            workload = replace(WORKLOAD, device=profile(host=factor), launch="graph")
            for tokens in (16, 1024):
                decisions = decide_step(workload, sites("llama-13b"), 8, tokens)
                settings = settings_of(workload, "llama-13b", 8, tokens)
                assert all(decision.host_share == DEVICE_BOUND for decision in decisions)
                alone = [decide(workload, setting, DEVICE_BOUND).chosen.program for setting in settings]
                assert programs(decisions) == alone
                found.add((tokens, *(program.id for program in alone)))
            choices = decide_model(replace(workload, tokens=(1024,)), sites("llama-13b"), 8)
            assert all(p.decision.host_share == 0 for c in choices for p in (*c.ranges, *c.forwards))
        assert len(found) == 2
        # Launched eagerly the host is all that counts there.
        eager = decide_step(replace(WORKLOAD, device=profile(host=100.0)), sites("llama-13b"), 8, 1024)
        assert eager[0].host_share == HOST_BOUND

    @pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
    def test_the_default_is_what_graphs_get_where_the_device_bounds_the_step(self, adapter_dtype: str) -> None:
        """Judged alone, each of these linears would wait for the host, and torch's products would be taken."""
        eager, graph = (
            decide_step(Workload(launch=launch, adapter_dtype=adapter_dtype), sites("llama-13b"), 8, 2048)
            for launch in ("eager", "graph")
        )
        assert programs(eager) == programs(graph)
        assert [d.fallback.program for d in eager] == [d.fallback.program for d in graph]
        assert all("fused_gemm" in decision.chosen.program.kernels for decision in eager)
        assert any(decision.chosen.cost.host_s > decision.chosen.cost.device_s for decision in eager)

    def test_a_threshold_of_what_runs_on_16_bit_weights_alone(self) -> None:
        workload = Workload(tokens=(64, 65536), dtype="fp32", device="cpu", train=("b",))
        layer = Layer(64, 64, False, 1, ("x",))
        (choice,) = decide_model(workload, [layer], 8)
        low, high = next(
            (a, b)
            for a, b in itertools.pairwise(choice.ranges)
            if a.decision.chosen.program is b.decision.chosen.program
        )
        assert low.last_tokens is not None

        def time_s(part: Range[Decision], tokens: int) -> float:
            return price(part.decision.fallback.program, setting_of(workload, layer, 8, tokens)).time_s

        assert low.decision.fallback.program is not high.decision.fallback.program
        assert time_s(low, low.last_tokens) <= time_s(high, low.last_tokens)
        assert time_s(low, low.last_tokens + 1) > time_s(high, low.last_tokens + 1)


class TestBelow:
    """A module may run at fewer tokens than were asked for."""

    def test_merging_is_for_many_tokens(self) -> None:
        workload = Workload(tokens=(2048,), dtype="fp32", device="cpu")
        for choice in decide_model(workload, sites("llama-250m"), 8):
            assert at(choice.ranges, 2048).decision.chosen.program.lossy_in_16_bit
            assert at(choice.forwards, 2048).decision.chosen.lossy_in_16_bit
            for tokens in (1, 16, 128):
                assert not at(choice.ranges, tokens).decision.chosen.program.lossy_in_16_bit
                assert not at(choice.forwards, tokens).decision.chosen.lossy_in_16_bit
            for part in (*choice.ranges, *choice.forwards):
                fallback = part.decision.fallback
                assert not (fallback.program if isinstance(fallback, Priced) else fallback).lossy_in_16_bit

    @pytest.mark.parametrize(
        ("name", "rank", "workload"),
        [
            ("llama-250m", 8, Workload(tokens=(2048,), dtype="fp32", device="cpu")),
            ("llama-13b", 8, WORKLOAD),
            ("llama-9m", 8, replace(WORKLOAD, tokens=(100, 5000), launch="graph")),
        ],
        ids=["cpu", "h100", "graph"],
    )
    def test_what_runs_there_is_hardly_slower_than_the_best(self, name: str, rank: int, workload: Workload) -> None:
        choices = decide_model(workload, sites(name), rank)
        for tokens in (count for count in BELOW if count < workload.tokens[0]):
            for choice, best in zip(choices, decide_step(workload, sites(name), rank, tokens), strict=True):
                for kind in ("chosen", "fallback"):
                    program = getattr(at(choice.ranges, tokens).decision, kind).program
                    least = getattr(best, kind).cost.time_s
                    assert price(program, best.setting, best.host_share).time_s <= least * 1.05

    def test_what_is_asked_for_is_not_changed_by_what_lies_below(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with_below = decide_model(WORKLOAD, sites("llama-13b"), 8)
        assert {part.decision.setting.tokens for c in with_below for part in c.ranges} == {128, 1024, 4096}
        monkeypatch.setattr(module, "BELOW", ())
        for choice, alone in zip(with_below, decide_model(WORKLOAD, sites("llama-13b"), 8), strict=True):
            assert [part.last_tokens for part in alone.ranges] == [None]
            assert choice.ranges[-1].decision.chosen.program is alone.ranges[0].decision.chosen.program

    def test_the_other_criteria_hold_there_too(self) -> None:
        workload = replace(WORKLOAD, kernels=False, criterion="memory", train=("b",))
        for choice in decide_model(workload, sites("llama-9m"), 128):
            for tokens in (1, 16, 128, 1024):
                best = decide(workload, setting_of(workload, choice.layer, 128, tokens))
                program = at(choice.ranges, tokens).decision.chosen.program
                assert price(program, best.setting).memory_bytes == best.chosen.cost.memory_bytes


ASKED = (16, 1024, 65536)
RANGES = [
    # architecture, rank, workload: at least two ranges of one layer each
    ("llama-13b", 8, replace(WORKLOAD, launch="graph")),
    ("llama-13b", 128, Workload(dtype="fp32", launch="graph")),
    ("llama-13b", 8, Workload(dtype="fp32", criterion="flops", train=("b",))),
    ("llama-250m", 8, Workload(input_grad=False, kernels=False, launch="graph")),
    ("llama-9m", 128, replace(WORKLOAD, kernels=False, criterion="memory", train=("b",))),
    ("llama-13b", 8, Workload(dtype="fp32", device="cpu", train=("b",))),
    ("llama-13b", 8, WORKLOAD),
]


def chosen_and_fallback(decision) -> tuple:
    found = decision.chosen, decision.fallback
    return tuple(one.program if isinstance(one, Priced) else one for one in found)


@pytest.mark.parametrize(("name", "rank", "workload"), RANGES, ids=lambda value: str(value)[:12])
class TestThresholds:
    @pytest.fixture
    def choices(self, name: str, rank: int, workload: Workload) -> tuple[LayerChoice, ...]:
        return decided(name, rank, replace(workload, tokens=ASKED))

    def test_ranges_ascend_and_the_last_has_no_end(self, choices: tuple[LayerChoice, ...]) -> None:
        assert any(len(choice.ranges) > 1 for choice in choices)
        for ranges in (ranges for choice in choices for ranges in (choice.ranges, choice.forwards)):
            *ends, last = (part.last_tokens for part in ranges)
            assert last is None and ends == sorted(set(ends))
            for low, high in itertools.pairwise(ranges):
                assert chosen_and_fallback(low.decision) != chosen_and_fallback(high.decision)
                assert low.decision.setting.tokens <= low.last_tokens < high.decision.setting.tokens

    def test_at_an_asked_count_runs_what_is_decided_there(
        self, name: str, rank: int, workload: Workload, choices: tuple[LayerChoice, ...]
    ) -> None:
        workload = replace(workload, tokens=ASKED)
        for number, tokens in enumerate(ASKED):
            for choice, decision in zip(choices, decide_step(workload, sites(name), rank, tokens), strict=True):
                ours = chosen_and_fallback(at(choice.ranges, tokens).decision)
                best = chosen_and_fallback(decision)
                if ours != best:  # only from the second one on, by time, and where it makes no difference
                    assert number and workload.criterion == "time"
                for mine, theirs in zip(ours, best, strict=True):
                    time_s = price(mine, decision.setting, decision.host_share).time_s
                    assert time_s <= 1.01 * price(theirs, decision.setting, decision.host_share).time_s
                part = at(choice.forwards, tokens).decision
                share = forward_share(name, rank, workload, tokens)
                y_alone = decide_forward(workload, decision.setting, share)
                for mine, theirs in zip(chosen_and_fallback(part), chosen_and_fallback(y_alone), strict=True):
                    assert number or mine is theirs
                    times = [price_phase(phase, decision.setting).weighted_s(share) for phase in (mine, theirs)]
                    assert times[0] <= 1.01 * times[1]


#: In the last of these cases the bound of the step changes from range to range: see the next test but one.
@pytest.mark.parametrize(("name", "rank", "workload"), RANGES[:-1], ids=lambda value: str(value)[:12])
def test_thresholds_stand_where_the_prices_cross(name: str, rank: int, workload: Workload) -> None:
    """At its last token count the one winner is still as good, one above it the other."""
    measure = QUANTITIES[workload.criterion]
    for choice in decided(name, rank, replace(workload, tokens=ASKED)):
        for low, high in itertools.pairwise(choice.ranges):
            for program, rival, tokens in at_the_threshold(low, high):
                setting = setting_of(workload, choice.layer, rank, tokens)
                assert measure(price(program, setting)) <= measure(price(rival, setting))
        for low, high in itertools.pairwise(choice.forwards):
            for phase, rival, tokens in at_the_threshold(low, high):
                setting = setting_of(workload, choice.layer, rank, tokens)
                mine, other = price_phase(phase, setting), price_phase(rival, setting)
                by_host = workload.launch == "eager" and mine.host_s <= other.host_s
                assert mine.device_s <= other.device_s or by_host


def at_the_threshold(low: Range, high: Range) -> list[tuple]:
    """Who must be at least as good as whom at the last token count of one range, and at the first of the next."""
    pairs = zip(chosen_and_fallback(low.decision), chosen_and_fallback(high.decision), strict=True)
    below, above = next(pair for pair in pairs if pair[0] is not pair[1])
    return [(below, above, low.last_tokens), (above, below, low.last_tokens + 1)]


@cache
def decided(name: str, rank: int, workload: Workload) -> tuple[LayerChoice, ...]:
    return decide_model(workload, sites(name), rank)


def forward_sums(name: str, rank: int, workload: Workload, tokens: int, share: float) -> tuple[float, float]:
    """What device and host need of a step that computes no gradients: the rest of the model has none there either."""
    device_s = host_s = 0.0
    for layer, setting in zip(sites(name), settings_of(workload, name, rank, tokens), strict=True):
        cost, frozen = price_phase(decide_forward(workload, setting, share).chosen, setting), no_gradients(setting)
        device_s += layer.count * (cost.device_s + REST_DEVICE * price_frozen(frozen, DEVICE_BOUND))
        host_s += layer.count * (cost.host_s + REST_HOST * price_frozen(frozen, HOST_BOUND))
    return device_s, host_s


def no_gradients(setting: Setting) -> Setting:
    return replace(setting, gradients=frozenset())


def forward_share(name: str, rank: int, workload: Workload, tokens: int) -> float:
    """The host's share under which such a step is shortest."""
    device_s, host_s = forward_sums(name, rank, workload, tokens, DEVICE_BOUND)
    if workload.launch == "graph" or host_s <= device_s:
        return DEVICE_BOUND
    steps = {n / 32: max(forward_sums(name, rank, workload, tokens, n / 32)) for n in range(33)}
    return min(steps, key=lambda share: (steps[share], share != DEVICE_BOUND, -share))


@pytest.mark.parametrize("tokens", [1664, 2304])  # where a step with gradients would be bound by something else
def test_y_alone_is_chosen_for_a_step_without_gradients(tokens: int) -> None:
    workload = replace(WORKLOAD, tokens=(tokens,))
    choices = decide_model(workload, sites("llama-13b"), 8)
    share = at(choices[0].forwards, tokens).decision.host_share
    shortest = forward_share("llama-13b", 8, workload, tokens)
    ours, best = (max(forward_sums("llama-13b", 8, workload, tokens, each)) for each in (share, shortest))
    assert ours == pytest.approx(best, rel=1e-9)


def test_between_the_bounds_a_step_is_as_short_as_with_either_winner() -> None:
    """The host bounds a step at 512 tokens, the device at 2048: each linear changes its program where that helps."""
    workload = replace(WORKLOAD, tokens=(512, 2048))
    choices = decide_model(workload, sites("llama-13b"), 8)
    low, high = ([at(c.ranges, tokens).decision.chosen.program for c in choices] for tokens in workload.tokens)
    assert all(a is not b for a, b in zip(low, high, strict=True))
    ends = {choice.ranges[-2].last_tokens for choice in choices}
    assert len(ends) > 1 and all(512 < end < 2048 for end in ends)
    for tokens in (*range(512, 2049, 128), *ends, *(end + 1 for end in ends)):
        mixed = [at(c.ranges, tokens).decision.chosen.program for c in choices]
        ours, *either = (max(sums(workload, "llama-13b", 8, tokens, chosen)) for chosen in (mixed, low, high))
        assert ours <= min(either) * (1 + 1e-12)


def test_one_winner_is_one_range() -> None:
    workload = Workload(tokens=(4096, 8192, 4096), kernels=False, launch="graph", adapter_dtype="bf16")
    (choice,) = decide_model(workload, (Layer(5120, 5120, False, 1, ("x",)),), 8)
    assert choice.ranges[-1].last_tokens is None and choice.ranges[-1].decision.setting.tokens <= 4096
    assert all(part.last_tokens < 4096 for part in choice.ranges[:-1])


def test_limit_on_saved_bytes_holds_up_to_the_threshold() -> None:
    """What wins at few tokens may not run on to where it would save more than the limit."""
    free = Workload(tokens=(4096, 8192), kernels=False, launch="graph", adapter_dtype="bf16")
    layer = Layer(5120, 5120, False, 1, ("x",))
    small, large = (setting_of(free, layer, 8, tokens) for tokens in free.tokens)
    low = decide(free, small).chosen.program
    limit = min(candidate.cost.saved_bytes for candidate in decide(free, large).candidates)
    limited = replace(free, max_saved_bytes=limit)
    (choice,) = decide_model(limited, (layer,), 8)
    assert at(choice.ranges, 4096).decision.chosen.program is low
    assert at(choice.ranges, 8192).decision.chosen.program is not low
    end = at(choice.ranges, 4096).last_tokens
    saved = [price(low, setting_of(free, layer, 8, tokens)).saved_bytes for tokens in (end, end + 1)]
    assert saved[0] <= limit < saved[1]


def test_a_limit_that_no_variant_meets_is_named() -> None:
    with pytest.raises(SpecError, match="the smallest feasible value is"):
        decide_model(replace(WORKLOAD, max_saved_bytes=1), sites("llama-9m"), 8)


def test_kernels_that_make_no_difference_make_no_range() -> None:
    """At 2048 tokens the kernel for S is 0.5 µs of 300 faster, at 16384 torch is: no reason for two functions."""
    workload = replace(WORKLOAD, tokens=(2048, 16384), device="h200", launch="graph")
    layer = Layer(5120, 5120, False, 1, ("x",))
    apart = [decide(workload, setting_of(workload, layer, 16, tokens)) for tokens in workload.tokens]
    first, second = (decision.chosen.program for decision in apart)
    assert first is not second and first.plain_id == second.plain_id
    (choice,) = decide_model(workload, (layer,), 16)
    assert at(choice.ranges, 2048) is at(choice.ranges, 16384)
    assert at(choice.ranges, 2048).decision.chosen.program is first
    loss = price(first, apart[1].setting).time_s / apart[1].chosen.cost.time_s
    assert 1 < loss < 1.01
