"""What is planned once for a geometry and launched again without Triton, and when it must not be."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.4")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Kernel:
    """Stands for one of Triton's: notes what it compiles, and what is launched again."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))
            return Again(self)

        return launch


class Again:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.kernel.launched.append((grid, args))


@pytest.fixture(scope="module")
def module(load: Any) -> ModuleType:
    from runlora_gen.request.workload import Workload

    made: ModuleType = load(Workload(launch="graph", device="h200"), in_features=5120, out_features=5120, rank=8)
    assert made.KERNELS and "_x_at_kernel" in vars(made)
    return made


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def launch_of(module: ModuleType, kernel: Kernel, **blocks: Any) -> Any:
    return module._Launch(kernel, (3,), (7, 1), DEVICE, **blocks, ROWS=16, WHOLE=True, num_warps=4)


def test_the_first_launch_is_tritons_and_the_next_are_not(module: ModuleType, kernel: Kernel) -> None:
    launch = launch_of(module, kernel)
    first, second = (torch.zeros(4, 8, device=DEVICE) for _ in range(2))
    launch(first, None, 0.5)
    launch(second, None, 0.25)
    launch(first, None, 2.0)
    (made,) = kernel.compiled
    assert made[0] == (3, 1, 1) and made[1][1:] == (None, 0.5, 7, 1)
    assert made[2] == {"ROWS": 16, "WHOLE": True, "num_warps": 4, "num_stages": 3}
    grids, arguments = zip(*kernel.launched, strict=True)
    assert set(grids) == {(3, 1, 1)}
    assert arguments[0][0] is second and arguments[0][1:] == (None, 0.25, 7, 1, 16, True)
    assert arguments[1][0] is first and arguments[1][2] == 2.0


