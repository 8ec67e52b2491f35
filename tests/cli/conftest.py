"""What the tests of the command line run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small(small: tuple[str, ...]) -> tuple[str, ...]:
    """With fewer programs to choose from: these tests run it hundreds of times."""
    return (*small, "--no-kernels", "--adapter-dtype", "bf16")


@pytest.fixture(scope="session")
def pristine(run, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT as a plain run of that leaves it; tests only read it."""
    out = tmp_path_factory.mktemp("pristine")
    run(*small, "-o", out).ok()
    return out
