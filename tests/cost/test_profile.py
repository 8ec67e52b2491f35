"""The files of profiles: what is written is what is read, compactly, and what is no profile is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.operations import Fused, dimensions
from runlora_gen.cost.device import device_of, load_device
from runlora_gen.cost.profile import Profile, parse_toml, read_profile, render_profile
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import WORKS
from runlora_gen.request.errors import SpecError
from runlora_gen.request.workload import DTYPE_NAMES

from .tables import tiles, times

DEVICES = Path(__file__).parents[2] / "generator" / "runlora_gen" / "cost" / "devices"
BASE = """\
format = 2
title = "A machine"
source = "a test"
memory_gb_per_s = 1000
launch_us = 1
host_us = 10
tflops = { bf16 = 100, fp16 = 100, fp32 = 10 }
"""


def read(text: str) -> Profile:
    return read_profile(parse_toml(text.encode()))


figures = st.floats(1e-6, 1e12)
counts = st.integers(1, 2**31)


def sizes_of(key: str) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(counts | st.sampled_from([8, 16]) for _ in dimensions(WORKS[key])))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any that a file may hold: each table with holes, where not every size was measured."""

    def measured(keys: list[str], what: st.SearchStrategy) -> dict:
        chosen = draw(st.lists(st.sampled_from(keys), unique=True, max_size=4))
        return {key: draw(st.dictionaries(sizes_of(key), what, min_size=1, max_size=6)) for key in chosen}

    def constants(key: str) -> st.SearchStrategy[dict[str, int]]:
        operation = WORKS[key]
        assert isinstance(operation, Fused)
        return st.sampled_from([{}, *map(dict, KERNELS[operation.kernel].candidates)])

    kernels = [key for key, operation in WORKS.items() if isinstance(operation, Fused)]
    dtypes = st.lists(st.sampled_from(DTYPE_NAMES), unique=True)
    tuned = {dtype: draw(st.lists(st.sampled_from(kernels), unique=True, min_size=1)) for dtype in draw(dtypes)}
    kernel, compiled = (draw(st.none() | figures) for _ in range(2))
    return Profile(
        title=draw(st.from_regex(r"[A-Za-z0-9 ()@.,:+/_-]{1,60}", fullmatch=True)),
        source=draw(st.text(st.characters(exclude_categories=("C",)))),
        memory_gb_per_s=draw(figures),
        launch_us=draw(figures),
        host_us=draw(figures),
        tflops={dtype: draw(figures) for dtype in DTYPE_NAMES},
        date=draw(st.none() | st.dates().map(str)),
        compute_capability=draw(st.none() | st.just("9.0")),
        multiprocessors=draw(st.none() | st.integers(1, 4096)),
        kernel_host_us=kernel,
        compiled_host_us=compiled,
        compiled_kernel_host_us=None if kernel is None or compiled is None else draw(figures),
        measured_on=draw(st.none() | st.just("h200")),
        times={dtype: measured(list(WORKS), figures) for dtype in draw(dtypes)},
        tiles={
            dtype: {key: draw(st.dictionaries(sizes_of(key), constants(key), min_size=1, max_size=6)) for key in keys}
            for dtype, keys in tuned.items()
        },
    )


@settings(max_examples=40, deadline=None)
@given(profile=profiles())
def test_what_is_written_is_read(profile: Profile) -> None:
    text = render_profile(profile)
    assert read(text) == profile and render_profile(read(text)) == text


@pytest.mark.parametrize("key", WORKS)
def test_every_kind_of_work_has_a_table(key: str) -> None:
    first, second = (
        {size: 1.5 * sum(size) for size in [tuple(range(i, i + len(dimensions(WORKS[key]))))]} for i in (2, 9)
    )
    times = {**first, **second}
    profile = Profile("A", "b", 1, 1, 1, dict.fromkeys(DTYPE_NAMES, 1.0), times={"bf16": {key: times}})
    assert read(render_profile(profile)).times["bf16"] == {key: times}


