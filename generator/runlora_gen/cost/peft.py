"""The price of a LoRA linear, or of a stack of experts, as PEFT runs it: what a gain is held against.

``lora.Linear.forward`` of PEFT 0.21 is ``base(x) + lora_B(lora_A(dropout(x))) * scaling``, operator by operator, and
its backward is autograd's. Where the adapter has another dtype than the activations, X is cast to the adapter's first
(``_cast_input_dtype``), and autocast, under which trainers run this, casts X and the adapter back for the
products: every linear then keeps a copy of X of its own. Dropout is one pass that writes what it leaves of X and a mask
of bytes, both of which every linear keeps; without it there is no operator. ``lora.bnb.Linear4bit`` does the same, but
for a copy of what the base gives, and under autocast it does not cast X; ``Linear8bitLt`` does not cast X either. The
base makes its weight of the codes in the forward, and again for dX. (Where it is of 8 bits, bitsandbytes and
Transformers make it for dX alone, and multiply in the forward by kernels of their own: those have no price here.)

``lora.ParamWrapper`` gives the experts of Transformers a parametrization, ``torch.baddbmm(W, B, A, alpha=scaling)``:
with M, the merged stack, in the place of W they run as they do without adapters (``grouped_mm_experts_forward``). What
that adds is of whole stacks, whoever has rows: M is made twice in every forward, first where the parametrization is
registered, which tries it, and is kept; its gradient dM is a product over the rows of each expert, which have to be
kept for it, and the factors' are products of all of dM. Not priced is what the host needs to register it and to remove
it, at every call. PEFT refuses dropout there, and is priced without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..algebra.operations import Operation, Symbol, parse
from .passes import CAST, Times, price_passes
from .price import price_of_model
from .setting import Setting


@dataclass(frozen=True)
class PeftCost:
    """Price of one linear, or one stack of experts, in PEFT's order.

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
    """Price a linear, or a stack of experts, in PEFT's order, as far as the setting's gradients are wanted."""
    if setting.experts:
        return _experts(setting)
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
        forward=_phase(map(setting.derivation.parse, forward), passes, casts_forward, setting),
        backward=_phase(map(setting.derivation.parse, backward), back, casts_backward, setting),
        keeps_input="dA" in wanted and not widens and not drops,
        own_bytes=kept,
    )


def _experts(setting: Setting) -> PeftCost:
    """Price a stack of experts: what they do without adapters, with M in the place of W, and what M takes."""
    derivation, wanted, size = setting.derivation, setting.gradients, setting.dtype.bytes
    stacks = (Symbol(name, ("E", "O", "I"), store="weight") for name in ("M", "dM"))
    symbols = {**derivation.symbols, **{str(stack): stack for stack in stacks}}
    read, given = ("X", "dYr") if "dYr" in symbols else ("Xr", "dY")

    def operations(*formulas: str) -> list[Operation]:
        return [parse(formula, symbols) for formula in formulas]

    base = operations(*(str(operation).replace("W[e]", "M[e]") for operation in derivation.base))
    ahead = 1 + [str(operation.outputs[0]) for operation in base].index("Y")
    factors = {name: symbols[name].numel(setting.dims) for name in ("dA", "dB")}
    whole, widths = symbols["dM"].numel(setting.dims), size + setting.adapter_dtype.bytes
    # W is copied to what torch adds the product to; B, whose experts lie side by side, to where each is a matrix.
    made = operations("M[e] = W + s * B[e] @ A[e]")
    passes = [2 * whole * size, 2 * factors["dB"] * size]
    back: list[int] = []
    casts = [elements * widths for elements in factors.values()] if setting.casts else []
    goes_on = bool(wanted & {"dX", "dU"})
    backward = base[ahead:] if goes_on else [op for op in base[ahead:] if str(op.outputs[0]) == given]
    casts_backward = []
    trained = [name for name in factors if name in wanted]
    if trained:
        backward += operations(f"dM[e] = {given}.T @ {read}")
    for name in trained:
        product = "dA[e] = B[e].T @ dM[e]" if name == "dA" else "dB[e] = dM[e] @ A[e].T"
        backward += operations(product)
        # * scaling; B is copied again where it is read; dB, to the order of lora_B.
        back += [2 * factors[name] * size, 2 * factors["dB"] * size]
        casts_backward += [factors[name] * widths] if setting.casts else []
    kept = whole * size if goes_on else 0
    kept += symbols[read].numel(setting.dims) * size if trained else 0  # the rows, for dM
    if setting.casts:  # what the products of dM read
        kept += size * sum(factors[other] for name, other in (("dA", "dB"), ("dB", "dA")) if name in trained)
    return PeftCost(
        forward=_phase([*made, *made, *base[:ahead]], [*passes, *passes], casts, setting),
        backward=_phase(backward, back, casts_backward, setting),
        keeps_input=False,
        own_bytes=kept,
    )


def _phase(operations: Iterable[Operation], passes: list[int], casts: list[int], setting: Setting) -> Times:
    # Products are of one dtype, and their casts are passes.
    narrow = replace(setting, adapter_dtype=setting.dtype)
    products = sum((price_of_model(operation, narrow) for operation in operations), Times())
    return products + price_passes(passes, setting.device) + price_passes(casts, setting.device, reach=CAST)
