"""Where the tests of the emission write, and what they run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place: these tests make and remove thousands of small files."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK | os.X_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="runlora-gen-tests-", dir=MEMORY) as folder:
        yield Path(folder)


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