def test_a_line_holds_many_sizes() -> None:
    """A column a token count and rank, a line a shape: as by hand."""
    measured = {(t, i, r): float(t + i + r) for t in (512, 2048) for i in (1024, 128) for r in (8, 16)}
    del measured[2048, 128, 16]
    best = {size: {} for size in measured} | {(512, 1024, 8): {"BT": 128, "BI": 128}, (512, 128, 8): {"BI": 128}}
    profile = Profile(
        title="A machine",
        source="a test",
        memory_gb_per_s=1000,
        launch_us=0.5,
        host_us=10,
        tflops={"bf16": 100, "fp16": 100, "fp32": 10},
        times={"bf16": {"TI,RI->TR scaled": measured}},
        tiles={"bf16": {"x_at: TI,RI->TR scaled": best}},
    )
    assert render_profile(profile) == """\
format = 2
title = "A machine"
source = "a test"
memory_gb_per_s = 1000
launch_us = 0.5
host_us = 10

[tflops]
bf16 = 100
fp16 = 100
fp32 = 10

# Microseconds, by tokens and rank across and by I x O down.
[times.bf16]
"TI,RI->TR scaled" = '''
T     512  512 2048 2048
R       8   16    8   16
128   648  656 2184    -
1024 1544 1552 3080 3088
'''

# The best constants of kernels, each by its place in the list.
[tiles.bf16."x_at: TI,RI->TR scaled"]
constants = [{}, {BI = 128}, {BT = 128, BI = 128}]
best = '''
T    512 512 2048 2048
R      8  16    8   16
128    1   0    0    -
1024   2   0    0    0
'''
"""


