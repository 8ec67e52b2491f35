"""The keys of work: equal for equal work alone, and of structure, not of names."""

from __future__ import annotations

import itertools
import re

from runlora_gen.algebra.experts import (
    ACTIVATED,
    ACTIVATED_DROPPED,
    COMBINED,
    COMBINED_DROPPED,
    GATHERED,
    GATHERED_DROPPED,
)
from runlora_gen.algebra.linear import DROPPED, FLOAT8, LINEAR, QUANTIZED
from runlora_gen.algebra.mlp import MLP, mlp
from runlora_gen.algebra.operations import Map, Operation, Symbol, parse
from runlora_gen.algebra.work import work
from runlora_gen.kernels.sites import OPERATIONS, WORKS

SYMBOLS = {**DROPPED.symbols, **QUANTIZED.symbols, **FLOAT8.symbols, **LINEAR.symbols}
#: What stands in the profiles of users: no change of a formula, of its print or of a symbol's name may change it.
KEYS = {
    "S = s * X @ A.T": "TI,RI->TR scaled",
    "M = W + s * B @ A": "OR,RI->OI scaled added",
    "D = s * B @ A": "OR,RI->OI scaled",
    "A = cast(lora_A)": "RI->RI cast",
    "B = cast(lora_B)": "OR->OR cast",
    "Y = X @ W.T + b": "TI,OI->TO biased",
    "Y = X @ M.T + b": "TI,OI->TO biased",
    "Y += X @ W.T": "TI,OI->TO accumulated",
    "Y += X @ D.T": "TI,OI->TO accumulated",
    "Y = S @ B.T + b": "TR,OR->TO biased",
    "Y += S @ B.T": "TR,OR->TO accumulated",
    "fused_gemm: Y = S @ B.T + b; Y += X @ W.T": "fused_gemm: TR,OR->TO biased; TI,OI->TO accumulated",
    "P = s * dY @ B": "TO,OR->TR scaled",
    "G = dY.T @ X": "TO,TI->OI",
    "dX = dY @ W": "TO,OI->TI",
    "dX = dY @ M": "TO,OI->TI",
    "dX += dY @ W": "TO,OI->TI accumulated",
    "dX += dY @ D": "TO,OI->TI accumulated",
    "dX = P @ A": "TR,RI->TI",
    "dX += P @ A": "TR,RI->TI accumulated",
    "fused_gemm: dX = P @ A; dX += dY @ W": "fused_gemm: TR,RI->TI; TO,OI->TI accumulated",
    "dA = P.T @ X": "TR,TI->RI",
    "dA = s * B.T @ G": "OR,OI->RI scaled",
    "dB = dY.T @ S": "TO,TR->OR",
    "dB = s * G @ A.T": "OI,RI->OR scaled",
    "p_db: P = s * dY @ B; dB = dY.T @ S": "p_db: TO,OR->TR scaled; TO,TR->OR",
    "db = sum(dY)": "TO->O sum",
    "x_at: S = s * X @ A.T": "x_at: TI,RI->TR scaled",
    "pt_x: dA = P.T @ X": "pt_x: TR,TI->RI",
    "merge: M = W + s * B @ A": "merge: OR,RI->OI scaled added",
    "merge_stochastic: M = W + s * B @ A": "merge_stochastic: OR,RI->OI scaled added",
    "W = dequantize(Q)": "OI->OI dequantize",
    "dequantize: W = dequantize(Q)": "dequantize: OI->OI dequantize",
    "dequantize_merged: W := dequantize(Q); M = W + s * B @ A": (
        "dequantize_merged: OI->OI dequantize inner; OR,RI->OI scaled added"
    ),
    "W = rescale(Q)": "OI->OI rescale",
    "rescale: W = rescale(Q)": "rescale: OI->OI rescale",
    "rescale_merged: W := rescale(Q); M = W + s * B @ A": (
        "rescale_merged: OI->OI rescale inner; OR,RI->OI scaled added"
    ),
    "largest: mX = largest(X)": "largest: TI->T largest",
    "largest: mdY = largest(dY, Q)": "largest: TO,OI->T largest",
    "quantize: Xq = quantize(X, mX)": "quantize: TI,T->TI quantize",
    "quantize: dYq = quantize(dY, mdY, Q)": "quantize: TO,T,OI->TO quantize",
    "transpose: Qt = transpose(Q)": "transpose: OI->IO transpose",
    "x_at_largest: S = s * X @ A.T; mX = largest(X)": "x_at_largest: TI,RI->TR scaled; TI->T largest",
    "p_db_largest: P = s * dY @ B; dB = dY.T @ S; mdY = largest(dY, Q)": (
        "p_db_largest: TO,OR->TR scaled; TO,TR->OR; TO,OI->T largest"
    ),
    "fused_gemm_8: Y = S @ B.T + b; Y += Xq @ Q.T": "fused_gemm_8: TR,OR->TO biased; TI,OI->TO accumulated",
    "fused_gemm_8: dX = P @ A; dX += dYq @ Qt.T": "fused_gemm_8: TR,RI->TI; TO,IO->TI accumulated",
    "K = draw(dropout)": "->TI draw",
    "H = drop(X, K)": "TI,TI->TI drop",
    "dX = drop(dH, K)": "TI,TI->TI drop",
    "S = s * H @ A.T": "TI,RI->TR scaled",
    "G = dY.T @ H": "TO,TI->OI",
    "dH = P @ A": "TR,RI->TI",
    "dA = P.T @ H": "TR,TI->RI",
    "x_at_dropped: K := draw(seed); H := drop(X, K); S = s * H @ A.T": (
        "x_at_dropped: ->TI draw inner; TI,TI->TI drop inner; TI,RI->TR scaled"
    ),
    "dx_da: K := draw(seed); H := drop(X, K); dA = P.T @ H; dH := P @ A; dX = drop(dH, K); dX += dY @ W": (
        "dx_da: ->TI draw inner; TI,TI->TI drop inner; TR,TI->RI; TR,RI->TI inner; TI,TI->TI drop; "
        "TO,OI->TI accumulated"
    ),
}
#: The same of experts, whose symbols of these names are of other shapes.
OF_EXPERTS = {
    GATHERED: {
        "A = cast(lora_A)": "ERI->ERI cast",
        "B = cast(lora_B)": "EOR->EOR cast",
        "M[e] = W + s * B[e] @ A[e]": "EOR,ERI->EOI scaled added",
        "Xr = gather(X)": "NI->TI gather",
        "S = s * Xr @ A[e].T": "TI,ERI->TR scaled",
        "experts_x_at: S = s * Xr @ A[e].T": "experts_x_at: TI,ERI->TR scaled",
        "experts_x_at_gathered: Xr := gather(X); S = s * Xr @ A[e].T": (
            "experts_x_at_gathered: NI->TI gather inner; TI,ERI->TR scaled"
        ),
        "Y = Xr @ W[e].T + b[e]": "TI,EOI->TO biased",
        "Y = Xr @ M[e].T + b[e]": "TI,EOI->TO biased",
        "Y += S @ B[e].T": "TR,EOR->TO accumulated",
        "Y = S @ B[e].T + b[e]": "TR,EOR->TO biased",
        "Y += Xr @ W[e].T": "TI,EOI->TO accumulated",
        "experts_gemm_gathered: Xr := gather(X); Y = S @ B[e].T + b[e]; Y += Xr @ W[e].T": (
            "experts_gemm_gathered: NI->TI gather inner; TR,EOR->TO biased; TI,EOI->TO accumulated"
        ),
        "P = s * dY @ B[e]": "TO,EOR->TR scaled",
        "experts_x_at: P = s * dY @ B[e]": "experts_x_at: TO,EOR->TR scaled",
        "dXr = dY @ W[e]": "TO,EOI->TI",
        "dXr += P @ A[e]": "TR,ERI->TI accumulated",
        "dXr = P @ A[e]": "TR,ERI->TI",
        "dXr += dY @ W[e]": "TO,EOI->TI accumulated",
        "experts_gemm: dXr = P @ A[e]; dXr += dY @ W[e]": "experts_gemm: TR,ERI->TI; TO,EOI->TI accumulated",
        "dA[e] = P.T @ Xr": "TR,TI->ERI",
        "experts_pt_x: dA[e] = P.T @ Xr": "experts_pt_x: TR,TI->ERI",
        "experts_pt_x_gathered: Xr := gather(X); dA[e] = P.T @ Xr": (
            "experts_pt_x_gathered: NI->TI gather inner; TR,TI->ERI"
        ),
        "dB[e] = dY.T @ S": "TO,TR->EOR",
        "experts_p_db: P = s * dY @ B[e]; dB[e] = dY.T @ S": "experts_p_db: TO,EOR->TR scaled; TO,TR->EOR",
        "dX = combine(dXr)": "TI->NI combine",
        "experts_combine: dX = combine(dXr)": "experts_combine: TI->NI combine",
    },
    COMBINED: {
        "experts_gemm: Yr = S @ B[e].T + b[e]; Yr += X @ W[e].T": (
            "experts_gemm: TR,EOR->TO biased; TI,EOI->TO accumulated"
        ),
        "Y = combine(Yr, g)": "TO,T->NO combine",
        "experts_combine: Y = combine(Yr, g)": "experts_combine: TO,T->NO combine",
        "dYr = gather(dY)": "NO->TO gather",
        "experts_x_at_gathered: dYr := gather(dY); P = s * dYr @ B[e]": (
            "experts_x_at_gathered: NO->TO gather inner; TO,EOR->TR scaled"
        ),
        "experts_gemm_gathered: dYr := gather(dY); dXu = P @ A[e]; dXu += dYr @ W[e]": (
            "experts_gemm_gathered: NO->TO gather inner; TR,ERI->TI; TO,EOI->TI accumulated"
        ),
        "experts_p_db_gathered: dYr := gather(dY); P = s * dYr @ B[e]; dB[e] = dYr.T @ Sg": (
            "experts_p_db_gathered: NO->TO gather inner; TO,EOR->TR scaled; TO,TR->EOR"
        ),
        "dA[e] = Pg.T @ X": "TR,TI->ERI",
        "Sg = weigh(S, g)": "TR,T->TR weigh",
        "Pg = weigh(P, g)": "TR,T->TR weigh",
        "dX = weigh(dXu, g)": "TI,T->TI weigh",
        "dg = dot(dXu, X, dYr, b)": "TI,TI,TO,EO->T dot",
        "dg = dot(dYr, Yr)": "TO,TO->T dot",
        "experts_weigh: dYr := gather(dY); dX = weigh(dXu, g); dg = dot(dXu, X, dYr, b)": (
            "experts_weigh: NO->TO gather inner; TI,T->TI weigh; TI,TI,TO,EO->T dot"
        ),
    },
    ACTIVATED: {
        "BU = cast(lora_BU)": "EFR->EFR cast",
        "X = activate(U)": "TF->TI activate",
        "experts_activate: X = activate(U); S = s * X @ A[e].T": (
            "experts_activate: TF->TI activate; TI,ERI->TR scaled"
        ),
        "dU = activate_backward(dX, U)": "TI,TF->TF activate_backward",
        "PU = s_U * dU @ BU[e]": "TF,EFR->TR scaled",
        "dBU[e] = dU.T @ SU": "TF,TR->EFR",
        "experts_p_db: PU = s_U * dU @ BU[e]; dBU[e] = dU.T @ SU": "experts_p_db: TF,EFR->TR scaled; TF,TR->EFR",
        "experts_activate_backward: X := activate(U); Pg := weigh(P, g); dA[e] = Pg.T @ X; dX := weigh(dXu, g); "
        "dU = activate_backward(dX, U); dYr := gather(dY); dg = dot(dXu, X, dYr, b); PU = s_U * dU @ BU[e]; "
        "dBU[e] = dU.T @ SU": (
            "experts_activate_backward: TF->TI activate inner; TR1,T->TR1 weigh inner; TR1,TI->ER1I; "
            "TI,T->TI weigh inner; TI,TF->TF activate_backward; NO->TO gather inner; TI,TI,TO,EO->T dot; "
            "TF,EFR2->TR2 scaled; TF,TR2->EFR2"
        ),
    },
    GATHERED_DROPPED: {
        "experts_x_at_dropped_gathered: Xr := gather(X); K := draw(seed); H := drop(Xr, K); S = s * H @ A[e].T": (
            "experts_x_at_dropped_gathered: NI->TI gather inner; ->TI draw inner; TI,TI->TI drop inner; "
            "TI,ERI->TR scaled"
        ),
        "experts_gemm_dropped: K := draw(seed); dH := P @ A[e]; dXr = drop(dH, K); dXr += dY @ W[e]": (
            "experts_gemm_dropped: ->TI draw inner; TR,ERI->TI inner; TI,TI->TI drop; TO,EOI->TI accumulated"
        ),
        "experts_pt_x_dropped_gathered: Xr := gather(X); K := draw(seed); H := drop(Xr, K); dA[e] = P.T @ H": (
            "experts_pt_x_dropped_gathered: NI->TI gather inner; ->TI draw inner; TI,TI->TI drop inner; TR,TI->ERI"
        ),
    },
    COMBINED_DROPPED: {
        "experts_x_at_dropped: K := draw(seed); H := drop(X, K); S = s * H @ A[e].T": (
            "experts_x_at_dropped: ->TI draw inner; TI,TI->TI drop inner; TI,ERI->TR scaled"
        ),
        "experts_gemm_dropped_gathered: dYr := gather(dY); K := draw(seed); dH := P @ A[e]; dXu = drop(dH, K); "
        "dXu += dYr @ W[e]": (
            "experts_gemm_dropped_gathered: NO->TO gather inner; ->TI draw inner; TR,ERI->TI inner; TI,TI->TI drop; "
            "TO,EOI->TI accumulated"
        ),
        "experts_pt_x_dropped: K := draw(seed); H := drop(X, K); dA[e] = Pg.T @ H": (
            "experts_pt_x_dropped: ->TI draw inner; TI,TI->TI drop inner; TR,TI->ERI"
        ),
    },
    ACTIVATED_DROPPED: {
        "experts_activate_dropped: X = activate(U); K := draw(seed); H := drop(X, K); S = s * H @ A[e].T": (
            "experts_activate_dropped: TF->TI activate; ->TI draw inner; TI,TI->TI drop inner; TI,ERI->TR scaled"
        ),
        "experts_activate_backward_dropped: X := activate(U); K := draw(seed); H := drop(X, K); Pg := weigh(P, g); "
        "dA[e] = Pg.T @ H; dX := weigh(dXu, g); dU = activate_backward(dX, U); dYr := gather(dY); "
        "dg = dot(dXu, X, dYr, b); PU = s_U * dU @ BU[e]; dBU[e] = dU.T @ SU": (
            "experts_activate_backward_dropped: TF->TI activate inner; ->TI draw inner; TI,TI->TI drop inner; "
            "TR1,T->TR1 weigh inner; TR1,TI->ER1I; TI,T->TI weigh inner; TI,TF->TF activate_backward; "
            "NO->TO gather inner; TI,TI,TO,EO->T dot; TF,EFR2->TR2 scaled; TF,TR2->EFR2"
        ),
    },
}
#: What an MLP has beside a linear: gate and up are of one group, and what is between reads both.
OF_MLPS = {
    "x_ats: S_gate = s_gate * X @ A_gate.T; S_up = s_up * X @ A_up.T": "x_ats: TI,R1I->TR1 scaled; TI,R2I->TR2 scaled",
    "fused_gemms: Y_gate = S_gate @ B_gate.T + b_gate; Y_gate += X @ W_gate.T; Y_up = S_up @ B_up.T + b_up; "
    "Y_up += X @ W_up.T": (
        "fused_gemms: TR1,O1R1->TO1 biased; TI,O1I->TO1 accumulated; TR2,O2R2->TO2 biased; TI,O2I->TO2 accumulated"
    ),
    "fused_gemm_sum: dX = P_gate @ A_gate; dX += P_up @ A_up; dX += dY_gate @ W_gate; dX += dY_up @ W_up": (
        "fused_gemm_sum: TR1,R1I->TI; TR2,R2I->TI accumulated; TO1,O1I->TI accumulated; TO2,O2I->TI accumulated"
    ),
    "pt_xs: dA_gate = P_gate.T @ X; dA_up = P_up.T @ X": "pt_xs: TR1,TI->R1I; TR2,TI->R2I",
    "p_dbs: P_gate = s_gate * dY_gate @ B_gate; dB_gate = dY_gate.T @ S_gate; P_up = s_up * dY_up @ B_up; "
    "dB_up = dY_up.T @ S_up": ("p_dbs: TO1,O1R1->TR1 scaled; TO1,TR1->O1R1; TO2,O2R2->TR2 scaled; TO2,TR2->O2R2"),
    "X_down = activate(Y_gate, Y_up)": "TO1,TO2->TI activate",
    "mlp_activate: X_down = activate(Y_gate, Y_up); S_down = s_down * X_down @ A_down.T": (
        "mlp_activate: TO1,TO2->TI activate; TI,RI->TR scaled"
    ),
    "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)": "TI,TO1,TO2->TO1 gate_gradient",
    "dY_up = up_gradient(dX_down, Y_gate, Y_up)": "TI,TO1,TO2->TO2 up_gradient",
    "mlp_activate_backward: X_down := activate(Y_gate, Y_up); dA_down = P_down.T @ X_down; "
    "dY_gate = gate_gradient(dX_down, Y_gate, Y_up); dY_up = up_gradient(dX_down, Y_gate, Y_up); "
    "P_gate = s_gate * dY_gate @ B_gate; P_up = s_up * dY_up @ B_up; dB_gate = dY_gate.T @ S_gate; "
    "dB_up = dY_up.T @ S_up": (
        "mlp_activate_backward: TO1,TO2->TI activate inner; TR1,TI->R1I; TI,TO1,TO2->TO1 gate_gradient; "
        "TI,TO1,TO2->TO2 up_gradient; TO1,O1R2->TR2 scaled; TO2,O2R3->TR3 scaled; TO1,TR2->O1R2; TO2,TR3->O2R3"
    ),
}
#: And with dropout, where dV is dX_down without what the adapter adds to it.
OF_DROPPED_MLPS = {
    "x_ats_dropped: K_gate := draw(seed_gate); H_gate := drop(X, K_gate); S_gate = s_gate * H_gate @ A_gate.T; "
    "K_up := draw(seed_up); H_up := drop(X, K_up); S_up = s_up * H_up @ A_up.T": (
        "x_ats_dropped: ->TI draw inner; TI,TI->TI drop inner; TI,R1I->TR1 scaled; ->TI draw inner; "
        "TI,TI->TI drop inner; TI,R2I->TR2 scaled"
    ),
    "dV_down = dY_down @ W_down": "TO,OI->TI",
    "dX = drop(dH_gate, K_gate)": "TI,TI->TI drop",
    "dX += drop(dH_up, K_up)": "TI,TI->TI drop accumulated",
    "dx_das: K_gate := draw(seed_gate); K_up := draw(seed_up); H_gate := drop(X, K_gate); H_up := drop(X, K_up); "
    "dA_gate = P_gate.T @ H_gate; dA_up = P_up.T @ H_up; dH_gate := P_gate @ A_gate; dH_up := P_up @ A_up; "
    "dX = drop(dH_gate, K_gate); dX += drop(dH_up, K_up); dX += dY_gate @ W_gate; dX += dY_up @ W_up": (
        "dx_das: ->TI draw inner; ->TI draw inner; TI,TI->TI drop inner; TI,TI->TI drop inner; TR1,TI->R1I; "
        "TR2,TI->R2I; TR1,R1I->TI inner; TR2,R2I->TI inner; TI,TI->TI drop; TI,TI->TI drop accumulated; "
        "TO1,O1I->TI accumulated; TO2,O2I->TI accumulated"
    ),
    "mlp_activate_dropped: X_down = activate(Y_gate, Y_up); K_down := draw(seed_down); "
    "H_down := drop(X_down, K_down); S_down = s_down * H_down @ A_down.T": (
        "mlp_activate_dropped: TO1,TO2->TI activate; ->TI draw inner; TI,TI->TI drop inner; TI,RI->TR scaled"
    ),
    "mlp_activate_backward_dropped: X_down := activate(Y_gate, Y_up); K_down := draw(seed_down); "
    "H_down := drop(X_down, K_down); dA_down = P_down.T @ H_down; dH_down := P_down @ A_down; "
    "dZ_down := drop(dH_down, K_down); dX_down := plus(dV_down, dZ_down); "
    "dY_gate = gate_gradient(dX_down, Y_gate, Y_up); dY_up = up_gradient(dX_down, Y_gate, Y_up); "
    "P_gate = s_gate * dY_gate @ B_gate; P_up = s_up * dY_up @ B_up; dB_gate = dY_gate.T @ S_gate; "
    "dB_up = dY_up.T @ S_up": (
        "mlp_activate_backward_dropped: TO1,TO2->TI activate inner; ->TI draw inner; TI,TI->TI drop inner; "
        "TR1,TI->R1I; TR1,R1I->TI inner; TI,TI->TI drop inner; TI,TI->TI plus inner; "
        "TI,TO1,TO2->TO1 gate_gradient; TI,TO1,TO2->TO2 up_gradient; TO1,O1R2->TR2 scaled; TO2,O2R3->TR3 scaled; "
        "TO1,TR2->O1R2; TO2,TR3->O2R3"
    ),
}
#: By site, what its symbols are called there.
OF_SITES = {**OF_EXPERTS, MLP: OF_MLPS, mlp(dropout=True): OF_DROPPED_MLPS}
#: What has no size, and so no time.
NO_SIZE = {"seed = draw(dropout)": "-> draw"}


