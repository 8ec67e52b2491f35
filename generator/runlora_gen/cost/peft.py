"""The price of a LoRA linear as PEFT runs it: what a gain is held against.

``lora.Linear.forward`` of PEFT 0.21 is ``base(x) + lora_B(lora_A(dropout(x))) * scaling``, operator by operator, and
its backward is autograd's. Where the adapter has another dtype than the activations, X is cast to the adapter's first
(``_cast_input_dtype``), and autocast, under which trainers run this, casts X and the adapter back for the
products: every linear then keeps a copy of X of its own. Dropout is one pass that writes what it leaves of X and a mask
of bytes, both of which every linear keeps; without it there is no operator. ``lora.bnb.Linear4bit`` does the same, but
for a copy of what the base gives, and under autocast it does not cast X; ``Linear8bitLt`` does not cast X either. The
base makes its weight of the codes in the forward, and again for dX. (Where it is of 8 bits, bitsandbytes and
Transformers make it for dX alone, and multiply in the forward by kernels of their own: those have no price here.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .passes import CAST, Times, price_passes
from .price import price_operation
from .setting import Setting


@dataclass(frozen=True)
class PeftCost:
    """Price of one linear in PEFT's order.

    Attributes:
        times: of its forward and of its backward.
        keeps_input: whether it keeps X itself, which linears that read the same X share.
        own_bytes: what it keeps for the backward beside that, without parameters.
    """

    forward: Times
    backward: Times
    keeps_input: bool
    own_bytes: int

    @property
    def times(self) -> Times:
        """Of both."""
        return self.forward + self.backward


def price_peft(setting: Setting) -> PeftCost:
    """Price a linear in PEFT's order, as far as the setting's gradients are wanted."""
    wanted, casts, drops = setting.gradients, setting.casts, "dropout" in setting.derivation.symbols
    size, adapter_size = setting.dtype.bytes, setting.adapter_dtype.bytes
    x, y = setting.tokens * setting.in_features, setting.tokens * setting.out_features
    adapter = {"dA": setting.rank * setting.in_features, "dB": setting.out_features * setting.rank}

    def cast(elements: int) -> list[int]:
        return [elements * (size + adapter_size)] if casts else []

    forward = ["Y = X @ W.T + b", "S = s * X @ A.T", "Y = S @ B.T + b"]
    passes = [2 * y * size, 3 * y * size]  # * scaling, base(x) +
    form = setting.derivation.form
    quantized, widens = form != "plain", casts and form in ("plain", "float8")
    pass_of_dropout = [x * (2 * (adapter_size if widens else size) + 1)] if drops else []
    passes += pass_of_dropout
    if quantized:
        made = str(setting.derivation.base[0])  # the weight, of its codes
        forward.insert(0, made)
    if form == "codes":
        passes.append(2 * y * size)
    casts_forward = [*(2 * cast(x) if widens else []), *cast(adapter["dA"]), *cast(adapter["dB"])]
    backward: list[str] = []
    back: list[int] = []
    casts_backward: list[int] = []
    if wanted - {"db"}:
        back.append(2 * y * size)  # * scaling
    if wanted & {"dX", "dA"}:
        backward.append("P = s * dY @ B")
    if "dX" in wanted:
        backward += [*([made] if quantized else []), "dX = dY @ W", "dX = P @ A"]
        back += [3 * x * size, *pass_of_dropout]  # the sum of both gradients
        casts_backward += 2 * cast(x) if widens else []
    for name, formula in (("dA", "dA = P.T @ X"), ("dB", "dB = dY.T @ S")):
        if name in wanted:
            backward.append(formula)
            casts_backward += cast(adapter[name])
    if "db" in wanted:
        backward.append("db = sum(dY)")
    kept = x * size if (widens or drops) and "dA" in wanted else 0
    kept += x if drops and "dX" in wanted else 0
    kept += setting.tokens * setting.rank * size if "dB" in wanted else 0
    if casts:  # what dX and P read
        kept += size * (adapter["dA"] * ("dX" in wanted) + adapter["dB"] * bool(wanted & {"dX", "dA"}))
    return PeftCost(
        forward=_phase(forward, passes, casts_forward, setting),
        backward=_phase(backward, back, casts_backward, setting),
        keeps_input="dA" in wanted and not widens and not drops,
        own_bytes=kept,
    )


def _phase(formulas: list[str], passes: list[int], casts: list[int], setting: Setting) -> Times:
    # Products are of one dtype, and their casts are passes.
    narrow = replace(setting, adapter_dtype=setting.dtype)
    costs = [price_operation(setting.derivation.parse(formula), narrow) for formula in formulas]
    products = Times(sum(cost.device_s for cost in costs), sum(cost.host_s for cost in costs))
    return products + price_passes(passes, setting.device) + price_passes(casts, setting.device, reach=CAST)
