"""The room of the kernels: what is in a folder, and what a site gets of it."""

from __future__ import annotations

import ast
from types import MappingProxyType

import pytest
from runlora_gen.algebra.derivation import Derivation
from runlora_gen.algebra.experts import (
    ACTIVATED,
    ACTIVATED_DROPPED,
    COMBINED,
    COMBINED_DROPPED,
    GATHERED,
    GATHERED_DROPPED,
    HANDED,
    HANDED_DROPPED,
    OF_EXPERTS,
)
from runlora_gen.algebra.group import group as group_of
from runlora_gen.algebra.linear import DROPPED, FLOAT8, FLOAT8_DROPPED, LINEAR, QUANTIZED, SCALED, SCALED_DROPPED
from runlora_gen.algebra.mlp import MLP, OF_MLPS, mlp
from runlora_gen.algebra.operations import Draw, Fused, dimensions
from runlora_gen.algebra.sites import DERIVATIONS
from runlora_gen.algebra.work import work
from runlora_gen.cost.measured import measured_as
from runlora_gen.emit.code import line, numbers_of
from runlora_gen.kernels import sites
from runlora_gen.kernels.record import Kernel
from runlora_gen.kernels.registry import FOLDER, KERNELS
from runlora_gen.kernels.sites import OPERATIONS, alternatives, draws, operations_of, undropped

from ..algebra.sketches import dropout
from ..search.groups import group
from .several import operations

DROPPING = {
    operation.kernel: operation
    for site in (DROPPED, group_of(("q", "k"), dropout=True))
    for operation in operations_of(site)
    if isinstance(operation, Fused)
}
FUSED, OF_TABLES, OF_NUMBERS, OF_FLOAT8 = (
    {operation.kernel: operation for operation in operations_of(site) if isinstance(operation, Fused)}
    for site in (LINEAR, QUANTIZED, SCALED, FLOAT8)
)
DECODING = {**OF_TABLES, **OF_NUMBERS, **OF_FLOAT8}
ROUTED = {
    operation.kernel: operation
    for site in OF_EXPERTS
    for operation in operations_of(site)
    if isinstance(operation, Fused)
}
#: What an MLP has beside its linears' and a group's.
BETWEEN = {
    operation.kernel: operation
    for site in (MLP, mlp(dropout=True))
    for operation in operations_of(site)
    if isinstance(operation, Fused) and "activate" in str(operation)
}


