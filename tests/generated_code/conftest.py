"""Generated modules to run: all variants of one layer shape, rendered once a session."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from runlora_gen.emit.nodes import module_node
from runlora_gen.emit.render import Header, render
from runlora_gen.request.layers import Layer
from runlora_gen.request.workload import Workload
from runlora_gen.search.ranges import decide_model

Render = Callable[..., ModuleType]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Render]:
    """Render and execute a module for a layer shape and a workload."""
    loaded: list[str] = []

    def load(
        workload: Workload = Workload(),  # noqa: B008  # immutable
        *,
        in_features: int = 768,
        out_features: int = 2560,
        rank: int = 8,
        all_variants: bool = False,
    ) -> ModuleType:
        layer = Layer(in_features, out_features, False, 1, ("up_proj",))
        (choice,) = decide_model(workload, (layer,), rank)
        node = module_node(choice, rank, workload, width=120, all_variants=all_variants)
        source = render("linear.py.jinja", {"header": Header("command", "digest"), "module": node})
        # Triton reads the source of its kernels: the module must be a file.
        path = tmp_path_factory.mktemp("generated") / f"generated_{len(loaded)}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        loaded.append(path.stem)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


@pytest.fixture(scope="session")
def everything(load: Render) -> ModuleType:
    """A module with every variant."""
    return load(all_variants=True)


@pytest.fixture(scope="session")
def module(load: Render) -> ModuleType:
    """A module with one variant, as most are."""
    return load()