@pytest.mark.parametrize("path", sorted(DEVICES.glob("*.toml")), ids=lambda path: path.stem)
def test_those_of_the_package_are_compact_and_as_they_are_written(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rows = [
        line for line in text.splitlines() if not line.startswith(("[tiles", '"'))
    ]  # works have names of any length
    assert len(text) < 40_000 and text.count("\n") < 900 and max(map(len, rows)) < 140
    profile = read(text)
    if profile.times:
        head, _, tables = text.partition("[tflops]")
        rendered = render_profile(profile).partition("[tflops]")
        assert tables == rendered[2]
        # Beside tables of another profile, which stand in for those that it lacks, figures were put in by hand.
        if profile.measured_on is None:
            assert head == rendered[0]
            assert sum(len(times) for by_work in profile.times.values() for times in by_work.values()) > text.count(
                "\n"
            )


KERNEL, COMPILED, BOTH = "kernel_host_us = 20\n", "compiled_host_us = 5\n", "compiled_kernel_host_us = 4\n"


@pytest.mark.parametrize("lines", ["", KERNEL, COMPILED, KERNEL + COMPILED + BOTH], ids=lambda lines: lines.split())
def test_what_launches_cost_under_compile_may_be_absent(lines: str) -> None:
    profile = read(BASE.replace("host_us = 10\n", f"host_us = 10\n{lines}"))
    assert profile.host_us == 10 and profile.kernel_host_us == (20 if KERNEL in lines else None)
    assert profile.compiled_host_us == (5 if COMPILED in lines else None)
    assert profile.compiled_kernel_host_us == (4 if BOTH in lines else None)


@pytest.mark.parametrize("lines", [KERNEL + COMPILED, KERNEL + BOTH, COMPILED + BOTH, BOTH])
def test_kernels_cost_something_wherever_they_run(lines: str) -> None:
    with pytest.raises(ValueError, match=r"^compiled_kernel_host_us: give it where there are kernel_host_us and compi"):
        read(BASE.replace("host_us = 10\n", f"host_us = 10\n{lines}"))


@pytest.mark.parametrize("key", ["compiled_host_us", "compiled_kernel_host_us"])
@pytest.mark.parametrize("value", ["0", "-1", "true", '"3"', "nan", "inf"])
def test_launches_under_compile_are_positive_numbers(key: str, value: str) -> None:
    text = BASE.replace("host_us = 10\n", f"host_us = 10\n{KERNEL}{COMPILED}{BOTH}")
    with pytest.raises(ValueError, match=rf"^{key}: .* is not allowed; give a number from 1e-6 to 1e12$"):
        read(re.sub(rf"(?m)^{key} = \d+$", f"{key} = {value}", text))


POWER = "strided_gb_per_s = 1400\nthrottle_from = 0.6\nthrottle = 0.5\n"


def test_the_limit_of_power_may_be_known() -> None:
    """Products take longer by half of the share of a step's time that they have above 0.6."""
    device = device_of("m", parse_toml(BASE.replace("host_us = 10\n", f"host_us = 10\n{POWER}").encode()))
    assert device.strided_bytes_per_s == 1.4e12 and device.throttle == (0.6, 0.5)
    assert device.throttled_s(0.8, 1.0) == pytest.approx(0.8 * 0.5 * 0.2)
    assert device.throttled_s(0.6, 1.0) == device.throttled_s(0.1, 1.0) == device.throttled_s(0.0, 0.0) == 0.0
    unknown = device_of("m", parse_toml(BASE.encode()))
    assert unknown.strided_bytes_per_s is None and unknown.throttled_s(0.9, 1.0) == 0.0


@pytest.mark.parametrize("value", ["1", "-0.1", "true", '"0.5"', "nan"])
def test_the_share_of_products_is_one(value: str) -> None:
    text = BASE.replace("host_us = 10\n", f"host_us = 10\n{POWER.replace('0.6', value)}")
    with pytest.raises(ValueError, match=r"^throttle_from: .* is not allowed; give a number from 0, below 1$"):
        read(text)


@pytest.mark.parametrize("line", ["throttle_from = 0.6", "throttle = 0.5"])
def test_the_limit_of_power_has_two_figures(line: str) -> None:
    with pytest.raises(ValueError, match=r"^throttle: give it where there is throttle_from, and nowhere else$"):
        read(BASE.replace("host_us = 10\n", f"host_us = 10\n{line}\n"))


def test_an_older_version_s_tables_are_refused_on_one_line(tmp_path: Path) -> None:
    """They were keyed by formulas, and said no format. Figures alone are read as ever."""
    old = BASE.replace("format = 2\n", "")
    table = '[times.bf16]\n"Y = X Wᵀ + b" = [[1024, 512, 512, 30]]\n'
    for text in (old + table, f"format = 1\n{old}{table}"):
        (tmp_path / "old.toml").write_text(text, encoding="utf-8")
        with pytest.raises(SpecError) as caught:
            load_device(str(tmp_path / "old.toml"))
        label, _, what = str(caught.value).partition(".toml': ")
        assert label.startswith("--device: '")
        assert what == (
            "not a device profile: its tables are of an older version of runlora-gen; measure the machine again, into "
            "another file: runlora-gen tune -o FILE.toml"
        )
    assert read(old) == read(f"format = 1\n{old}") == read(BASE)


WIDE, LOW = "TI,OI->TO biased", "TI,RI->TR scaled"
TIMES_OF, GIVE = f"times of '{WIDE}': ", "is not allowed; give"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (times("TI,OI->TX", "T 1", "1x1 1"), "there is no operation 'TI,OI->TX'"),
        (times("Y = X Wᵀ + b", "T 1", "1x1 1"), "there is no operation 'Y = X Wᵀ \\+ b'"),
        (f'"{WIDE}" = 3', f"{TIMES_OF}3 {GIVE} a table as text"),
        (f'"{WIDE}" = [[1, 1, 1, 1]]', f"{TIMES_OF}\\[\\[1, 1, 1, ...\\]\\] {GIVE} a table as text"),
        (times(WIDE), f"{TIMES_OF}its first lines are not those of T$"),
        (times(WIDE, "1x1 1"), f"{TIMES_OF}its first lines are not those of T$"),
        (times(LOW, "T 1", "1 1"), f"times of '{LOW}': its first lines are not those of T and R"),
        (times(LOW, "R 1", "T 1", "1 1"), f"times of '{LOW}': its first lines are not those of T and R"),
        (times(WIDE, "T 1 2", "1x1 1"), f"{TIMES_OF}1 columns at '1x1', 2 at T"),
        (times(LOW, "T 1", "R 1 2", "1 1"), "2 columns at 'R', 1 at T"),
        (times(WIDE, "T 1", "1x1 1 1"), "2 columns at '1x1', 1 at T"),
        (times(WIDE, "T 1"), "there is no figure in it"),
        (times(WIDE, "T", "1x1"), "there is no figure in it"),
        (times(WIDE, "T 1", "1x1 -"), "there is no figure in it"),
        (times(WIDE, "T 1", "1 1"), f"{TIMES_OF}a line does not begin with I x O"),
        (times(WIDE, "T 1", "1x1x1 1"), "a line does not begin with I x O"),
        (times(WIDE, "T 1", "1.5x1 1"), f"{TIMES_OF}'1.5' {GIVE} a size from 1 to 2"),
        (times(WIDE, "T 1", "x1 1"), f"'' {GIVE} a size from 1 to 2"),
        (times(WIDE, "T 0", "1x1 1"), f"'0' {GIVE} a size from 1 to 2"),
        (times(WIDE, "T 01", "1x1 1"), f"'01' {GIVE} a size from 1 to 2"),
        (times(WIDE, "T \u0661", "1x1 1"), f"{GIVE} a size from 1 to 2"),
        (times(WIDE, f"T {2**31 + 1}", "1x1 1"), f"'2147483649' {GIVE} a size from 1 to 2"),
        (times(WIDE, f"T {10**400}", "1x1 1"), f"{GIVE} a size from 1 to 2"),
        (times(WIDE, "T 1 1", "1x1 1 1"), f"{TIMES_OF}T = 1 stands there twice"),
        (times(LOW, "T 1 1", "R 2 2", "1 1 1"), "T, R = 1, 2 stands there twice"),
        (times(WIDE, "T 1", "2x1 1", "2x1 1"), f"{TIMES_OF}I, O = 2, 1 stands there twice"),
        *(
            (times(WIDE, "T 1", f"1x1 {cell}"), f"{TIMES_OF}.* {GIVE} a number from 1e-6 to 1e12, or -$")
            for cell in ("-1", "0", "5e-324", "1e13", "nan", "inf", "+1", "1_0", ".5", "1.", "0x1", "\u0661", "x" * 999)
        ),
        (times(WIDE, "T 1", f"1x1 {'1' * 999}"), f"{GIVE} a number from 1e-6 to 1e12, or -$"),
        ("[times.bf17]\n" + times(WIDE, "T 1", "1x1 1"), "times: 'bf17' is not allowed; give one of "),
        (tiles('{"x\\ny" = 1}'), "no constant .*; known are BT, BO, WARPS, STAGES"),
        (tiles("{BT = true}"), "BT = True is not allowed"),
        (tiles("{BT = 100}"), "BT = 100 is not allowed; give a power of two from 16 to 1024"),
        (tiles("{STAGES = 9}"), "STAGES = 9 is not allowed; give a whole number from 1 to 8"),
        (tiles("{WARPS = 3}"), "WARPS = 3 is not allowed; give a power of two from 1 to 16"),
        (
            tiles("{}", "1"),
            "tiles of 'p_db: .*': '1' is not allowed; give the place of one of 1 constants, counted from 0",
        ),
        (tiles("{}", "-1"), "'-1' is not allowed; give the place of one of 1"),
        (tiles("{}", "0.0"), "'0.0' is not allowed; give the place of one of 1"),
        (tiles("{}", "9" * 999), "is not allowed; give the place of one of 1"),
        (tiles("{}", "-"), "there is no figure in it"),
        (tiles("{}", key="p_db: TO,OR->TX"), "there is no operation 'p_db: TO,OR->TX'"),
        (tiles("{}", key=LOW), f"tiles of '{LOW}': no kernel does this work"),
        ("[tiles.bf16]\n" + times("p_db: TO,OR->TR scaled; TO,TR->OR", "T 1"), "give constants and best"),
        ('[tiles.bf16."p_db: TO,OR->TR scaled; TO,TR->OR"]\nconstants = [{}]', "best is missing"),
        ('[tiles.bf16."p_db: TO,OR->TR scaled; TO,TR->OR"]\nbest = ""', "constants is missing"),
    ],
)
def test_a_broken_table_is_named(table: str, message: str) -> None:
    head = "" if table.startswith("[") else "[times.bf16]\n"
    with pytest.raises(ValueError, match=message) as caught:
        read(BASE + head + table)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
