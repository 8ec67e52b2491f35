"""What experts do between their projections: a new activation is a row here, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Activation:
    """X = activate(U), and dU of dX and U: expressions that torch and Triton take.

    They are of ``gate``, ``up`` and ``dx``, elements in float32 or wider, and call what both have, as ``{fn}``:
    sigmoid, erf, exp, where. A NaN stays one: that is why nothing here is a clamp, in which Triton's loses it.

    Attributes:
        name: as generated code and manifests call it.
        gated: whether U has two columns for each of X, gate and up; else one, gate.
        interleaved: whether these alternate; else the gates' half is the first one.
        plain: X in torch's own functions: what proofs of generated code compare with, and what runs without kernels
            where gate and up are matrices of their own.
        plain_dgate, plain_dup: its gradients likewise, where that may be.
        transformers: what configs of gated MLPs call the function of gate, as keys of Transformers' ``ACT2FN``.
        value: X.
        dgate, dup: the gradients; dup of what is gated alone.
        steps: what they share, by names: an expression may name those before it.
    """

    name: str
    gated: bool
    plain: str
    value: str
    dgate: str
    dup: str = ""
    interleaved: bool = False
    plain_dgate: str = ""
    plain_dup: str = ""
    steps: Mapping[str, str] = field(default_factory=dict)
    transformers: tuple[str, ...] = ()

    @property
    def of_mlps(self) -> bool:
        """Whether gate and up may be what two linears make, as in a gated MLP."""
        return self.gated and not self.interleaved

    @property
    def widths(self) -> int:
        """Columns of U for each of X."""
        return 2 if self.gated else 1

    def forward(self, fn: str) -> tuple[str, ...]:
        """Assignments that end with that to ``x``; ``fn`` is torch or tl."""
        return self._lines(fn, ("x",), (self.value,))

    def backward(self, fn: str) -> tuple[str, ...]:
        """Likewise to ``dgate`` and, of what is gated, ``dup``."""
        return self._lines(fn, ("dgate", "dup")[: self.widths], (self.dgate, self.dup))

    def _lines(self, fn: str, names: Sequence[str], results: Sequence[str]) -> tuple[str, ...]:
        """Those of the steps that the results need, then these."""
        wanted = dict(zip(names, results, strict=False))
        needed = set[str]().union(*map(_names, wanted.values()))
        taken: list[tuple[str, str]] = []
        for name, text in reversed(list(self.steps.items())):
            if name in needed:
                taken.insert(0, (name, text))
                needed |= _names(text)
        lines = [f"{name} = {text.replace('{fn}', fn)}" for name, text in (*taken, *wanted.items())]
        for theirs, own in _OF_KERNELS.items():
            lines = [line.replace(theirs, own) for line in lines]
        return tuple(lines)


#: What kernels have in place of Triton's: see kernels/tiles.jinja.
_OF_KERNELS = {"tl.sigmoid": "_sigmoid"}


def _names(text: str) -> set[str]:
    return set(re.findall(r"[a-z]\w*", text))


@dataclass(frozen=True)
class _Function:
    """A function of one variable, ``gate``, and its slope."""

    plain: str
    plain_backward: str  # the gradient of gate, of one that {dx} stands for
    value: str
    slope: str
    steps: Mapping[str, str]
    transformers: tuple[str, ...]

    def alone(self, name: str) -> Activation:
        return Activation(name, False, self.plain, self.value, f"dx * ({self.slope})", steps=self.steps)

    def gated(self, name: str) -> Activation:
        """Times up."""
        value, dgate, dup = f"{self.value} * up", f"dx * up * ({self.slope})", f"dx * ({self.value})"
        return Activation(
            name,
            True,
            f"{self.plain} * up",
            value,
            dgate,
            dup,
            steps=self.steps,
            plain_dgate=self.plain_backward.format(dx="dx * up"),
            plain_dup=f"dx * {self.plain}",
            transformers=self.transformers,
        )


_SILU = _Function(
    "F.silu(gate)",
    "torch.ops.aten.silu_backward({dx}, gate)",
    "gate * s",
    "s + gate * s * (1.0 - s)",
    {"s": "{fn}.sigmoid(gate)"},
    ("silu", "swish"),
)
_GELU = _Function(
    "F.gelu(gate)",
    "torch.ops.aten.gelu_backward({dx}, gate)",
    "gate * s",
    "s + gate * density",
    {
        "s": f"0.5 + 0.5 * {{fn}}.erf(gate * {0.5**0.5})",
        "density": "0.3989422804014327 * {fn}.exp(-0.5 * gate * gate)",
    },
    ("gelu", "gelu_python"),
)
# (1 + tanh(z)) / 2 is sigmoid(2z).
_GELU_TANH = _Function(
    'F.gelu(gate, approximate="tanh")',
    'torch.ops.aten.gelu_backward({dx}, gate, approximate="tanh")',
    "gate * s",
    "s + gate * s * (1.0 - s) * steep",
    {
        "s": "{fn}.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))",
        "steep": "1.5957691216057308 * (1.0 + 0.134145 * gate * gate)",
    },
    ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
)
_RELU2 = _Function(
    "F.relu(gate).square()",
    "{dx} * 2 * F.relu(gate)",
    "positive * positive",
    "2.0 * positive",
    {"positive": "{fn}.where(gate < 0.0, 0.0, gate)"},
    ("relu2",),
)

#: That of gpt-oss: gates are at most 7, ups within 7 of 0, and what is beyond has no gradient.
_GPT_OSS = Activation(
    "gpt_oss",
    gated=True,
    interleaved=True,
    steps={
        "low": "{fn}.where(gate > 7.0, 7.0, gate)",
        "near": "{fn}.where(up > 7.0, 7.0, {fn}.where(up < -7.0, -7.0, up))",
        "s": "{fn}.sigmoid(1.702 * low)",
        "dlow": "dx * (near + 1.0) * (s + 1.702 * low * s * (1.0 - s))",
        "dnear": "dx * low * s",
    },
    plain="(up.clamp(-7.0, 7.0) + 1) * gate.clamp(max=7.0) * torch.sigmoid(1.702 * gate.clamp(max=7.0))",
    value="(near + 1.0) * low * s",
    dgate="{fn}.where(gate > 7.0, 0.0, dlow)",
    dup="{fn}.where(up > 7.0, 0.0, {fn}.where(up < -7.0, 0.0, dnear))",
)

#: All of them, by their names.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        activation.name: activation
        for activation in (
            _SILU.gated("silu_gated"),
            _GELU.gated("gelu_gated"),
            _GELU_TANH.gated("gelu_tanh_gated"),
            _GPT_OSS,
            _SILU.alone("silu"),
            _GELU.alone("gelu"),
            _GELU_TANH.alone("gelu_tanh"),
            _RELU2.alone("relu2"),
        )
    }
)


def activation_of_mlps(said: str) -> str | None:
    """That of gated MLPs whose function Transformers calls so; None if there is no row of it."""
    return next((name for name, row in ACTIVATIONS.items() if row.of_mlps and said in row.transformers), None)
