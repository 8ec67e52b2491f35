"""The price vector, derived by hand where it is short: casts, what is saved, what a merge reads, whose time counts."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
from runlora_gen.algebra.enumerate import Program
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.liveness import saved_activations, saved_symbols
from runlora_gen.algebra.operations import Convert, Fused
from runlora_gen.cost.device import load_device
from runlora_gen.cost.measured import setting_at
from runlora_gen.cost.price import price, price_frozen, price_operation, price_phase
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.cost.vector import DEVICE_BOUND, HOST_BOUND
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.request.workload import CHOICES, Workload
from runlora_gen.search.candidates import enumerated, programs_for, setting_for

#: An adapter in fp32 over 16-bit layers, which is the default; torch's products alone.
WIDE = Workload(device="a100", kernels=False)
T, I, O, R = 16, 64, 32, 8  # noqa: E741


def setting(workload: Workload = WIDE, bias: bool = False) -> Setting:
    return setting_for(workload, I, O, R, bias, T)


def program(name: str, workload: Workload = WIDE) -> Program:
    (found,) = (p for p in enumerated(workload, setting(workload)) if p.id == name)
    return found


class TestCasts:
    def test_of_an_adapter_in_its_layers_dtype_there_are_none(self) -> None:
        for workload in (replace(WIDE, adapter_dtype="bf16"), replace(WIDE, dtype="fp32")):
            assert not setting(workload).casts
            programs = enumerated(workload, setting(workload))
            assert len(programs) == 144
            assert not any(isinstance(op, Convert) for p in programs for op in p.operations)
        assert setting().casts and len(enumerated(WIDE, setting())) == 544

    def test_a_cast_reads_four_bytes_and_writes_two(self) -> None:
        a100 = load_device("a100")
        for formula, numel in (("A = cast(lora_A)", R * I), ("B = cast(lora_B)", O * R)):
            cost = price_operation(LINEAR.parse(formula), setting())
            assert (cost.flops, cost.bytes_moved, cost.launches) == (0, 6 * numel, 1)
            assert cost.host_s == a100.host_s
            assert cost.device_s == pytest.approx(6 * numel / a100.bytes_per_s + a100.launch_s)

    def test_casts_are_priced_in_both_phases(self) -> None:
        plain = price(
            program("base_first/base_first-pt_x-dyt_s/keep-s", replace(WIDE, adapter_dtype="bf16")), setting()
        )
        once = price(program("base_first/base_first-pt_x-dyt_s/keep-s-a-b"), setting())
        again = price(program("base_first/base_first-pt_x-dyt_s/keep-s"), setting())
        a, b = (price_operation(LINEAR.parse(f"{name} = cast(lora_{name})"), setting()) for name in "AB")
        assert once.launches == plain.launches + 2 and again.launches == plain.launches + 4
        assert once.bytes_moved == plain.bytes_moved + a.bytes_moved + b.bytes_moved
        assert again.backward.bytes_moved == once.backward.bytes_moved + a.bytes_moved + b.bytes_moved
        assert once.forward.device_s == pytest.approx(plain.forward.device_s + a.device_s + b.device_s)
        assert again.host_s == pytest.approx(plain.host_s + 4 * load_device("a100").host_s)
        assert plain.flops == once.flops == again.flops

    def test_casts_that_are_made_again_are_temporaries(self) -> None:
        kept = price(program("base_first/base_first-pt_x-dyt_s/keep-s-a-b"), setting())
        again = price(program("base_first/base_first-pt_x-dyt_s/keep-s"), setting())
        assert again.forward.workspace_bytes == kept.forward.workspace_bytes + 2 * R * (I + O)
        assert again.backward.workspace_bytes > kept.backward.workspace_bytes


class TestSaved:
    def test_casts_that_are_kept_are_counted(self) -> None:
        """Found as 3,840 bytes that were saved where 2,304 were priced."""
        x_and_s, casts = 2 * (T * I + T * R), 2 * R * (I + O)
        assert (x_and_s, x_and_s + casts) == (2304, 3840)
        for kept, expected in (("s", 2304), ("s-a-b", 3840), ("s-a", 2304 + 2 * R * I), ("s-b", 2304 + 2 * O * R)):
            cost = price(program(f"base_first/base_first-pt_x-dyt_s/keep-{kept}"), setting())
            assert cost.saved_bytes == expected
            assert cost.memory_bytes == expected + cost.workspace_bytes

    @pytest.mark.parametrize("workload", [WIDE, replace(WIDE, train=("b",)), replace(WIDE, dtype="fp32")])
    def test_parameters_live_anyway(self, workload: Workload) -> None:
        case = setting(workload)
        for candidate in enumerated(workload, case):
            symbols = saved_symbols(candidate, case.gradients)
            activations = saved_activations(candidate, case.gradients)
            assert set(symbols) - set(activations) <= {LINEAR[name] for name in ("W", "lora_A", "lora_B", "A", "B")}
            made = {LINEAR["X"], *candidate.kept}
            assert set(activations) == made & set(symbols)
            sizes = {"X": T * I, "S": T * R, "M": O * I, "D": O * I, "A": R * I, "B": O * R}
            expected = sum(sizes[str(symbol)] for symbol in activations) * case.dtype.bytes
            assert price(candidate, case).saved_bytes == expected

    def test_what_only_an_unwanted_gradient_reads_is_not_saved(self) -> None:
        case = setting()
        split = program("base_first/base_first-pt_x-dyt_s/keep-s-a-b")
        names = {str(s) for s in saved_activations(split, frozenset({"dX", "dB"}))}
        assert names == {"S", "A", "B"}
        assert {str(s) for s in saved_activations(split, frozenset({"dB"}))} == {"S"}
        assert price(split, replace(case, gradients=frozenset({"dB"}))).saved_bytes == 2 * T * R


class TestOperations:
    def test_a_merge_is_one_launch_that_reads_the_weight_once(self) -> None:
        """As the GPU's counters say of addmm."""
        cost = roofline(LINEAR.parse("M = W + s * B @ A"), setting())
        assert cost.launches == 1
        assert cost.bytes_moved == 2 * (2 * O * I + O * R + R * I)
        assert cost.flops == 2 * O * I * R

    def test_products_take_the_rate_of_their_dtype(self) -> None:
        a100 = load_device("a100")
        for dtype in ("bf16", "fp32"):
            large = replace(setting(replace(WIDE, dtype=dtype)), tokens=4096, in_features=4096, out_features=4096)
            cost = roofline(LINEAR.parse("dX = dY @ W"), large)
            assert cost.flops == 2 * 4096**3
            assert cost.device_s == pytest.approx(cost.flops / a100.flops_per_s[dtype] + a100.launch_s)

    def test_the_flops_of_a_kernel_are_those_of_all_its_parts(self) -> None:
        case = setting(replace(WIDE, kernels=True))
        assert roofline(LINEAR.parse("fused_gemm: dX = P @ A; dX += dY @ W"), case).flops == 2 * T * I * (R + O)

    def test_an_accumulation_reads_its_target(self) -> None:
        plain, added = (roofline(LINEAR.parse(f), setting()) for f in ("Y = X @ W.T + b", "Y += X @ W.T"))
        assert plain.bytes_moved == 2 * (T * I + O * I + T * O)
        assert added.bytes_moved == plain.bytes_moved + 2 * T * O and added.launches == plain.launches == 1

    def test_gradients_are_written_in_the_adapter_s_dtype(self) -> None:
        for workload, width in ((WIDE, 4), (replace(WIDE, adapter_dtype="bf16"), 2)):
            cost = roofline(LINEAR.parse("dA = P.T @ X"), setting(workload))
            assert (cost.bytes_moved, cost.launches) == (2 * (T * R + T * I) + width * R * I, 1)

    def test_one_that_is_scaled_apart_takes_a_launch_of_its_own(self) -> None:
        """s Bᵀ G in float32 from 16-bit factors: no product scales what it widens."""
        for workload, launches, bytes_moved in (
            (WIDE, 2, 2 * (O * R + O * I) + 3 * 4 * R * I),
            (replace(WIDE, adapter_dtype="bf16"), 1, 2 * (O * R + O * I) + 2 * R * I),
            (replace(WIDE, dtype="fp32"), 1, 4 * (O * R + O * I + R * I)),
        ):
            cost = roofline(LINEAR.parse("dA = s * B.T @ G"), setting(workload))
            assert (cost.launches, cost.bytes_moved) == (launches, bytes_moved)

    def test_a_bias_is_read(self) -> None:
        with_bias, without = (roofline(LINEAR.parse("Y = X @ W.T + b"), setting(bias=bias)) for bias in (True, False))
        assert with_bias.bytes_moved == without.bytes_moved + 2 * O

    def test_operations_are_measured_in_one_dtype(self) -> None:
        case = setting_at({"T": 3, "R": 5}, DTYPES["fp16"], load_device("a100"))
        assert (case.tokens, case.in_features, case.out_features, case.rank) == (3, 1, 1, 5)
        assert case.dtype is case.adapter_dtype is DTYPES["fp16"] and not case.casts
        assert not case.bias and not case.gradients


