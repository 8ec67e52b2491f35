"""Records: what they allow, and that every limit in one reaches what is emitted."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runlora_gen.algebra.operations import Fused
from runlora_gen.emit import kernel_notes
from runlora_gen.emit.kernel_notes import KernelNode
from runlora_gen.emit.render import render
from runlora_gen.kernels.record import Bounds, Kernel, block_rank
from runlora_gen.kernels.registry import FOLDER, KERNELS
from runlora_gen.kernels.sites import OPERATIONS

NAMES = list(KERNELS)
GEMM = KERNELS["fused_gemm"]
#: The classes that hold codes, by the kernels that read them: a name, and how many parts it has.
HOLDS = {"dequantize": ("quantized_codes", 11), "rescale": ("quantized_scaled", 5)}
#: What an operator takes of how rows are sorted by expert.
ROUTING = ("rows", "places", "starts", "top_k")
#: What a launch and an operator take of codes that a wrapper is given, where that is not all that is held.
TAKEN = {
    "fused_gemm_8": {"left": ("left", "left_scale"), "right": ("right", "scale")},
}


def parts_of(name: str) -> list[str]:
    """What the class holds that a kernel's Q is of, in order."""
    template, count = HOLDS[name.removesuffix("_merged")]
    text = (FOLDER.parents[2] / "templates" / "parts" / f"{template}.jinja").read_text(encoding="utf-8")
    found = re.findall(r"^    (\w+): ", text.partition("\n    @staticmethod")[0], re.MULTILINE)
    assert len(found) == count
    return found


def rendered(name: str, template: str) -> str:
    return render(f"kernels/{name}/{template}.jinja", {"kernel": KernelNode(name)})


def defined(text: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMES)
def test_every_template_renders(name: str) -> None:
    """To Python that defines what the others of the folder, and the emitted calls, refer to."""
    kernel = defined(rendered(name, "device"))[f"_{name}_kernel"]
    (decorator,) = (ast.unparse(decorator) for decorator in kernel.decorator_list)
    assert decorator.startswith("triton.jit")
    launch = rendered(name, "launch")
    functions = defined(launch)
    assert {f"_{name}", f"_launch_{name}"} <= functions.keys()
    assert f"_{name}_kernel" in launch
    assert f"_{name}_operator(" in ast.unparse(functions[f"_{name}"])
    (assignment,) = ast.parse(rendered(name, "operator")).body
    assert isinstance(assignment, ast.Assign) and ast.unparse(assignment.targets[0]) == f"_{name}_operator"
    # The operator takes what the launch and the wrapper do, and the call gives it.
    schema = ast.literal_eval(assignment.value.args[0])  # type: ignore[attr-defined]
    arguments = [argument.arg for argument in functions[f"_launch_{name}"].args.args]
    taken = [text.split()[-1] for text in re.findall(r"\((.*)\) ->", schema)[0].split(", ")]
    if "Q" in arguments:  # an operator takes the parts of what codes are held in, one by one
        parts = parts_of(name)
        assert arguments[0] == "Q" and taken[: len(parts)] == parts
        taken[: len(parts)] = "Q"
    if "routing" in arguments:
        at = arguments.index("routing")
        assert taken[at : at + len(ROUTING)] == [*ROUTING]
        taken[at : at + len(ROUTING)] = ["routing"]
    if "dtypes" in arguments:  # an operator takes each by itself
        at, count = arguments.index("dtypes"), sum(argument.endswith("dtype") for argument in taken)
        assert all(argument.endswith("dtype") for argument in taken[at : at + count])
        taken[at : at + count] = ["dtypes"]
    if KERNELS[name].spends:
        assert arguments.pop() == "into"
    assert taken == [*arguments[:-1], "*", "tiles"] and arguments[-1] == "tiles"
    # A kernel of several linears may be called with a dtype for each, and give all the same. One that is told what is
    # needed gets nothing to read for the rest.
    wrapper = functions[f"_{name}"].args
    called = [argument.arg for argument in wrapper.args]
    alike = "dtypes" if "dtypes" in arguments else "dtype"
    given = [alike if argument == "dtypes" else argument for argument in called if argument != "needs"]
    given += [argument.arg for argument in wrapper.kwonlyargs if argument.arg not in ("tiles", "spend")]
    assert any(argument.arg == "spend" for argument in wrapper.kwonlyargs) == KERNELS[name].spends
    if name in TAKEN:
        assert sorted(part for arg in given for part in TAKEN[name].get(arg, (arg,))) == sorted(arguments[:-1])
    else:
        assert given == arguments[:-1]
    if KERNELS[name].call.startswith("{operands}"):  # of a single operation that is no product
        counts = {len(op.parts[0].reads) for op in OPERATIONS if isinstance(op, Fused) and op.kernel == name}
        assert counts == set(range(len(called) - len(wrapper.defaults), len(called) + 1))
    else:
        # Dtypes come together, one for each gradient of a parameter.
        dtypes = sum(argument.endswith("dtype") for argument in called)
        assert len(KERNELS[name].call.split(", ")) == len(called) - max(0, dtypes - 1)


