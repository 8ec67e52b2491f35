"""A plugin of pytest for processes of their own that run kernels in Triton's interpreter: ``-p tests.quickened``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from runlora_gen.measure.interpreter import quicken

quicken()


def quickened(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of such a process."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    return {**environment, "PYTEST_ADDOPTS": "-p tests.quickened", "PYTHONPATH": paths}
