"""The kernels of several linears against float64: each with a size and a rank of its own, two and three of them.

As those of one: without a GPU in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from runlora_gen.algebra.derivation import Derivation
from runlora_gen.algebra.group import group
from runlora_gen.algebra.mlp import LINEARS as MLP_LINEARS
from runlora_gen.algebra.operations import Fused
from runlora_gen.cost.device import load_device
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.emit.code import helpers_of
from runlora_gen.emit.kernel_notes import KernelCall
from runlora_gen.emit.nodes import SharedNode
from runlora_gen.emit.render import Header, render
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.measure.modules import import_file
from runlora_gen.request.activations import ACTIVATIONS
from runlora_gen.request.bases import BASES
from torch import Tensor

from ..kernels.several import operations
from .test_kernels import (
    BOTH,
    DESCRIPTORS,
    HALVES,
    Launches,
    Spy,
    check,
    draw,
    layouts,
    machines,
    multiples_of_8,
    poison,
    property_test,
    ranks,
    seeds,
    sizes,
)
from .test_kernels import (
    DTYPES as FLOATS,
)

__all__ = ["poison"]

LINEARS = ("q", "k", "v")
#: What the operations go by.
S, DA, Y, DX = "S_q, S_k, S_v", "dA_q, dA_k, dA_v", "Y_q, Y_k, Y_v", "dX"
P_DB = "P_q, dB_q, P_k, dB_k, P_v, dB_v"


def alone(folder: Path, operations_of: Mapping[Derivation, Sequence[Fused]], *, dropout: bool = False) -> ModuleType:
    """These kernels, with the table's tiles, as a folder has them for its modules."""
    half = DTYPES["fp16"]
    further = {**dict.fromkeys(("O_q", "O_k", "O_v"), 64), **dict.fromkeys(("R_q", "R_k", "R_v"), 8)}
    further |= {"E": 8, "N": 2048, "F": 128, "RU": 8, "I_down": 64}
    further |= {f"{index}_{linear}": size for linear in MLP_LINEARS for index, size in (("O", 64), ("R", 8))}
    calls = tuple(
        # Experts make symbols of the same names.
        KernelCall(
            op,
            Setting(4096, 64, 64, 8, half, half, False, frozenset(), load_device("a100"), site, further),
            "rows" if "g" in site.symbols else "tokens" if "Xr" in site.symbols else "",
        )
        for site, found in operations_of.items()
        for op in found
    )
    found = [call.operation for call in calls]
    of_experts = any("E" in symbol.shape for op in found for symbol in op.outputs)
    files = ("autograd", "products", *(("routing",) if of_experts else ()), "kernels")
    node = SharedNode(
        rank=8,
        arguments=list(operations_of)[-1].arguments,
        trains=(),
        frozen=(),
        wide_adapter=False,
        lossy_merge=False,
        dropout=dropout,
        base=BASES["plain"],
        dtype="torch.float16",
        helpers=frozenset[str]().union(*(KERNELS[op.kernel].helpers for op in found), *map(helpers_of, found)),
        calls=calls,
        function="lora_qkv",
        linears=LINEARS,
        lone=True,
        groups=True,
        of_groups=True,
        mlps=False,
        experts="routing" in files,
        activations=tuple(ACTIVATIONS.values()) if "routing" in files else (),
        handing=False,
        folder=True,
        width=120,
    )
    (folder / "__init__.py").touch()
    import_file(folder / "__init__.py", folder.name)
    for name in files:
        text = render(f"{name}.py.jinja", {"header": Header("", ""), "module": node})
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        module = import_file(folder / f"{name}.py", f"{folder.name}.{name}")
    assert module.KERNELS
    return module


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    found = {group(LINEARS): tuple(operations(LINEARS).values())}
    return alone(tmp_path_factory.mktemp("kernels_of_groups"), found)


