"""Shared memory of kernels, by a process without Triton's interpreter: compiled for a GPU as far as that needs none.

    python -m tests.generated_code.shared_memory FOLDER ARCHITECTURE DTYPE [KERNEL]

Prints JSON: of each launch the kernel's name, its constants, and bytes of shared memory.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.measure.modules import import_file
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
#: Ranks of the lone linear, and of three in a group: the largest, and such as fill what their sum of tiles may take.
RANKS = (128, 64, 32)
RANKS_OF_GROUPS = ((64, 64, 64), (64, 64, 16), (64, 32, 16), (32, 32, 32))
TOKENS, MANY, FEATURES = 512, 4096, 256
EXPERTS, TOP_K, ACTIVATION = 8, 2, "silu_gated"


def kind(value: Any, described: Any) -> str:
    """The type of an argument in Triton's words."""
    if described is not None:
        return f"tensordesc<{DTYPES[value.dtype]}{described[2]}>".replace(" ", "")
    match value:
        case Tensor():
            return f"*{DTYPES[value.dtype]}"
        case float():
            return "fp32"
        case int():
            return "i32"
        case None:
            return "constexpr"
    raise TypeError(value)


def shared_bytes(launch: Any, operands: tuple[Any, ...], target: GPUTarget) -> int:
    """What the kernel of a launch takes."""
    backend = make_backend(target)
    names = launch.kernel.arg_names
    given = dict(zip(names, (*operands, *launch.numbers), strict=False))
    kinds = {name: kind(value, launch.described.get(place)) for place, (name, value) in enumerate(given.items())}
    constants = {name: None for name, found in kinds.items() if found == "constexpr"} | launch.constants
    assert {*given, *constants} == set(names)
    aligned = [name for name, found in kinds.items() if found[0] == "*" or (found == "i32" and given[name] % 16 == 0)]
    source = ASTSource(
        launch.kernel,
        signature={**kinds, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = backend.parse_options(dict(launch.options))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    found: dict[str, Any] = {"hash": "", "target": target, **options.__dict__}
    code = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    for stage in ("ttir", "ttgir", "llir"):
        code = stages[stage](code, found)
    shared: int = found["shared"]
    return shared


def launch_all(kernels: Any, dtype: torch.dtype) -> None:
    """Launch every kernel whose tiles have to fit, at ranks where they hardly do."""

    def draw(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    X, dY, W, seed = (
        draw(TOKENS, FEATURES),
        draw(TOKENS, FEATURES),
        draw(FEATURES, FEATURES),
        torch.zeros(1, dtype=torch.int64),
    )
    for rank in RANKS:
        A, B, S = draw(rank, FEATURES), draw(FEATURES, rank), draw(TOKENS, rank)
        many, low = draw(MANY, FEATURES), draw(MANY, rank)  # few rows have tiles of their own
        for x, s in ((X, S), (many, low)):
            kernels._launch_x_at(x, A, 0.5, "S")
            kernels._launch_p_db(x, B, s, 0.5, dtype, "P, dB")
        kernels._launch_pt_x(S, X, dtype, "dA")
        kernels._launch_x_at_dropped(X, A, 0.5, seed, 0.1, "S seeded")
        kernels._launch_dx_da(S, A, X, dY, W, seed, 0.1, dtype, "dA, dX seeded")
    launch_experts(kernels, dtype)
    launch_mlps(kernels, dtype)
    for ranks in RANKS_OF_GROUPS:
        As, Ss, half = [draw(rank, FEATURES) for rank in ranks], [draw(TOKENS, rank) for rank in ranks], [0.5] * 3
        kernels._launch_x_ats(X, As, half, "S_q, S_k, S_v")
        kernels._launch_x_ats(draw(MANY, FEATURES), As, half, "S_q, S_k, S_v")
        Bs = [draw(FEATURES, rank) for rank in ranks]
        for tokens in (TOKENS, 2048):
            kernels._launch_p_dbs(
                [draw(tokens, FEATURES)] * 3,
                Bs,
                [draw(tokens, rank) for rank in ranks],
                half,
                dtype,
                "P_q, dB_q, P_k, dB_k, P_v, dB_v",
            )
        kernels._launch_pt_xs(Ss, X, dtype, "dA_q, dA_k, dA_v")
        kernels._launch_x_ats_dropped(X, As, half, [seed] * 3, 0.1, "S_q, S_k, S_v seeded")
        given = (Ss, As, X, [dY] * 3, [W] * 3, [seed] * 3, 0.1, dtype)
        kernels._launch_dx_das(*given, "dA_q, dA_k, dA_v, dX seeded")


def launch_experts(kernels: Any, dtype: torch.dtype) -> None:
    """The same of those of experts, of rows and of tokens."""
    rows = TOKENS * TOP_K
    places = torch.arange(rows)
    routing = kernels.Routing(places, places, torch.zeros(EXPERTS + 1, dtype=torch.int32), TOP_K)
    for rank, gathered in itertools.product(RANKS, ("", "_gathered")):
        read = "tokens" if gathered else "rows"
        X = torch.zeros(TOKENS if gathered else rows, FEATURES, dtype=dtype)
        A, B, W = (
            torch.zeros(EXPERTS, *shape, dtype=dtype) for shape in ((rank, FEATURES), (FEATURES, rank), (FEATURES,) * 2)
        )
        S = torch.zeros(rows, rank, dtype=dtype)
        getattr(kernels, f"_launch_experts_x_at{gathered}")(X, A, 0.5, routing, f"{read} S")
        getattr(kernels, f"_launch_experts_pt_x{gathered}")(S, X, dtype, routing, f"{read} dA")
        getattr(kernels, f"_launch_experts_p_db{gathered}")(X, B, S, 0.5, dtype, routing, f"{read} P, dB")
        key = "tokens Y" if gathered else "rows Yr"
        getattr(kernels, f"_launch_experts_gemm{gathered}")(X, W, S, B, None, routing, key)
        mask = torch.zeros(1, dtype=torch.int64), 0.1
        getattr(kernels, f"_launch_experts_x_at_dropped{gathered}")(X, A, 0.5, *mask, routing, f"{read} S seeded")
        getattr(kernels, f"_launch_experts_pt_x_dropped{gathered}")(S, X, *mask, dtype, routing, f"{read} dA seeded")
        key = "rows dXu seeded" if gathered else "tokens dXr seeded"
        getattr(kernels, f"_launch_experts_gemm_dropped{gathered}")(X, W, S, B, None, *mask, routing, key)
    for rank in RANKS:
        U, dX, S, g = (
            torch.zeros(*shape, dtype=dtype)
            for shape in ((rows, 2 * FEATURES), (rows, FEATURES), (rows, rank), (TOKENS, TOP_K))
        )
        A, B = (torch.zeros(EXPERTS, *shape, dtype=dtype) for shape in ((rank, FEATURES), (2 * FEATURES, rank)))
        mask, rest = (torch.zeros(1, dtype=torch.int64), 0.1), (ACTIVATION, routing)
        kernels._launch_experts_activate(U, A, 0.5, *rest, "rows X, S")
        kernels._launch_experts_activate_dropped(U, A, 0.5, *mask, *rest, "rows X, S seeded")
        given, dtypes, key = (dX, g, U, dX[:TOKENS], None, S, B, S, 0.5), (dtype, dtype), "rows dA, dU, dg, PU, dBU"
        kernels._launch_experts_activate_backward(*given, *dtypes, *rest, key)
        kernels._launch_experts_activate_backward_dropped(*given, *mask, *dtypes, *rest, f"{key} seeded")


def launch_mlps(kernels: Any, dtype: torch.dtype) -> None:
    """The same of what is between the linears of an MLP: ranks of down, of gate and of up."""
    gate, mask = torch.zeros(TOKENS, FEATURES, dtype=dtype), (torch.zeros(1, dtype=torch.int64), 0.1)
    for rank in RANKS:
        A = torch.zeros(rank, FEATURES, dtype=dtype)
        kernels._launch_mlp_activate(gate, gate, A, 0.5, ACTIVATION, "X_down, S_down")
        kernels._launch_mlp_activate_dropped(gate, gate, A, 0.5, *mask, ACTIVATION, "X_down, S_down seeded")
    for down, *others in RANKS_OF_GROUPS:
        P, *Ss = (torch.zeros(TOKENS, rank, dtype=dtype) for rank in (down, *others))
        Bs = [torch.zeros(FEATURES, rank, dtype=dtype) for rank in others]
        key = "dA_down, dY_gate, dY_up, P_gate, P_up, dB_gate, dB_up"
        read, dtypes = (gate, gate, gate, P), ((dtype,) * 3, ACTIVATION)
        kernels._launch_mlp_activate_backward(*read, Bs, Ss, (0.5, 0.5), *dtypes, key, ())
        A = torch.zeros(down, FEATURES, dtype=dtype)
        kernels._launch_mlp_activate_backward_dropped(*read, A, Bs, Ss, (0.5, 0.5), *mask, *dtypes, f"{key} seeded", ())


def records(
    kernels: Any, architecture: int, dtype: torch.dtype, only: str | None
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Of each launch, or of those of one kernel, once what it is, and what it takes."""
    launches: list[tuple[Any, tuple[Any, ...]]] = []
    kernels._Launch._launch = lambda launch, operands: launches.append((launch, operands))
    kernels._kernels_serve = lambda *matrices: True
    kernels._tma_serves = lambda *matrices: architecture >= 90
    kernels._multiprocessors = lambda device: 132
    launch_all(kernels, dtype)
    fitted = {
        f"_{name}_kernel"
        for name, kernel in KERNELS.items()
        if "fitting" in kernel.helpers
        and not kernel.float8
        and kernel.takes(DTYPES[dtype], min(RANKS), TOKENS, FEATURES)
    }
    assert fitted <= {launch.kernel.__name__ for launch, _ in launches}, "a kernel is not launched here"
    for (name, constants), found in itertools.groupby(
        launches, lambda pair: (pair[0].kernel.__name__, pair[0].constants)
    ):
        launch, operands = next(found)
        if only is None or name == f"_{only}_kernel":
            yield name, constants, shared_bytes(launch, operands, GPUTarget("cuda", architecture, 32))


if __name__ == "__main__":
    folder, architecture, dtype = Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    only = sys.argv[4] if len(sys.argv) > 4 else None
    assert not triton.knobs.runtime.interpret
    import_file(folder / "__init__.py", folder.name)
    modules = [
        import_file(folder / f"{name}.py", f"{folder.name}.{name}")
        for name in ("autograd", "products", "routing", "kernels")
    ]
    print(json.dumps(list(records(modules[-1], architecture, dtype, only))))