def test_the_keys_that_profiles_hold() -> None:
    assert {formula: work(parse(formula, SYMBOLS)) for formula in (*KEYS, *NO_SIZE)} == {**KEYS, **NO_SIZE}
    for site, keys in OF_SITES.items():
        assert {formula: work(site.parse(formula)) for formula in keys} == keys
    sized = {*KEYS.values(), *(key for keys in OF_SITES.values() for key in keys.values())}
    assert set(map(work, OPERATIONS)) == {*sized, *NO_SIZE.values()} and WORKS.keys() == sized
    assert all(work(operation) == key for key, operation in WORKS.items())


def same(first: Operation, second: Operation) -> bool:
    """Whether they compute the same of matrices that are alike: M and D are alike W, H is alike X, dH and dV alike dX.

    So are rows of experts, whatever a site calls them, and the linears of an MLP; but no stack is alike a matrix.
    """

    def plain(operation: Operation) -> tuple[str, int]:
        text = re.sub(r"_(gate|up|down)\b", "", str(operation))
        text = re.sub(r"\b[MD]\b(?! \+?=)", "W", text)
        text = re.sub(r"\b(d?)[HV]\b", r"\1X", text)
        text = re.sub(r"\b(d?[XY]|[PS])[rug]\b", r"\1", text)
        if isinstance(operation, Map):  # of elements: X and dX are alike, S and P
            text = text.replace("dX", "X").replace("P", "S")
        return text, max((len(symbol.shape) for symbol in operation.reads), default=0)

    return plain(first) == plain(second)