@pytest.fixture
def launches(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Launches:
    noted = Launches()
    monkeypatch.setattr(kernels, "_PLANS", {})
    for name, value in list(vars(kernels).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Spy(name[1:].removesuffix("_kernel"), value, noted))
    return noted


@pytest.fixture
def resize(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(count: int) -> None:
        monkeypatch.setattr(kernels, "_multiprocessors", lambda device: count)
        kernels._PLANS.clear()

    return set_to


#: Of two linears or three: all have sizes of their own.
few = {"min_size": 2, "max_size": 3}
low = ranks.filter(lambda rank: rank <= 64)


def draw_each(seed: int, dtype: torch.dtype, layout: str, *shapes: tuple[int, int]) -> list[Tensor]:
    return [draw(seed + i, *shape, dtype, layout) for i, shape in enumerate(shapes)]


def doubles(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [matrix.double() for matrix in matrices]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS)
def test_x_ats(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    @property_test
    @example(T=5, I=2100, R=[5, 1, 33], machine=132, layout="aligned", seed=0)
    @example(T=5, I=2100, R=[16, 8], machine=132, layout="padded", seed=0)
    @example(T=5, I=2100, R=[5, 33], machine=1, layout="aligned", seed=0)
    @example(T=5, I=2100, R=[5, 1, 33], machine=1, layout="padded", seed=0)
    @given(T=sizes, I=sizes, R=st.lists(low, **few), machine=machines, layout=layouts, seed=seeds)
    def run(T: int, I: int, R: list[int], machine: int, layout: str, seed: int) -> None:  # noqa: E741
        resize(machine)
        X, *A = draw_each(seed, dtype, layout, (T, I), *((rank, I) for rank in R))
        scalings = [0.75, -2.0, 0.5][: len(R)]
        found = kernels._launch_x_ats(X, A, scalings, S)
        again = kernels._launch_x_ats(X, A, scalings, S)
        x = X.double()
        assert len(found) == len(R) and kernels._tma_serves(*found)
        for s, same, plain, a, scaling in zip(found, again, A, doubles(A), scalings, strict=True):
            check(s, scaling * (X @ plain.t()), scaling * x @ a.t(), abs(scaling) * x.abs() @ a.t().abs())
            assert torch.equal(s, same)

    run()
    assert launches.paths("x_ats", "TMA", "WHOLE") == BOTH


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS)
def test_pt_xs(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    @property_test
    @example(T=2100, I=5, R=[5, 1, 33], machine=132, layout="aligned", wide=False, seed=0)
    @example(T=2100, I=5, R=[16, 8], machine=132, layout="padded", wide=True, seed=0)
    @example(T=600, I=5, R=[5, 33], machine=1, layout="aligned", wide=True, seed=0)
    @example(T=68, I=64, R=[1, 5], machine=132, layout="contiguous", wide=False, seed=0)  # a column, then rows
    @example(T=17, I=256, R=[33, 16, 17], machine=132, layout="aligned", wide=False, seed=0)  # widths of several tiles
    @example(T=600, I=5, R=[5, 1, 33], machine=1, layout="padded", wide=False, seed=0)
    @given(T=sizes, I=sizes, R=st.lists(low, **few), machine=machines, layout=layouts, wide=st.booleans(), seed=seeds)
    def run(T: int, I: int, R: list[int], machine: int, layout: str, wide: bool, seed: int) -> None:  # noqa: E741
        resize(machine)
        X, *P = draw_each(seed, dtype, layout, (T, I), *((T, rank) for rank in R))
        result = torch.float32 if wide else dtype
        found = kernels._launch_pt_xs(P, X, result, DA)
        again = kernels._launch_pt_xs(P, X, result, DA)
        x = X.double()
        assert len(found) == len(R)
        for dA, same, plain, p in zip(found, again, P, doubles(P), strict=True):
            check(dA, (plain.float().t() @ X.float()).to(result), p.t() @ x, p.t().abs() @ x.abs())
            assert torch.equal(dA, same)

    run()
    assert launches.paths("pt_xs", "TMA", "WHOLE") == BOTH


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES)
def test_p_dbs(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    """Columns, rows and ranks that fill no tile, of each linear its own; nothing of one linear reaches another's."""

    @property_test
    @example(T=1100, O=[300, 5, 129], R=[5, 1, 32], layout="aligned", wide=False, seed=0)
    @example(T=33, O=[128, 300], R=[16, 8], layout="padded", wide=True, seed=0)
    @given(
        T=sizes,
        O=st.lists(sizes, min_size=3, max_size=3),
        R=st.lists(ranks.filter(lambda rank: rank <= 32), **few),
        layout=layouts,
        wide=st.booleans(),
        seed=seeds,
    )
    def run(T: int, O: list[int], R: list[int], layout: str, wide: bool, seed: int) -> None:  # noqa: E741
        shapes = [shape for o, r in zip(O, R, strict=False) for shape in ((T, o), (o, r), (T, r))]
        operands = draw_each(seed, dtype, layout, *shapes)
        dY, B, S = (operands[at::3] for at in range(3))
        scalings = [0.75, -2.0, 0.5][: len(R)]
        result = torch.float32 if wide else dtype
        found = kernels._launch_p_dbs(dY, B, S, scalings, result, P_DB)
        again = kernels._launch_p_dbs(dY, B, S, scalings, result, P_DB)
        assert len(found) == 2 * len(R) and kernels._tma_serves(*found[::2])
        for P, dB, dy, b, s, scaling in zip(found[::2], found[1::2], dY, B, S, scalings, strict=True):
            check(
                P,
                scaling * (dy @ b),
                scaling * dy.double() @ b.double(),
                abs(scaling) * dy.double().abs() @ b.double().abs(),
            )
            exact, magnitude = dy.double().t() @ s.double(), dy.double().t().abs() @ s.double().abs()
            check(dB, (dy.float().t() @ s.float()).to(result), exact, magnitude)
        assert all(map(torch.equal, found, again))

    run()
    assert launches.paths("p_dbs", "LINEARS", "ROWS") >= {(3, 32), (2, 16)}


@pytest.mark.usefixtures("launches")
def test_many_rows_are_left_to_torch(kernels: ModuleType) -> None:
    dY, B, S = draw_each(0, torch.float16, "aligned", (2049, 8), (8, 4), (2049, 4))
    assert kernels._launch_p_dbs([dY] * 2, [B] * 2, [S] * 2, [1.0] * 2, torch.float16, P_DB) is None
    found = kernels._p_dbs([dY] * 2, [B] * 2, [S] * 2, [1.0, 2.0], [torch.float16] * 2, tiles=P_DB)
    assert [each.shape for each in found] == [(2049, 4), (8, 4)] * 2
    assert torch.equal(found[2], 2 * found[0]) and torch.equal(found[3], found[1])


#: What the GEMMs are given: with descriptors and pointers, last waves that are cut, weights stored the other way.
SPLIT = {"O": [504, 264, 8], "I": 70, "T": 130, "R": [5, 16, 1], "machine": 4, "layout": "aligned", "seed": 0}
GIVEN = {
    "T": sizes, "I": multiples_of_8 | sizes, "O": st.lists(multiples_of_8 | sizes, **few), "machine": machines,
    "layout": layouts, "seed": seeds,
}  # fmt: skip


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES)
def test_fused_gemms(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    @property_test
    @example(**SPLIT, biased=[True, False, True])
    @example(**{**SPLIT, "machine": 1, "O": [264, 520], "R": [70, 3]}, biased=[True, True, True])
    @example(**{**SPLIT, "layout": "padded"}, biased=[False, False, False])
    @example(**{**SPLIT, "layout": "transposed"}, biased=[False, True, False])
    @given(**GIVEN, R=st.lists(ranks, min_size=3, max_size=3), biased=st.lists(st.booleans(), min_size=3, max_size=3))
    def run(
        T: int,
        I: int,  # noqa: E741
        O: list[int],  # noqa: E741
        R: list[int],
        machine: int,
        layout: str,
        seed: int,
        biased: list[bool],
    ) -> None:
        resize(machine)
        linears = list(zip(O, R, strict=False))
        (X,) = draw_each(seed, dtype, layout, (T, I))
        W = draw_each(seed + 1, dtype, layout, *((width, I) for width in O))
        low_left = draw_each(seed + 4, dtype, layout, *((T, rank) for _, rank in linears))
        low_right = draw_each(seed + 7, dtype, layout, *linears)
        biases = [draw(seed + 10, 1, width, dtype)[0] if has else None for width, has in zip(O, biased, strict=False)]

        def reference(x: Tensor, w: Tensor, s: Tensor, low: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, w, bias) + F.linear(s, low)

        found = kernels._launch_fused_gemms(X, W, low_left, low_right, biases, Y)
        again = kernels._launch_fused_gemms(X, W, low_left, low_right, biases, Y)
        assert len(found) == len(O)
        for ours, same, *matrices, bias in zip(found, again, W, low_left, low_right, biases, strict=True):
            operands = [X, *matrices]
            wide = None if bias is None else bias.double()
            exact = reference(*doubles(operands), wide)
            magnitude = reference(*(t.abs() for t in doubles(operands)), None if wide is None else wide.abs())
            check(ours, reference(*operands, bias), exact, magnitude)
            assert torch.equal(ours, same)

    run()
    check_paths(launches, "fused_gemms")


def check_paths(launches: Launches, kernel: str) -> None:
    assert launches.paths(kernel, "TMA", "PARTS") == {
        (DESCRIPTORS, 2 if DESCRIPTORS else 1),
        (DESCRIPTORS, 1),
        (False, 1),
    }
    assert launches.paths(kernel, "W_IS_NK") == {(True,), (False,)}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES)
def test_fused_gemm_sum(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    @property_test
    @example(**{**SPLIT, "I": 504, "T": 260, "O": [70, 264, 9]})
    @example(**{**SPLIT, "machine": 1, "O": [264, 520], "R": [70, 3]})
    @example(**{**SPLIT, "layout": "padded"})
    @example(**{**SPLIT, "layout": "transposed"})
    @given(**GIVEN, R=st.lists(ranks, min_size=3, max_size=3))
    def run(T: int, I: int, O: list[int], R: list[int], machine: int, layout: str, seed: int) -> None:  # noqa: E741
        resize(machine)
        linears = list(zip(O, R, strict=False))
        dY = draw_each(seed, dtype, layout, *((T, width) for width in O))
        W = draw_each(seed + 3, dtype, layout, *((width, I) for width in O))
        P = draw_each(seed + 6, dtype, layout, *((T, rank) for _, rank in linears))
        A = draw_each(seed + 9, dtype, layout, *((rank, I) for _, rank in linears))

        def reference(*operands: list[Tensor]) -> Tensor:
            dY, W, P, A = operands
            return torch.stack([left @ right for left, right in zip((*dY, *P), (*W, *A), strict=True)]).sum(0)

        operands = (dY, W, P, A)
        ours = kernels._launch_fused_gemm_sum(*operands, DX)
        exact = reference(*map(doubles, operands))
        magnitude = reference(*([t.abs() for t in doubles(kind)] for kind in operands))
        check(ours, reference(*operands), exact, magnitude)
        assert torch.equal(ours, kernels._launch_fused_gemm_sum(*operands, DX))

    run()
    check_paths(launches, "fused_gemm_sum")


def problem(dtype: torch.dtype, linears: int, rank: int = 4) -> dict[str, Any]:
    """The operands of all kernels for so many linears, X of 24×40."""
    widths = (24, 16, 8, 32)[:linears]
    return {
        "X": draw(0, 24, 40, dtype),
        "W": draw_each(1, dtype, "contiguous", *((width, 40) for width in widths)),
        "A": draw_each(9, dtype, "contiguous", *[(rank, 40)] * linears),
        "B": draw_each(17, dtype, "contiguous", *((width, rank) for width in widths)),
        "b": [None if number else draw(25, 1, width, dtype)[0] for number, width in enumerate(widths)],
        "dY": draw_each(33, dtype, "contiguous", *((24, width) for width in widths)),
    }


def compute(kernels: ModuleType, X: Tensor, dtypes: Sequence[torch.dtype], **of: Any) -> list[Tensor]:
    """All results, by the wrappers that generated code calls."""
    W, A, B, dY = (tuple(of[name]) for name in ("W", "A", "B", "dY"))
    scalings = (0.5, 2.0, 1.0, 0.25)[: len(W)]
    low = kernels._x_ats(X, A, scalings, tiles=S)
    outputs = kernels._fused_gemms(X, W, tuple(low), B, tuple(of["b"]), tiles=Y)
    P = tuple(gradient @ factor for gradient, factor in zip(dY, B, strict=True))
    dX = kernels._fused_gemm_sum(dY, W, P, A, tiles=DX)
    return [*low, *outputs, dX, *kernels._pt_xs(P, X, tuple(dtypes), tiles=DA)]


def plainly(X: Tensor, dtypes: Sequence[torch.dtype], **of: Any) -> list[Tensor]:
    """The same by torch, one linear after the other."""
    low = [scaling * X @ a.t() for scaling, a in zip((0.5, 2.0, 1.0, 0.25), of["A"], strict=False)]
    P = [gradient @ factor for gradient, factor in zip(of["dY"], of["B"], strict=True)]
    return [
        *low,
        *(F.linear(X, w, b) + s @ low.t() for w, s, low, b in zip(of["W"], low, of["B"], of["b"], strict=True)),
        sum(left @ right for left, right in zip((*of["dY"], *P), (*of["W"], *of["A"]), strict=True)),
        *((p.float().t() @ X.float()).to(dtype) for p, dtype in zip(P, dtypes, strict=True)),
    ]


ALL = ["x_ats", "fused_gemms", "fused_gemm_sum", "pt_xs"]


@pytest.mark.parametrize(
    ("linears", "rank", "dtype", "ran"),
    [
        (2, 4, torch.float16, ALL),
        (3, 4, torch.float16, ALL),
        (3, 4, torch.float32, ["x_ats", "pt_xs"]),
        (3, 65, torch.float16, ["fused_gemms", "fused_gemm_sum"]),
        (4, 4, torch.float16, []),
        (1, 4, torch.float16, []),
        (3, 4, torch.float64, []),
    ],
)
def test_what_they_take(
    kernels: ModuleType, launches: Launches, linears: int, rank: int, dtype: torch.dtype, ran: list[str]
) -> None:
    """Two or three linears, in one launch each; torch computes the same of what they do not take."""
    operands, dtypes = problem(dtype, linears, rank), [dtype] * linears
    ours = compute(kernels, dtypes=dtypes, **operands)
    assert launches.names == ran
    torch.testing.assert_close(ours, plainly(dtypes=dtypes, **operands), rtol=1e-2, atol=5e-2)


def test_weights_of_both_orientations_and_gradients_of_several_dtypes_go_through_torch(
    kernels: ModuleType, launches: Launches
) -> None:
    operands, dtypes = problem(torch.float16, 3), [torch.float32, torch.float16, torch.float16]
    operands["W"][1] = operands["W"][1].t().contiguous().t()
    ours = compute(kernels, dtypes=dtypes, **operands)
    assert launches.names == ["x_ats"]
    torch.testing.assert_close(ours, plainly(dtypes=dtypes, **operands), rtol=1e-2, atol=5e-2)


def test_results_by_torch_have_memory_of_their_own(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator may give views of one another, and gradients are kept one by one."""
    monkeypatch.setattr(kernels, "KERNELS", False)
    found = compute(kernels, dtypes=[torch.float16] * 3, **problem(torch.float16, 3))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("linears", [2, 3])
def test_compile_goes_through_the_operators(kernels: ModuleType, launches: Launches, linears: int) -> None:
    torch.compiler.reset()
    operands, dtypes = problem(torch.float16, linears), [torch.float32] * linears
    expected = compute(kernels, dtypes=dtypes, **operands)
    launches.clear()

    def run(operands: dict[str, Any]) -> list[Tensor]:
        return compute(kernels, dtypes=dtypes, **operands)

    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(operands)
    assert sorted(launches.names) == sorted(ALL)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_operators_are_well_formed(kernels: ModuleType) -> None:
    of = problem(torch.float16, 3)
    low = draw_each(3, torch.float16, "contiguous", *[(24, 4)] * 3)
    torch.library.opcheck(kernels._x_ats_operator, (of["X"], of["A"], [0.5, 1.0, 2.0]), {"tiles": S})
    torch.library.opcheck(kernels._fused_gemms_operator, (of["X"], of["W"], low, of["B"], of["b"]), {"tiles": Y})
    torch.library.opcheck(kernels._fused_gemm_sum_operator, (of["dY"], of["W"], low, of["A"]), {"tiles": DX})
    for dtype in (torch.float16, torch.float32):
        torch.library.opcheck(kernels._pt_xs_operator, (low, of["X"], dtype), {"tiles": DA})


def test_tiles_in_flight_fit_the_shared_memory(
    kernels: ModuleType, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spy, "runs", False)  # what would be launched is all that matters
    for dtype in FLOATS:
        for rank in (4, 32, 64):
            x, s = draw(0, 4096, 8, dtype), draw(1, 4096, rank, dtype)
            kernels._launch_x_ats(x[:64], [s[:8].t()] * 3, [1.0] * 3, S)
            kernels._launch_pt_xs([s[:64]] * 3, x[:64], dtype, DA)
            for name, c in launches:
                if name != "sum_parts":
                    outer, inner = {"x_ats": ("BT", "BI"), "pt_xs": ("BI", "BT")}[name]
                    beside = c[outer] + c["BR_0"] + c["BR_1"] + c["BR_2"]
                    assert c["num_stages"] * beside * c[inner] * dtype.itemsize <= 227 * 1024, (name, c)
            launches.clear()
