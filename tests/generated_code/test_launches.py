"""What is planned once for a geometry and launched again without Triton, and when it must not be."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
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


def launch_of(module: ModuleType, kernel: Kernel, **described: Any) -> Any:
    return module._Launch(kernel, (3,), (7, 1), DEVICE, **described, ROWS=16, WHOLE=True, num_warps=4)


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
    launch = launch_of(module, kernel, described={1: ([4, 16], [16, 1], [2, 8])})
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


class Direct:
    """A launch whose C function only notes what it is given, and what Triton would launch instead."""

    def __init__(self, module: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[tuple[Any, ...]] = []
        self.made: list[int] = []
        self.device = 0
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
        self.launch = launch_of(module, kernel)
        self.launch.compiled = Again(kernel)[(3, 1, 1)]
        tensors = [(0, 4, None, {}), (1, 5, self.describe, {})]
        self.launch.direct = module._Direct(self.note, [3, 1, 1, None, None, None, 4, None], tensors, [(2, 7)], 0)

    def note(self, *arguments: Any) -> None:
        self.called.append(arguments)

    def describe(self, tensor: Tensor) -> str:
        self.made.append(tensor.data_ptr())
        return f"descriptor of {tensor.data_ptr()}"


class TestDirectLaunches:
    @pytest.fixture(autouse=True)
    def direct(self, module: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Direct:
        return Direct(module, kernel, monkeypatch)

    def test_addresses_of_the_call(self, direct: Direct) -> None:
        first, second = (torch.zeros(4, 16, device=DEVICE) for _ in range(2))
        for tensors in ((first, second), (second, first), (first, second)):
            direct.launch(*tensors, 0.5)
        expected = [
            (3, 1, 1, 77, a.data_ptr(), f"descriptor of {b.data_ptr()}", 4, 0.5)
            for a, b in ((first, second), (second, first), (first, second))
        ]
        assert direct.called == expected
        assert direct.made == [second.data_ptr(), first.data_ptr()]  # once for an address
        assert direct.launch.direct.arguments[3:6] == [None] * 3  # another thread may launch meanwhile

    def test_so_many_addresses_are_kept(
        self, direct: Direct, module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_MOST_ADDRESSES", 3)
        tensors = [torch.zeros(2, device=DEVICE) for _ in range(10)]
        for tensor in tensors:
            direct.launch(tensor, tensor, 1.0)
            assert len(direct.launch.direct.tensors[1][3]) <= 3

    def test_on_another_gpu_triton_launches(self, direct: Direct, kernel: Kernel) -> None:
        direct.device = 1
        direct.launch(torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE), 1.0)
        assert not direct.called and len(kernel.launched) == 1

    def test_for_a_profiler_triton_launches(
        self, direct: Direct, kernel: Kernel, module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
        hook = module.triton.knobs.runtime.launch_enter_hook
        with monkeypatch.context() as patch:
            patch.setattr(hook, "calls", [print])
            direct.launch(*tensors, 1.0)
        direct.launch(*tensors, 1.0)
        assert len(direct.called) == 1 and len(kernel.launched) == 1


def compiled_for_c() -> Any:
    """What Triton 3.5 and 3.6 give for a kernel of a pointer, a descriptor and a scale; ``chr`` stands for C."""
    launcher = chr

    def inner(*args: Any) -> Any:
        return launcher(*args)

    run = SimpleNamespace(launch=inner, launch_cooperative_grid=False, launch_pdl=True)
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=["how"])
    return SimpleNamespace(run=run, metadata=metadata, function=99, packed_metadata=(4, 1, 0))


def test_the_arguments_of_the_c_function(module: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = importlib.import_module("triton.backends.nvidia.driver")
    monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKppOOOOOO", raising=False)

    def make(descriptor: Any, how: str) -> list[Any]:
        return [(how, descriptor.base.data_ptr()), *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", make)
    launch = launch_of(module, kernel, described={1: ([4, 16], [16, 1], [2, 8])})
    launch.device = torch.device("cuda", 0)
    x = torch.zeros(4, 16, dtype=torch.float16, device=DEVICE)
    descriptor = module.TensorDescriptor(x, [4, 16], [16, 1], [2, 8])
    direct = module._direct(launch, compiled_for_c(), [x, descriptor, 0.5, None])
    assert direct.launch is chr and direct.device == 0
    base = [3, 1, 1, None, 99, False, True, None, None, (4, 1, 0), None, None, None]
    assert direct.arguments == [*base, None, None, 4, 16, 16, 1, None, None, 7, 1, 16, True]
    (pointer, described), scales = direct.tensors, direct.scales
    assert pointer[:3] == (0, 13, None) and described[:2] == (1, 14) and scales == [(2, 19)]
    assert described[2](x) == ("how", x.data_ptr())


@pytest.mark.parametrize("changed", ["format", "scratch", "closure", "no device", "no metadata"])
def test_a_triton_of_another_making_launches_itself(
    module: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    driver = importlib.import_module("triton.backends.nvidia.driver")
    monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKppOOOOOO", raising=False)
    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda descriptor, how: [how])
    launch = launch_of(module, kernel, described={0: ([4, 16], [16, 1], [2, 8])})
    launch.device = torch.device("cuda", 0)
    compiled = compiled_for_c()
    descriptor = module.TensorDescriptor(torch.zeros(4, 16), [4, 16], [16, 1], [2, 8])
    assert module._direct(launch, compiled, [descriptor]) is not None
    match changed:
        case "format":
            monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKOOOOOO")
        case "scratch":
            compiled.metadata.global_scratch_size = 128
        case "closure":
            compiled.run.launch = print
        case "no device":
            launch.device = torch.device("cuda")
        case _:
            compiled.metadata.tensordesc_meta = None
    assert module._direct(launch, compiled, [descriptor]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_direct_launches_give_the_same_bits(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those by Triton, also of other tensors, off 16 bytes, and of single rows and columns."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator).half()

    direct = 0
    for tokens, width, R in ((1, 64, 8), (300, 72, 8), (300, 7, 3), (2048, 1, 16)):
        for _ in range(3):
            X, A = draw(tokens, width), draw(R, width)
            monkeypatch.setattr(module, "_PLANS", {})
            by_triton = module._launch_x_at(X, A, 0.5, "S")
            ((launch, *_),) = module._PLANS.values()
            direct += launch.direct is not None
            for other in (draw(tokens, width), X):
                again = module._launch_x_at(other, A, 0.5, "S")
            assert torch.equal(again, by_triton)
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if getattr(driver, "_BASE_ARGS_FORMAT", "") == module._C_ARGUMENTS:
        assert direct == 12


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
        assert torch.equal(one._x_at_operator(X, A, 1.0, tiles="S"), torch.full((4, 2), 16.0).half().to(DEVICE))


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
