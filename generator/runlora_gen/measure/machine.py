"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine_name(device: torch.device) -> str:
    """What the driver or the kernel calls a GPU, or this machine's CPU, with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = {text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")}
    return f"{torch.get_num_threads()} threads of {', '.join(sorted(models)) or platform.machine()}"