def test_equal_work_has_one_key_and_other_work_another() -> None:
    pairs = list(itertools.combinations(OPERATIONS, 2))
    sized = len(OPERATIONS) - len(NO_SIZE)
    assert sum(same(first, second) for first, second in pairs) >= sized - len(WORKS) > 0
    for first, second in pairs:
        assert (work(first) == work(second)) == same(first, second), f"{first}, {second}"


def test_names_are_of_no_matter() -> None:
    names = {name: f"v{number}" for number, name in enumerate(SYMBOLS)}
    symbols = {names[name]: Symbol(names[name], s.shape, s.store) for name, s in SYMBOLS.items()}
    for formula, key in KEYS.items():
        other = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), formula)
        assert other != formula and work(parse(other, symbols)) == key


def test_what_other_sites_hold() -> None:
    """Indices of a group's linears, a stack of matrices, a mask, and what stays within a kernel."""
    symbols = (
        Symbol("X", ("T", "I")),
        Symbol("K", ("T", "I"), store="bit"),
        Symbol("H", ("T", "I")),
        Symbol("Wq", ("O_q", "I"), store="weight"),
        Symbol("Wk", ("O_k", "I"), store="weight"),
        Symbol("Yq", ("T", "O_q")),
        Symbol("Yk", ("T", "O_k")),
        Symbol("W", ("E", "O", "I"), store="weight"),
        Symbol("Y", ("T", "O")),
        Symbol("seed", (), store="seed"),
    )
    known = {symbol.name: symbol for symbol in symbols}
    keys = {
        "Yq = X @ Wq.T": "TI,OI->TO",
        "Yk = X @ Wk.T": "TI,OI->TO",
        "Y = X @ W[e].T": "TI,EOI->TO",
        "H = drop(X, K)": "TI,TI->TI drop",
        "K = draw(seed)": "->TI draw",
        "both: Yq = X @ Wq.T; Yk = X @ Wk.T": "both: TI,O1I->TO1; TI,O2I->TO2",
        "dropped: H := drop(X, K); Yq = H @ Wq.T": "dropped: TI,TI->TI drop inner; TI,OI->TO",
    }
    assert {formula: work(parse(formula, known)) for formula in keys} == keys
