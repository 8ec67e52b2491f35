"""A small Llama with random weights, and the package that serves its linears at one rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
from runlora_gen.from_model.live import read_model
from runlora_gen.into_model.packages import imported
from runlora_gen.request.groups import groups
from runlora_gen.request.layout import LAYOUTS, STANDALONE
from runlora_gen.search import grouped
from torch import Tensor

for name in ("transformers", "peft"):
    pytest.importorskip(name, reason="needs transformers and peft (the test extra)")

from ..poison import poisoned  # noqa: E402
from .models import MLPS_PAY, RANK, VOCABULARY, llama  # noqa: E402 - needs both

#: What takes more than some seconds runs where it is asked for.
takes_long = pytest.mark.skipif(not os.environ.get("RUNLORA_LONG"), reason="takes long: set RUNLORA_LONG=1")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sizes are so small that threads are what takes time: where others want the cores, a hundred times as long."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(autouse=True)
def _the_same_adapters() -> None:
    """Whichever tests ran before: from some first adapters roundings grow a thousand times as far as from others."""
    torch.manual_seed(0)


@pytest.fixture(scope="package", autouse=True)
def _poison() -> Iterator[None]:
    """With new memory that is the same each time, a launch with the operands of one before is not interpreted again."""
    with poisoned() if os.environ.get("TRITON_INTERPRET") == "1" else contextlib.nullcontext():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What a package does to a model it does in both layouts."""
    if "package" in metafunc.fixturenames and metafunc.module.__name__.endswith(
        ("with_peft", "without_peft", "biases")
    ):
        metafunc.parametrize("package", LAYOUTS, indirect=True, scope="session")


@pytest.fixture(scope="session")
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Generated once: the shapes of the model at ``RANK``."""
    layout = getattr(request, "param", STANDALONE)
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, kernels=False, layout=layout, output=out)
    return imported(folder)


@pytest.fixture(scope="session")
def with_groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with a module for each of the model's groups, whatever they are priced at."""
    layout = getattr(request, "param", STANDALONE)
    with pytest.MonkeyPatch.context() as patch:
        pays = [(group, None) for group in groups(read_model(llama()).architecture)]
        patch.setattr(grouped, "decide_groups_of_step", lambda *_: pays)
        out = tmp_path_factory.mktemp("packages")
        (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, kernels=False, layout=layout, output=out)
    return imported(folder)


@pytest.fixture(scope="session")
def with_mlps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with a module for the model's MLPs, as where they pay."""
    layout = getattr(request, "param", STANDALONE)
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(llama(), rank=RANK, layout=layout, output=out, **MLPS_PAY)
    return imported(folder)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "adapter")