def test_what_products_of_float8_take_says_so() -> None:
    """By it they are left out where a GPU has none of them."""
    names = {name for name, kernel in KERNELS.items() if kernel.float8}
    assert names == {*TAKEN, "x_at_largest", "p_db_largest", "largest", "quantize", "transpose"}
    assert names == {name for name, kernel in KERNELS.items() if "float8" in kernel.helpers}
    assert {name for name, kernel in KERNELS.items() if kernel.largest} == {"x_at_largest", "p_db_largest"}
    for name in ("x_at", "p_db"):
        one, other = KERNELS[name], KERNELS[f"{name}_largest"]
        assert other.tiles.items() <= one.tiles.items() and one.largest_rank == other.largest_rank and not one.float8
    assert not any(KERNELS[name].replaces for name in names), "they are in rows of the table"


@pytest.mark.parametrize("name", NAMES)
def test_records_are_whole(name: str) -> None:
    kernel = KERNELS[name]
    # Where no loop adds up products, there are no stages of one.
    single = name in HOLDS or kernel.call.startswith("{operands}") or name == "experts_weigh"
    assert kernel.launches > 0 and {"WARPS", *(() if single else ("STAGES",))} <= kernel.tiles.keys()
    assert single == ("STAGES" not in kernel.tiles)
    assert bool(kernel.small_tiles) == ("descriptors" in kernel.helpers)
    if kernel.priced_as is not None:
        own, others = kernel.tiles.keys(), KERNELS[kernel.priced_as].tiles.keys()
        assert others <= own or (name == "p_dbs" and own < others), "of the two ways of the other it has one"
    assert kernel.alone_to == (0, 0) or kernel.launches > 1
    assert kernel.seeded == ("seed" in kernel.call.split(", "))
    assert {} not in kernel.candidates


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_reaches_the_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another limit in the record is another one there, and none is none."""

    def launch(**changes: Any) -> str:
        changed = replace(KERNELS[name], **changes)
        monkeypatch.setattr(kernel_notes, "KERNELS", MappingProxyType({**KERNELS, name: changed}))
        return rendered(name, "launch")

    half, every = frozenset({"bf16", "fp16"}), frozenset({"bf16", "fp16", "fp32"})
    assert ".itemsize == 2" in (text := launch(dtypes=half)) or ".itemsize != 2" in text
    assert not re.search(r"itemsize (==|!=)", launch(dtypes=every))
    assert re.search(r"itemsize (==|!=) 4", launch(dtypes=frozenset({"fp32"})))
    with pytest.raises(ValueError, match="takes some dtypes of 2 bytes"):
        launch(dtypes=frozenset({"bf16"}))
    if KERNELS[name].largest_rank is None:
        with pytest.raises(ValueError, match=f"{name} has a largest rank, of which its launch says nothing"):
            launch(largest_rank=7)
    else:
        assert "<= 7 and" in launch(largest_rank=7)
        assert not re.search(r"shape\[1\] <= |max\(.*\) <= ", launch(largest_rank=None, most_columns=None))
    if KERNELS[name].most_tokens is None:
        with pytest.raises(ValueError, match=f"{name} has most tokens, of which its launch says nothing"):
            launch(most_tokens=7)
    else:
        assert "shape[0] <= 7 and" in launch(most_tokens=7)
        assert not re.search(r"shape\[0\] <= ", launch(most_tokens=None))
        assert "max(dy.shape[1] for dy in dY) <= 9 and" in launch(most_columns=9)
    if KERNELS[name].whole > 1:
        assert "whole=9)" in launch(whole=9) and "whole=" not in launch(whole=1).replace("whole=1)", "")
    if KERNELS[name].alone_to != (0, 0):
        assert "return T <= 7 and O <= 9" in launch(alone_to=(7, 9))
        assert f"{name}_apart_kernel" not in launch(alone_to=(0, 0))
    assert "(_TILES if tma else _SMALL_TILES)[tiles]" in launch(small_tiles=KERNELS[name].tiles)
    assert "constants = _TILES[tiles]" in launch(small_tiles={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiles": {**GEMM.tiles, "BM": 8}}, "BM = 8 is not allowed; give a power of two from 16 to 1024"),
        ({"candidates": ({"BN": 96},)}, "BN = 96 is not allowed; give a power of two from 16 to 1024"),
        ({"candidates": ({"BI": 64},)}, "no constant 'BI'; known are BM, BN, BK, "),
        ({"candidates": ({"PARTS": 4},)}, "PARTS = 4 is not allowed; give a power of two from 1 to 2"),
        ({"candidates": ({"STAGES": 9},)}, "STAGES = 9 is not allowed; give a whole number from 1 to 8"),
        ({"candidates": ({"WARPS": True},)}, "WARPS = True is not allowed; give a power of two from 1 to 16"),
        ({"small_tiles": {"BM": 64}}, "small tiles are of BM, not of BM, BN, BK, "),
        ({"bounds": {**GEMM.bounds, "BT": Bounds(1, 2)}}, "no constant 'BT'"),
        ({"adapted": {"BT": "BT"}}, "no constant 'BT'"),
    ],
)
def test_what_a_record_must_not_hold(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(GEMM, **changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", [name for name in NAMES if KERNELS[name].adapted])
@given(
    tokens=st.integers(1, 2**17),
    features=st.integers(1, 2**15),
    rank=st.integers(1, 128),
    rows=st.sampled_from((16, 64, 128, 256, 512, 1024)),
)
def test_what_a_launch_makes_of_constants(name: str, tokens: int, features: int, rank: int, rows: int) -> None:
    """The record tells what the emitted expression gives."""
    kernel = KERNELS[name]
    constants = {**kernel.tiles, **dict.fromkeys(kernel.adapted, rows)}
    scope = {"constants": constants, "T": tokens, "I": features, "BR": block_rank(rank)}  # WHOLE is a number there
    at = kernel.at(constants, tokens, features, rank)
    for constant in kernel.tiles:
        text = KernelNode(name).adapted(constant) if constant in kernel.adapted else f'constants["{constant}"]'
        assert at[constant] == eval(text, dict(scope))
    if name.startswith("experts_p_db"):  # as many elements of P at any rank, as far as tiles can be so low
        assert at["BT"] == max(16, rows * 16 // block_rank(rank))
    elif name.removesuffix("_dropped") in ("experts_activate", "mlp_activate"):
        # Where a tile of A has many rows, it has fewer columns.
        assert 16 <= at["BI"] <= rows and at["BI"] * block_rank(rank) <= max(rows * 64, 16 * block_rank(rank))
    elif name.removesuffix("_dropped") in ("experts_activate_backward", "mlp_activate_backward"):
        # As many elements of the sums at any rank, if there are that many columns.
        assert at["BI"] == min(rows, 4096 // block_rank(rank)) and at["WARPS"] <= 8
    elif name == "p_dbs":  # as many elements of dY a tile, in more rows where there are more
        assert at["DEEP"] * at["COLUMNS"] == rows * rows
    elif name.startswith("x_at"):  # as many elements a tile, or fewer
        assert (at["BT"], at["BI"]) in {(rows, rows), (16, 2 * rows)}
    else:
        assert 64 <= at["BT"] <= 512


def test_a_kernel_that_adapts_nothing() -> None:
    assert GEMM.at(GEMM.small_tiles, 100, 64, 8) == GEMM.small_tiles


def test_a_block_of_the_rank_is_the_emitted_one() -> None:
    (text,) = re.findall(r"def _block_rank.*?return ([^\n]*)\n", (FOLDER / "support.jinja").read_text(), re.DOTALL)
    for rank in range(1, 600):
        assert block_rank(rank) == eval(text, {"rank": rank})


def test_limits_of_dtype_and_rank() -> None:
    kernel = Kernel(launches=1, call="", tiles={}, dtypes=frozenset({"bf16"}), largest_rank=8)
    many = 10**6
    assert kernel.takes("bf16", 8, many, many)
    assert not kernel.takes("bf16", 9, 1, 1) and not kernel.takes("fp32", 8, 1, 1)
    assert replace(kernel, largest_rank=None).takes("bf16", many, 1, 1)
    few = replace(kernel, most_tokens=64, most_columns=8, launches=2, alone_to=(32, 4))
    assert few.takes("bf16", 8, 64, 8) and not few.takes("bf16", 8, 65, 8) and not few.takes("bf16", 8, 64, 9)
    assert few.takes_size(64, 8) and not few.takes_size(65, 8) and not few.takes_size(64, 9)
    assert [few.launches_at(*size) for size in ((32, 4), (33, 4), (32, 5))] == [1, 2, 2]


@given(rows=st.integers(1, 20000), columns=st.integers(1, 20000), processors=st.integers(1, 200))
def test_a_persistent_kernel_is_busy_for_whole_waves(rows: int, columns: int, processors: int) -> None:
    """Against tiles handed out one by one; a kernel of another kind has none."""
    tiles = math.ceil(rows / GEMM.tiles["BM"]) * math.ceil(columns / (GEMM.tiles["BN"] // GEMM.tiles["PARTS"]))
    waves = len(range(0, tiles, processors))
    assert GEMM.waves(rows, columns, processors) == pytest.approx(waves / (tiles / processors))
    assert KERNELS["p_db"].waves(rows, columns, processors) == 1


@given(
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=64).filter(any),
    columns=st.integers(1, 5000),
    processors=st.integers(1, 200),
)
def test_tiles_are_of_one_expert(sizes: list[int], columns: int, processors: int) -> None:
    """Never fewer tiles than rows fill, and never one more of each expert: half of one on average."""
    kernel = KERNELS["experts_gemm"]
    height, across = kernel.tiles["BM"], math.ceil(columns / kernel.tiles["BN"])
    rows, experts = sum(sizes), len(sizes)
    busy = kernel.waves(rows, columns, processors, experts) * rows / height * across / processors
    assert busy == pytest.approx(math.ceil((rows / height + min(experts, rows) / 2) * across / processors))
    tiles = sum(math.ceil(size / height) for size in sizes) * across
    assert abs(tiles - (rows / height + min(experts, rows) / 2) * across) <= min(experts, rows) * across / 2


def test_what_walks_over_tiles_has_their_sides() -> None:
    with pytest.raises(ValueError, match="the constants BM and BN"):
        replace(KERNELS["merge"], persistent=True)
