"""The plain model: what its operators take, as Transformers' modules run them eagerly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..algebra.linear import lone_linear
from ..cost.passes import CAST, Times, price_passes, price_strided
from ..cost.price import price_frozen_forward
from ..cost.setting import DTYPES, Setting
from ..request.workload import Workload
from ..search.candidates import setting_for
from .gain import frozen_times

#: What the host needs for an operator of the plain model, over what it needs for one within a module's autograd
#: function: from the frozen model of the benchmark that waits for the host.
PLAIN_HOST = 0.75
#: Bytes: Transformers norms and chooses experts in float32, and takes the loss in it.
FLOAT = 4


@dataclass(frozen=True)
class Plain:
    """The prices of a model's own operators, for a batch of so many tokens."""

    workload: Workload
    rank: int
    tokens: int

    @property
    def size(self) -> int:
        """Bytes of an activation's element."""
        return DTYPES[self.workload.dtype].bytes

    def setting(self, in_features: int, out_features: int, *, bias: bool = False) -> Setting:
        """Of one of its linears."""
        return setting_for(self.workload, in_features, out_features, self.rank, bias, self.tokens)

    def linear(
        self, in_features: int, out_features: int, bias: bool = False, *, plain: bool = False
    ) -> tuple[Times, Times]:
        """A frozen linear, forward and backward; ``plain``: it is quantized in no model, as a head."""
        setting = self.setting(in_features, out_features, bias=bias)
        if plain:
            setting = replace(setting, derivation=lone_linear())
        forward = Times(*price_frozen_forward(setting))
        return self.operators(forward), self.operators(frozen_times(setting) + forward * -1)

    def operators(self, times: Times) -> Times:
        """What was priced as within a module's autograd function, by the host's time for plain operators."""
        return Times(times.device_s, times.host_s * PLAIN_HOST)

    def passes(
        self, straight: Sequence[int] = (), strided: Sequence[int] = (), casts: Sequence[int] = (), launches: int = 0
    ) -> Times:
        """Passes by their bytes, and operators on little or nothing."""
        device = self.setting(1, 1).device
        times = price_passes(straight, device) + price_passes([0] * launches, device)
        return self.operators(times + price_strided(strided, device) + price_passes(casts, device, reach=CAST))