def test_descriptors_are_of_the_tensors_of_the_call(module: ModuleType, kernel: Kernel) -> None:
    launch = launch_of(module, kernel, blocks={1: [2, 8]})
    first, second = (torch.zeros(4, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    launch(first, first)
    launch(second, second)
    launch(first, first)
    made = [*(args[1] for _, args, _ in kernel.compiled), *(args[1] for _, args in kernel.launched)]
    assert [descriptor.base is tensor for descriptor, tensor in zip(made, (first, second, first), strict=True)] == [
        True
    ] * 3
    assert len({id(descriptor) for descriptor in made}) == 3  # another thread may hold one
    for descriptor in made:
        assert (*descriptor.shape, *descriptor.strides, *descriptor.block_shape) == (4, 16, 16, 1, 2, 8)
        assert type(descriptor) is type(made[0]) and vars(descriptor).keys() == vars(made[0]).keys()
    assert all(values["base"] is None for _, values in launch.described)  # no tensor is kept alive


def test_where_triton_looks_at_more_it_is_asked_every_time(
    module: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DIRECT", False)
    launch = launch_of(module, kernel)
    for _ in range(3):
        launch(torch.zeros(2, 2, device=DEVICE))
    assert len(kernel.compiled) == 3 and not kernel.launched


class TestPlans:
    @pytest.fixture(autouse=True)
    def planned(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_PLANS", {})
        self.made: list[tuple[Any, ...]] = []

    def plan(self, *operands: Any) -> tuple[Any, ...]:
        self.made.append(operands)
        return operands

    def asks_again(self, module: ModuleType, first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
        module._PLANS.clear()
        self.made.clear()
        for operands, *choices in (first, second):
            module._planned(self.plan_, operands, *choices)
        return len(self.made) == 2

    @property
    def plan_(self) -> Callable[..., Any]:
        # One object: bound methods are made anew at each look.
        return self.__dict__.setdefault("_plan", self.plan)

    def test_one_for_all_that_triton_takes_for_the_same(self, module: ModuleType) -> None:
        x = torch.zeros(8, 32, device=DEVICE)
        assert not self.asks_again(module, ((x, None), 1), ((torch.ones_like(x), None), 1))
        assert not self.asks_again(module, ((x[1:3],), 1), ((x[5:7],), 1))

    @pytest.mark.parametrize(
        "other",
        [
            lambda x: x[:8, 1:17],  # off 16 bytes
            lambda x: x[1:2, :16],
            lambda x: x.t()[:16],
            lambda x: x[:8, :16].contiguous(),
            lambda x: x.to(torch.float16)[:8, :16],
            lambda x: None,
        ],
        ids=["alignment", "a size of 1", "strides", "contiguous", "dtype", "none"],
    )
    def test_another_where_triton_may_compile_anew(
        self, module: ModuleType, other: Callable[[Tensor], Tensor | None]
    ) -> None:
        x = torch.zeros(64, 64, device=DEVICE)
        assert self.asks_again(module, ((x[:8, :16],), 1), ((other(x),), 1))

    def test_another_for_each_choice(self, module: ModuleType) -> None:
        x = torch.zeros(2, 2, device=DEVICE)
        assert self.asks_again(module, ((x,), torch.float16), ((x,), torch.float32))
        assert self.asks_again(module, ((x,), "S"), ((x,), "P, dB"))

    def test_so_many_are_kept(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MOST_PLANS", 4)
        for tokens in range(1, 20):
            module._planned(self.plan_, (torch.zeros(tokens, 2, device=DEVICE),))
            assert len(module._PLANS) <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter is not made for threads")
def test_many_threads(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its own result, whoever plans first, and while plans are thrown away."""
    monkeypatch.setattr(module, "_PLANS", {})
    monkeypatch.setattr(module, "_MOST_PLANS", 2)
    generator = torch.Generator().manual_seed(0)
    matrices = [
        (torch.randn(t, 48, generator=generator).half().to(DEVICE), torch.randn(4, 48, generator=generator).half())
        for t in (1, 16, 33, 80)
    ]
    wrong: list[str] = []

    def work(number: int) -> None:
        X, A = matrices[number % len(matrices)]
        A = A.to(DEVICE)
        for _ in range(3):
            S = module._launch_x_at(X, A, 0.5, "S")
            if not torch.allclose(S.float(), 0.5 * X.float() @ A.float().t(), atol=2e-2, rtol=2e-2):
                wrong.append(f"{tuple(X.shape)}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_integer_scaling_is_a_number_like_another(
    module: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton would compile for an integer of 1, and then be given 0.5."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_PLANS", {})
        patch.setattr(module, "_x_at_kernel", kernel)
        for scaling in (1, 0.5):
            module._launch_x_at(torch.ones(4, 16, device=DEVICE), torch.ones(2, 16, device=DEVICE), scaling, "S")
        arguments = [kernel.compiled[0][1][3], kernel.launched[0][1][3]]
        assert arguments == [1.0, 0.5] and all(isinstance(argument, float) for argument in arguments)
    X, A = torch.ones(4, 16, device=DEVICE).half(), torch.ones(2, 16, device=DEVICE).half()
    for scaling in (1, 0.5, 2, 0.25):
        assert torch.equal(module._launch_x_at(X, A, scaling, "S"), torch.full((4, 2), 16 * scaling).half().to(DEVICE))


def test_imported_again_it_has_operators_of_its_own(module: ModuleType) -> None:
    spec = module.__spec__
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.__name__ == module.__name__ and again._LIBRARY.ns != module._LIBRARY.ns
    X, A = torch.ones(4, 16, device=DEVICE).half(), torch.ones(2, 16, device=DEVICE).half()
    for one in (module, again):
        assert torch.equal(one._x_at_operator(X, A, 1.0, "S"), torch.full((4, 2), 16.0).half().to(DEVICE))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_on_the_gpu_of_the_tensors(module: ModuleType) -> None:
    for index in (1, 0, 1):
        X = torch.randn(64, 256, device=f"cuda:{index}").half()
        A = torch.randn(8, 256, device=X.device).half()
        for _ in range(3):
            S = module._launch_x_at(X, A, 0.5, "S")
            torch.testing.assert_close(S, (0.5 * X.float() @ A.float().t()).half(), atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_on_the_stream_of_the_call_and_under_capture(module: ModuleType) -> None:
    X, A = (torch.randn(n, 256, device=DEVICE).half() for n in (512, 8))
    expected = module._launch_x_at(X, A, 0.5, "S").clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(module._launch_x_at(X, A, 0.5, "S"), expected)
        torch.cuda._sleep(10_000_000)
        late = X.new_zeros(X.shape)
        late.copy_(X)
        found = module._launch_x_at(late, A, 0.5, "S")
    stream.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module._launch_x_at(X, A, 0.5, "S")
    X.copy_(2 * X)
    graph.replay()
    torch.testing.assert_close(captured, 2 * expected)
    torch.cuda.empty_cache()
    torch.testing.assert_close(module._launch_x_at(X, A, 0.5, "S"), 2 * expected)
