"""What an MLP costs: its operations' prices, what it spares the model, and what is frozen of it."""

from __future__ import annotations

import pytest
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.liveness import saved_activations
from runlora_gen.algebra.mlp import LINEARS, MLP
from runlora_gen.algebra.operations import Contract
from runlora_gen.cost.device import load_device
from runlora_gen.cost.measured import is_priced
from runlora_gen.cost.passes import Times, passes_apart, price_passes
from runlora_gen.cost.price import price, price_frozen, price_frozen_forward, price_of_model, price_operation, spares
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.cost.vector import DEVICE_BOUND, HOST_BOUND
from runlora_gen.request.mlps import Mlp
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_of

T, I, INNER, O, R = 4096, 5120, 13824, 4096, 16  # noqa: E741 - as the formulas have it
SITE = Mlp(I, INNER, O, "silu_gated", False, 1, (("gate_proj", "up_proj", "down_proj"),))
GOALS = tuple(map(str, MLP.gradients))
#: Bytes of what is between, and of X and of Y.
WIDE, X, Y = T * INNER * 2, T * I * 2, T * O * 2
#: How often the bytes of what is between are moved: act(gate), times up; of the gradients.
FORWARD, BACKWARD = 2 + 3, 3 + 3 + 3


def at(device: str = "a100", **options: object) -> Setting:
    return setting_of(Workload(adapter_dtype="bf16", device=device, **options), SITE, R, T)  # type: ignore[arg-type]


def test_the_setting_has_each_linear_s_sizes() -> None:
    dims = {name: at().dims[name] for name in ("T", "I", "O_gate", "O_up", "I_down", "O_down")}
    assert dims == {"T": T, "I": I, "O_gate": INNER, "O_up": INNER, "I_down": INNER, "O_down": O}
    assert {at().dims[f"R_{linear}"] for linear in LINEARS} == {R}


@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_it_is_three_linears_and_what_is_between(input_grad: bool) -> None:
    """As the model itself runs it, in passes over what lies together."""
    setting = at(input_grad=input_grad)
    device = setting.device

    def linear(*formulas: str) -> float:
        return sum(price_operation(MLP.parse(formula), setting).device_s for formula in formulas)

    forward = linear(
        "Y_gate = X @ W_gate.T + b_gate", "Y_up = X @ W_up.T + b_up", "Y_down = X_down @ W_down.T + b_down"
    )
    forward += FORWARD * WIDE / device.bytes_per_s + 2 * device.launch_s
    assert price_frozen_forward(setting)[0] == pytest.approx(forward)
    # Without adapters nobody wants the gradients between, but for that of the input.
    backward = linear("dX_down = dY_down @ W_down", "dX = dY_gate @ W_gate", "dX += dY_up @ W_up")
    backward += BACKWARD * WIDE / device.bytes_per_s + 3 * device.launch_s
    assert price_frozen(setting) == pytest.approx(forward + (backward if input_grad else 0))
    launches = 3 + 2 + (3 + 3 if input_grad else 0)
    assert price_frozen(setting, HOST_BOUND) == pytest.approx(launches * device.host_s)


@pytest.mark.parametrize("device", ["a100", "cpu"])
def test_what_the_model_does_between(device: str) -> None:
    """act(gate), which it keeps, and its product with up; of gradients dx · up, that through act, dx · act(gate)."""
    setting = at(device)
    expected = {
        "X_down = activate(Y_gate, Y_up)": [2 * WIDE, 3 * WIDE],
        "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)": [3 * WIDE, 3 * WIDE],
        "dY_up = up_gradient(dX_down, Y_gate, Y_up)": [3 * WIDE],
    }
    for formula, moved in expected.items():
        assert price_of_model(MLP.parse(formula), setting) == price_passes(moved, setting.device)
        function = formula.partition(" = ")[2].partition("(")[0]
        assert passes_apart(function, WIDE).straight == tuple(moved) and not passes_apart(function, WIDE).strided
    # By torch a module makes it in the same passes.
    whole = price_operation(MLP.parse("X_down = activate(Y_gate, Y_up)"), setting)
    assert (whole.bytes_moved, whole.launches, whole.flops) == (5 * WIDE, 2, 0)


def test_what_is_spared() -> None:
    """What is between, both ways, and the sum of the gradients that gate and up give of X."""
    device = at().device
    forward, backward = spares(at())
    assert forward == price_passes([2 * WIDE, 3 * WIDE], device)
    assert backward.device_s == pytest.approx(price_passes([*[3 * WIDE] * 3, 3 * X], device).device_s)
    assert backward.host_s == pytest.approx(4 * device.host_s)
    assert spares(at(input_grad=False))[1].host_s == pytest.approx(3 * device.host_s)
    bound = Times(price_frozen(at(), DEVICE_BOUND), price_frozen(at(), HOST_BOUND))
    between = forward + backward
    assert between.device_s < bound.device_s and between.host_s < bound.host_s


def test_what_kernels_move() -> None:
    """Each reads what it is given once, and what stays in tiles is not moved."""
    setting = at()
    kernels = {op.kernel: op for op in MLP.operations if getattr(op, "kernel", "").startswith("mlp")}
    there, back = (roofline(kernels[name], setting) for name in ("mlp_activate", "mlp_activate_backward"))
    low, factor = T * R * 2, INNER * R * 2
    assert there.bytes_moved == 3 * WIDE + factor + low
    # dX_down, gate, up and both gradients; P, both B, both S; both P, dA and both dB.
    assert back.bytes_moved == 5 * WIDE + (1 + 2 + 2) * low + 2 * factor + 3 * factor
    assert there.flops == 2 * T * INNER * R and back.flops == 5 * 2 * T * INNER * R
    assert (there.launches, back.launches) == (2, 4)


def test_they_are_candidates_where_products_have_no_times() -> None:
    """Or where they have some themselves, as on an H200, which stands for the H100, in 16 bits."""
    for device, dtype, expected in (("a100", "bf16", True), ("h100", "bf16", True), ("h100", "fp32", False)):
        for operation in MLP.operations:
            if getattr(operation, "kernel", "").startswith("mlp"):
                assert is_priced(operation, DTYPES[dtype], load_device(device)) is expected


def test_phases_add_up_and_what_is_saved_is_what_the_backward_reads() -> None:
    """X, and of what is kept between as much as a program says."""
    setting = at()
    kept = {"X_down": WIDE, "Y_gate": WIDE, "Y_up": WIDE, **{f"S_{linear}": T * R * 2 for linear in LINEARS}}
    for program in enumerate_programs(MLP, GOALS)[::37]:
        cost = price(program, setting)
        assert cost.saved_bytes == X + sum(kept[str(symbol)] for symbol in program.kept)
        assert set(saved_activations(program, setting.gradients)) == {MLP["X"], *program.kept}
        products = [
            step for op in program.operations for step in getattr(op, "parts", (op,)) if isinstance(step, Contract)
        ]
        assert cost.flops >= sum(2 * T * I * INNER for step in products if str(step.out) in ("Y_gate", "Y_up")) / 2
        assert cost.update_error == 0


def test_frozen_factors_save_what_y_is_made_again_of() -> None:
    """Where no gradient of B is wanted, S is kept only where Y is made again."""
    setting = at(train=("a",))
    assert setting.gradients == {"dX", *(f"dA_{linear}" for linear in LINEARS)}
    goals = tuple(sorted(setting.gradients))
    for program in enumerate_programs(MLP, goals):
        saved = {str(symbol) for symbol in saved_activations(program, setting.gradients)}
        assert "S_down" not in saved and ("S_gate" in saved) != ("Y_gate" in saved)