def test_every_folder_is_a_kernel_with_all_its_files() -> None:
    folders = {path.name: path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert list(KERNELS) == sorted(folders)
    for name, folder in folders.items():
        assert isinstance(KERNELS[name], Kernel)
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files == {"__init__.py", "device.jinja", "launch.jinja", "operator.jinja"}


def test_every_kernel_is_of_a_site() -> None:
    alone = FUSED.keys() | DECODING.keys() | operations(("q", "k")).keys() | DROPPING.keys()
    assert alone | ROUTED.keys() | BETWEEN.keys() == KERNELS.keys()
    assert alone.isdisjoint(ROUTED) and BETWEEN.keys().isdisjoint({*alone, *ROUTED})
    names = {"mlp_activate", "mlp_activate_backward"}
    assert BETWEEN.keys() == {*names, *(f"{name}_dropped" for name in names)}
    assert OF_TABLES.keys() - FUSED.keys() == {"dequantize", "dequantize_merged"}
    assert OF_NUMBERS.keys() - FUSED.keys() == {"rescale", "rescale_merged"}
    assert OF_FLOAT8.keys() - FUSED.keys() - OF_NUMBERS.keys() == {n for n, kernel in KERNELS.items() if kernel.float8}
    assert OF_NUMBERS.keys() <= OF_FLOAT8.keys(), "what does not multiply float8 makes the weight"
    for name, kernel in KERNELS.items():
        if not any(name in some for some in (FUSED, DECODING, ROUTED, BETWEEN)):
            assert kernel.priced_as in FUSED and not kernel.replaces, "of several linears, or of what is left of X"
            continue
        rows = (*LINEAR.operations, *QUANTIZED.operations, *SCALED.operations, *FLOAT8.operations)
        rows += tuple(operation for site in (*OF_EXPERTS, *OF_MLPS) for operation in site.operations)
        in_rows = any(isinstance(op, Fused) and op.kernel == name for op in rows)
        assert in_rows != bool(kernel.replaces), "of several products, in a row, or in the place of a single one"


def test_what_is_shared_has_every_helper() -> None:
    parts = FOLDER.parents[2] / "templates" / "parts"
    named = (parts / "routing.jinja", parts / "products.jinja", *sorted(parts.glob("quantized*.jinja")))
    files = (FOLDER / "support.jinja", FOLDER / "tiles.jinja", *named)
    shared = "".join(file.read_text(encoding="utf-8") for file in files)
    for kernel in KERNELS.values():
        assert all(f'"{helper}" in module.helpers' in shared for helper in kernel.helpers - {"F"})


def test_calls_follow_from_the_formulas() -> None:
    assert {line(operation) for operation in operations_of(LINEAR) if isinstance(operation, Fused)} == {
        'Y = _fused_gemm(X, W, S, B, b, tiles="Y")',
        'dX = _fused_gemm(dY, W.t(), P, A.t(), None, tiles="dX")',
        'P, dB = _p_db(dY, B, S, scaling, B_dtype, tiles="P, dB")',
        'S = _x_at(X, A, scaling, tiles="S")',
        'dA = _pt_x(P, X, A_dtype, tiles="dA")',
        'M = _merge(W, A, B, scaling, tiles="M")',
        'M = _merge_stochastic(W, A, B, scaling, seed, tiles="M")',
    }


def calls_of(*sites: Derivation) -> set[str]:
    """What is emitted for the kernels of some sites, beside those of the linear whose weight is no codes."""
    found = {op for site in sites for op in operations_of(site) if isinstance(op, Fused)} - {*operations_of(LINEAR)}
    return {line(operation) for operation in found}


def test_calls_that_read_codes() -> None:
    assert calls_of(QUANTIZED, SCALED) == {
        'W = _dequantize(Q, tiles="W")',
        'M = _dequantize_merged(Q, A, B, scaling, tiles="M")',
        'W = _rescale(Q, tiles="W")',
        'M = _rescale_merged(Q, A, B, scaling, tiles="M")',
    }


def test_calls_of_products_of_float8() -> None:
    """Scales are given where they alone are read; what is read as it was transposed has no scales."""
    forward = {
        'mX = _largest(X, tiles="mX")',
        'Xq = _quantize(X, mX, tiles="Xq")',
        'Y = _fused_gemm_8(Xq, Q, S, B, b, tiles="Y")',
    }
    assert calls_of(FLOAT8) == calls_of(SCALED) | forward | {
        'S, mX = _x_at_largest(X, A, scaling, tiles="S, mX")',
        'mdY = _largest(dY, Q.scale, tiles="mdY")',
        'P, dB, mdY = _p_db_largest(dY, B, S, Q.scale, scaling, B_dtype, tiles="P, dB, mdY")',
        'dYq = _quantize(dY, mdY, Q.scale, tiles="dYq")',
        'Qt = _transpose(Q.codes, tiles="Qt")',
        'dX = _fused_gemm_8(dYq, Qt, P, A.t(), None, tiles="dX")',
    }
    assert calls_of(FLOAT8_DROPPED) == calls_of(SCALED_DROPPED) | forward
    # The same by torch, where a kernel is not used or its results are wanted one by one.
    assert line(FLOAT8.parse("mdY = largest(dY, Q)")) == "mdY = _largest_of(dY, Q.scale)"
    assert line(FLOAT8.parse("mX = largest(X)")) == "mX = _largest_of(X)"
    assert line(FLOAT8.parse("dYq = quantize(dY, mdY, Q)")) == "dYq = _quantized(dY, mdY, Q.scale)"


def test_calls_of_experts() -> None:
    """What is of tokens is gathered within; of a stack the transposed matrices are a view."""
    assert calls_of(GATHERED) == {
        'S = _experts_x_at(Xr, A, scaling, routing, tiles="S")',
        'S = _experts_x_at_gathered(X, A, scaling, routing, tiles="S")',
        'Y = _experts_gemm_gathered(X, W, S, B, b, routing, tiles="Y")',
        'P = _experts_x_at(dY, B.mT, scaling, routing, tiles="P")',
        'P, dB = _experts_p_db(dY, B, S, scaling, B_dtype, routing, tiles="P, dB")',
        'dA = _experts_pt_x(P, Xr, A_dtype, routing, tiles="dA")',
        'dA = _experts_pt_x_gathered(P, X, A_dtype, routing, tiles="dA")',
        'dXr = _experts_gemm(dY, W.mT, P, A.mT, None, routing, tiles="dXr")',
        'dX = _experts_combine(dXr, routing=routing, tiles="dX")',
    }
    assert calls_of(COMBINED) == {
        'S = _experts_x_at(X, A, scaling, routing, tiles="S")',
        'Yr = _experts_gemm(X, W, S, B, b, routing, tiles="Yr")',
        'Y = _experts_combine(Yr, g, routing=routing, tiles="Y")',
        'P = _experts_x_at(dYr, B.mT, scaling, routing, tiles="P")',
        'P = _experts_x_at_gathered(dY, B.mT, scaling, routing, tiles="P")',
        'P, dB = _experts_p_db_gathered(dY, B, Sg, scaling, B_dtype, routing, tiles="P, dB")',
        'dA = _experts_pt_x(Pg, X, A_dtype, routing, tiles="dA")',
        'dXu = _experts_gemm_gathered(dY, W.mT, P, A.mT, None, routing, tiles="dXu")',
        'dX, dg = _experts_weigh(dXu, g, X, dY, b, (need_dX, need_dg), routing, tiles="dX, dg")',
    }
    assert calls_of(HANDED) < calls_of(GATHERED), "what it hands over another module reads"
    assert calls_of(ACTIVATED) - calls_of(COMBINED) == {
        'X, S = _experts_activate(U, A, scaling, ACTIVATION, routing, tiles="X, S")',
        "dA, dU, dg, PU, dBU = _experts_activate_backward(dXu, g, U, dY, b, P, BU, SU, scaling_U, A_dtype, BU_dtype, "
        '(need_dA, need_dU, need_dg, need_PU, need_dBU), ACTIVATION, routing, tiles="dA, dU, dg, PU, dBU")',
        'PU, dBU = _experts_p_db(dU, BU, SU, scaling_U, BU_dtype, routing, tiles="PU, dBU")',
    }
    # By torch, an expert after the other where it has no kernel.
    for formula, expected in {
        "S = s * X @ A[e].T": "S = _by_expert(X, A.mT, routing, scaling)",
        "Yr = X @ W[e].T + b[e]": "Yr = _by_expert(X, W.mT, routing, bias=b)",
        "Yr += S @ B[e].T": "Yr = _by_expert(S, B.mT, routing, onto=Yr)",
        "M[e] = W + s * B[e] @ A[e]": "M = _scaled_baddbmm(W, B, A, scaling)",
        "dA[e] = Pg.T @ X": "dA = _sum_by_expert(Pg, X, routing, A_dtype)",
        "dYr = gather(dY)": "dYr = _gathered(dY, routing)",
        "Y = combine(Yr, g)": "Y = _combined(Yr, g, routing)",
        "Pg = weigh(P, g)": "Pg = _weighed(P, g, routing)",
        "dg = dot(dYr, Yr)": "dg = _dot(routing, dYr, Yr)",
        "dg = dot(dXu, X, dYr, b)": "dg = _dot(routing, dXu, X, dYr, b)",
    }.items():
        assert line(COMBINED.parse(formula)) == line(ACTIVATED.parse(formula)) == expected
    for formula, expected in {
        "X = activate(U)": "X = _activated(U, ACTIVATION)",
        "dU = activate_backward(dX, U)": "dU = _activate_backward(dX, U, ACTIVATION)",
        "PU = s_U * dU @ BU[e]": "PU = _by_expert(dU, BU, routing, scaling_U)",
        "dBU[e] = dU.T @ SU": "dBU = _sum_by_expert(dU, SU, routing, BU_dtype)",
        "BU = cast(lora_BU)": "BU = lora_BU.to(dY.dtype)",
    }.items():
        assert line(ACTIVATED.parse(formula)) == expected


def test_calls_of_mlps() -> None:
    """Those of a group of gate and up, of down, and what is between, to which the gradient is given first."""
    assert calls_of(MLP) - calls_of(group_of(("gate", "up"))) == {
        "X_down, S_down = _mlp_activate(Y_gate, Y_up, A_down, scaling_down, ACTIVATION, " 'tiles="X_down, S_down")',
        "dA_down, dY_gate, dY_up, P_gate, P_up, dB_gate, dB_up = _mlp_activate_backward(dX_down, Y_gate, Y_up, P_down, "
        "(B_gate, B_up), (S_gate, S_up), (scaling_gate, scaling_up), (A_down_dtype, B_gate_dtype, B_up_dtype), "
        "(need_dA_down, need_dY_gate, need_dY_up, need_P_gate, need_P_up, need_dB_gate, need_dB_up), ACTIVATION, "
        'tiles="dA_down, dY_gate, dY_up, P_gate, P_up, dB_gate, dB_up", spend=True)',
        'Y_down = _fused_gemm(X_down, W_down, S_down, B_down, b_down, tiles="Y_down")',
        'dX_down = _fused_gemm(dY_down, W_down.t(), P_down, A_down.t(), None, tiles="dX_down")',
        'P_down, dB_down = _p_db(dY_down, B_down, S_down, scaling_down, B_down_dtype, tiles="P_down, dB_down")',
        'S_down = _x_at(X_down, A_down, scaling_down, tiles="S_down")',
        'dA_down = _pt_x(P_down, X_down, A_down_dtype, tiles="dA_down")',
    }
    for formula, expected in {
        "X_down = activate(Y_gate, Y_up)": "X_down = _gated(Y_gate, Y_up, ACTIVATION)",
        "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)": "dY_gate = _gate_gradient(dX_down, Y_gate, Y_up, ACTIVATION)",
        "dY_up = up_gradient(dX_down, Y_gate, Y_up)": "dY_up = _up_gradient(dX_down, Y_gate, Y_up, ACTIVATION)",
    }.items():
        assert line(MLP.parse(formula)) == expected


def test_calls_of_experts_that_drop() -> None:
    """Products of what is left of rows are those of any rows, or draw where they read what it is left of."""
    common = {call for call in calls_of(GATHERED) if not call.startswith(("dXr", "dA")) and "Xr" not in call}
    common -= {'S = _experts_x_at_gathered(X, A, scaling, routing, tiles="S")'}
    assert calls_of(GATHERED_DROPPED) == common | {
        'S = _experts_x_at(H, A, scaling, routing, tiles="S")',
        'S = _experts_x_at_dropped_gathered(X, A, scaling, seed, dropout, routing, tiles="S seeded")',
        'dXr = _experts_gemm_dropped(dY, W.mT, P, A.mT, None, seed, dropout, routing, tiles="dXr seeded")',
        'dX = _experts_combine(dXr, routing=routing, tiles="dX")',
        'dA = _experts_pt_x(P, H, A_dtype, routing, tiles="dA")',
        'dA = _experts_pt_x_dropped_gathered(P, X, seed, dropout, A_dtype, routing, tiles="dA seeded")',
    }
    assert calls_of(HANDED_DROPPED) < calls_of(GATHERED_DROPPED)
    assert calls_of(COMBINED_DROPPED) - calls_of(COMBINED) == {
        'S = _experts_x_at(H, A, scaling, routing, tiles="S")',
        'S = _experts_x_at_dropped(X, A, scaling, seed, dropout, routing, tiles="S seeded")',
        'dXu = _experts_gemm_dropped_gathered(dY, W.mT, P, A.mT, None, seed, dropout, routing, tiles="dXu seeded")',
        'dA = _experts_pt_x(Pg, H, A_dtype, routing, tiles="dA")',
        'dA = _experts_pt_x_dropped(Pg, X, seed, dropout, A_dtype, routing, tiles="dA seeded")',
    }
    assert calls_of(ACTIVATED_DROPPED) - calls_of(COMBINED_DROPPED, ACTIVATED) == {
        'X, S = _experts_activate_dropped(U, A, scaling, seed, dropout, ACTIVATION, routing, tiles="X, S seeded")',
        "dA, dU, dg, PU, dBU = _experts_activate_backward_dropped(dXu, g, U, dY, b, P, BU, SU, scaling_U, seed, "
        "dropout, A_dtype, BU_dtype, (need_dA, need_dU, need_dg, need_PU, need_dBU), ACTIVATION, routing, "
        'tiles="dA, dU, dg, PU, dBU seeded")',
    }
    assert line(GATHERED_DROPPED.parse("dXr = drop(dH, K)")) == "dXr = _masked(dH, K, dropout)"


@pytest.mark.parametrize(
    "site", [GATHERED_DROPPED, COMBINED_DROPPED, HANDED_DROPPED, ACTIVATED_DROPPED, mlp(dropout=True)]
)
def test_what_also_drops_is_priced_as_what_does_not(site: Derivation) -> None:
    """By the times of the other kernel, at the same sizes."""
    assert site.evaluated is not None
    kernels = [op for op in operations_of(site.evaluated) if isinstance(op, Fused)]
    known = [(measured_as(op), {*dimensions(op), "N"}) for op in kernels]
    for operation in operations_of(site):
        if isinstance(operation, Fused) and KERNELS[operation.kernel].drops:
            plain = undropped(operation)
            assert not any(isinstance(part, Draw) for part in plain.parts)
            # Tokens are those of the rows that are gathered.
            assert (measured_as(operation), {*dimensions(operation), "N"}) in known


def test_calls_for_a_linear_of_a_group_name_its_operands() -> None:
    site = group(("q", "k"))
    for formula, expected in {
        "S_q = s_q * X @ A_q.T": "S_q = _scaled_mm(X, A_q.t(), scaling_q)",
        "dA_q = s_q * B_q.T @ G_q": "dA_q = _mm_as(B_q.t(), G_q, A_q_dtype, scaling_q)",
        "M_q = W_q + s_q * B_q @ A_q": "M_q = _scaled_addmm(W_q, B_q, A_q, scaling_q)",
        "x_at: S_q = s_q * X @ A_q.T": 'S_q = _x_at(X, A_q, scaling_q, tiles="S_q")',
        "p_db: P_k = s_k * dY_k @ B_k; dB_k = dY_k.T @ S_k": (
            'P_k, dB_k = _p_db(dY_k, B_k, S_k, scaling_k, B_k_dtype, tiles="P_k, dB_k")'
        ),
    }.items():
        operation = site.parse(formula)
        assert line(operation) == expected
        numbers = {f"scaling_{formula.partition(' * ')[0][-1]}"} if " * " in formula else set()
        assert numbers_of(operation) == numbers


def test_calls_for_several_linears_take_tuples() -> None:
    assert [line(operation) for operation in operations(("q", "k")).values()] == [
        'S_q, S_k = _x_ats(X, (A_q, A_k), (scaling_q, scaling_k), tiles="S_q, S_k")',
        'dA_q, dA_k = _pt_xs((P_q, P_k), X, (A_q_dtype, A_k_dtype), tiles="dA_q, dA_k")',
        "P_q, dB_q, P_k, dB_k = _p_dbs((dY_q, dY_k), (B_q, B_k), (S_q, S_k), (scaling_q, scaling_k), "
        '(B_q_dtype, B_k_dtype), tiles="P_q, dB_q, P_k, dB_k")',
        'Y_q, Y_k = _fused_gemms(X, (W_q, W_k), (S_q, S_k), (B_q, B_k), (b_q, b_k), tiles="Y_q, Y_k")',
        'dX = _fused_gemm_sum((dY_q, dY_k), (W_q, W_k), (P_q, P_k), (A_q, A_k), tiles="dX")',
    ]


def test_alternatives_are_of_products_that_the_table_has() -> None:
    """In the order in which ids name them."""
    assert [operation.kernel for operation in alternatives(LINEAR, "cheaper")] == ["x_at", "pt_x", "merge"]
    assert [operation.kernel for operation in alternatives(LINEAR, "stochastic")] == ["merge_stochastic"]
    for operation in (*alternatives(LINEAR, "cheaper"), *alternatives(LINEAR, "stochastic")):
        (product,) = operation.parts
        assert product in LINEAR.operations and work(product) in KERNELS[operation.kernel].replaces


def test_a_kernel_serves_a_product_by_its_work() -> None:
    """Whatever a site calls it, and wherever it has it: under dropout S is made of what is left of X, too."""
    site = dropout()
    served = {str(operation.parts[0]): operation.kernel for operation in alternatives(site, "cheaper")}
    assert served == {
        "S = s * X @ A.T": "x_at",
        "S = s * H @ A.T": "x_at",
        "dA = P.T @ H": "pt_x",
        "dA = P.T @ X": "pt_x",
        "M = W + s * B @ A": "merge",
    }


def test_every_operation_is_there_once() -> None:
    assert len(OPERATIONS) == len(set(OPERATIONS))
    assert {operation for site in DERIVATIONS for operation in operations_of(site)} == set(OPERATIONS)
    assert all(set(site.operations) < set(OPERATIONS) for site in DERIVATIONS)
    for operation in OPERATIONS:
        assert draws(operation) == (isinstance(operation, Fused) and operation.kernel == "merge_stochastic")


def test_two_kernels_for_one_product_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both are to be had under the same condition, no id would tell which one runs."""
    product = LINEAR.parse("S = s * X @ A.T")
    monkeypatch.setattr(sites, "KERNELS", MappingProxyType({**KERNELS, "x_at_too": KERNELS["x_at"]}))
    with pytest.raises(ValueError) as error:
        alternatives.__wrapped__(LINEAR, "cheaper")
    assert str(error.value) == f"x_at and x_at_too both take the place of {product}"


@pytest.mark.parametrize(
    ("room", "allowed"), [("algebra", {"algebra", "request"}), ("kernels", {"algebra", "kernels", "request"})]
)
def test_what_the_rooms_import(room: str, allowed: set[str]) -> None:
    """Kernels know the algebra, and never the other way round."""
    for path in (FOLDER.parent / room).rglob("*.py"):
        depth = len(path.relative_to(FOLDER.parent).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = path.relative_to(FOLDER.parent).parts[: depth - node.level]
                imported = (*above, *(node.module or "").split("."))[0]
                assert imported in allowed, f"{path.name}: from {'.' * node.level}{node.module} import …"