class TestTime:
    """Device and host work side by side; which of them counts, the step of the whole model says."""

    def test_it_is_both_by_the_host_s_share(self) -> None:
        split = program("base_first/base_first-pt_x-dyt_s/keep-s-a-b")
        costs = {share: price(split, setting(), share) for share in (DEVICE_BOUND, 0.25, HOST_BOUND)}
        assert price(split, setting()) == costs[DEVICE_BOUND]
        for share, cost in costs.items():
            assert cost.device_s == costs[0.0].device_s and cost.host_s == costs[0.0].host_s
            assert cost.time_s == pytest.approx(share * cost.host_s + (1 - share) * cost.device_s)
            assert cost.weighted_s(0.5) == pytest.approx((cost.host_s + cost.device_s) / 2)
            assert cost.as_dict()["time_us"] == pytest.approx(cost.time_s * 1e6, abs=1e-3)
            assert cost.as_dict()["device_us"] == pytest.approx(cost.device_s * 1e6, abs=1e-3)
            assert cost.as_dict()["host_us"] == pytest.approx(cost.host_s * 1e6, abs=1e-3)
        assert costs[0.0].host_s == pytest.approx(costs[0.0].launches * load_device("a100").host_s)

    @pytest.mark.parametrize("device", ["h100", "h200"])
    def test_the_host_s_time_is_that_of_the_launch_mode(self, device: str) -> None:
        """Under torch.compile operators and kernels cost the host something else, and nothing else is another price."""
        eager = Workload(device=device)
        workloads = {launch: replace(eager, launch=launch) for launch in CHOICES["launch"]}
        settings = {launch: setting_for(workload, 512, 512, 8, False, 256) for launch, workload in workloads.items()}
        profile = load_device(device)
        figures = {
            "eager": (profile.host_s, profile.kernel_host_s, profile.function_host_s),
            "compile": (profile.compiled_host_s, profile.compiled_kernel_host_s, 0.0),
        }
        seen = set()
        for candidate in programs_for(eager, settings["eager"])[::7]:
            fused = [op for op in candidate.operations if isinstance(op, Fused)]
            of_kernels = sum(KERNELS[op.kernel].launches_at(256, 512) for op in fused)
            costs = {launch: price(candidate, case) for launch, case in settings.items()}
            assert costs["graph"] == costs["eager"]
            for launch, (operator_s, kernel_s, function_s) in figures.items():
                assert operator_s is not None and kernel_s is not None
                expected = (costs[launch].launches - of_kernels) * operator_s + of_kernels * kernel_s + function_s
                assert costs[launch].host_s == pytest.approx(expected)
            assert costs["compile"].device_s == costs["eager"].device_s
            assert costs["compile"].saved_bytes == costs["eager"].saved_bytes
            seen.add(bool(fused))
        assert seen == {False, True}

    def test_phases_add_up(self) -> None:
        for candidate in enumerated(WIDE, setting())[::17]:
            cost = price(candidate, setting())
            forward, backward = (price_phase(p, setting()) for p in (candidate.forward, candidate.backward))
            assert cost.device_s == forward.device_s + backward.device_s
            assert cost.host_s == forward.host_s + backward.host_s
            assert cost.workspace_bytes == max(forward.workspace_bytes, backward.workspace_bytes)

    def test_the_frozen_linear_is_one_product_a_phase(self) -> None:
        case = setting(bias=True)
        products = [price_operation(LINEAR.parse(f), case) for f in ("Y = X @ W.T + b", "dX = dY @ W")]
        first = replace(case, gradients=frozenset({"dA"}))
        for share, kind in ((DEVICE_BOUND, "device_s"), (HOST_BOUND, "host_s")):
            seconds = [getattr(cost, kind) for cost in products]
            assert price_frozen(case, share) == pytest.approx(sum(seconds))
            assert price_frozen(first, share) == pytest.approx(seconds[0])
        assert price_frozen(case, 0.5) == pytest.approx((price_frozen(case, 0.0) + price_frozen(case, 1.0)) / 2)


def test_a_setting_is_one_object() -> None:
    """It is a key of many caches, compared by identity."""
    assert setting() is setting() and setting() is not setting(bias=True)
    assert replace(setting()) != setting()
    for first, second in itertools.combinations(
        (WIDE, replace(WIDE, adapter_dtype="bf16"), replace(WIDE, train=("a",))), 2
    ):
        assert setting(first) is not setting(second)
    names = {field.name for field in fields(Setting)}
    assert {"dtype", "adapter_dtype", "gradients", "device"} < names and "launch" not in names


def test_stochastic_rounding_of_a_merge_has_an_error_of_its_own() -> None:
    stochastic = replace(WIDE, allow_lossy_merge=True, merge_rounding="stochastic")
    name = "merged/base_first-pt_x-dyt_s/keep-s"
    errors = [
        price(program(name, workload), setting(workload)).update_error
        for workload in (stochastic, replace(stochastic, merge_rounding="nearest"))
    ]
    assert min(errors) > 0 and errors[0] != errors[1]
