"""What is asked of generated packages in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ..quickened import quickened

CONFIG = Path(__file__).parents[2] / "pyproject.toml"


def proves(
    package: Path, tests: str, which: str, environment: Mapping[str, str] = os.environ, *, examples: int = 4
) -> None:
    """A package's own tests pass; ``which``: of them, as pytest's ``-k``; ``examples``: cases of each property."""
    # From above the folder that it is in: a package is imported as one.
    path = f"{package.parent.name}/{package.name}/{tests}"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", which, path]
    few, place = quickened({**environment, "RUNLORA_EXAMPLES": str(examples)}), package.parents[1]
    done = subprocess.run(command, env=few, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def types_are_right(package: Path) -> None:
    """Also of operators, which nothing calls but torch.compile on a GPU."""
    # What is known of torch is read once, for the repository's own types too.
    cache = CONFIG.with_name(".mypy_cache")
    options = ["--strict", "--config-file", str(CONFIG), "--cache-dir", str(cache)]
    command = [sys.executable, "-m", "mypy", *options, package.name]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
