"""Device profiles: each loads, and holds plausible figures."""

from __future__ import annotations

import pytest
from runlora_gen.cost.device import device_names, load_device
from runlora_gen.spec.errors import SpecError


@pytest.mark.parametrize("name", device_names())
def test_profile(name: str) -> None:
    device = load_device(name)
    assert device.title and device.source
    assert set(device.flops_per_s) == {"bf16", "fp16", "fp32"}
    assert all(1e10 < rate < 1e16 for rate in device.flops_per_s.values())
    assert 1e9 < device.bytes_per_s < 1e14 and 0 < device.launch_s < 1e-3


def test_the_named_profiles_are_there() -> None:
    assert {"h100", "h200", "a100", "rtx-4090", "cpu"} <= set(device_names())


@pytest.mark.parametrize("name", ["h10", "", "../h100", "H100"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(SpecError, match=r"^--device: .*known: .*h100"):
        load_device(name)
