"""The experts of a layer in a step: frozen, with PEFT, and with generated modules.

Frozen ones are counted operator by operator, as Transformers runs a router and its grouped products eagerly
(``grouped_mm_experts_forward``): rows are copied, sorted by expert and back, and weighed, and the gradients of copies
are added up by ``index_put``, which is taken for a pass like any other. PEFT's are the same, and what whole stacks take
besides (:mod:`~..cost.peft`); ours have the prices of the chosen programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..algebra.operations import Contract
from ..cost.passes import Times, passes_of_activation
from ..cost.peft import price_peft
from ..cost.price import price_frozen_forward, price_operation
from ..cost.setting import Setting
from ..request.decoder import Decoder
from ..request.experts import Stack, experts
from ..search.candidates import setting_of
from ..search.choose import Decision
from .gain import frozen_times
from .plain import FLOAT, Plain

INDEX = 8  # bytes: places of rows are int64


@dataclass(frozen=True)
class Part:
    """Some of a layer's experts.

    Attributes:
        forward, backward: their times.
        kept: bytes that they keep for the backward.
        moments: those of the backward that may take the most: what of the kept bytes is gone by then, and what is there
            besides.
    """

    forward: Times = field(default_factory=Times)
    backward: Times = field(default_factory=Times)
    kept: int = 0
    moments: tuple[tuple[int, int], ...] = ()

    def __add__(self, before: Part) -> Part:
        """With what runs before it in the forward, and after it in the backward."""
        later = tuple((self.kept + gone, beside) for gone, beside in before.moments)
        return Part(
            self.forward + before.forward,
            self.backward + before.backward,
            self.kept + before.kept,
            (*self.moments, *later),
        )


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer, whose first projection is gated."""

    plain: Plain
    decoder: Decoder
    stacks: tuple[Stack, ...]

    def frozen(self) -> Part:
        """Without adapters."""
        return self._last() + self._activation() + self._first() + self._sorting() + self._router()

    def peft(self, adapted: Sequence[Stack]) -> Part:
        """With PEFT's adapters on some of their stacks."""
        last, first = self._last(), self._first()
        if self._of(adapted, gathers=False):
            last = self._merged(last, gathers=False)
        if self._of(adapted, gathers=True):
            first = self._merged(first, gathers=True)
        return last + self._activation() + first + self._sorting() + self._router()

    def ours(self, decided: Mapping[Stack, Decision]) -> Part:
        """With our modules for some of their stacks, for which these decisions were taken."""
        first, last = (self._of(decided, gathers=gathers) for gathers in (True, False))
        chained = last is not None and "U" in decided[last].setting.derivation.symbols
        made = self._last() if last is None else self._module(decided[last])
        made += Part() if chained else self._activation()
        made += self._first() if first is None else self._module(decided[first])
        # Of what `route` makes rows and places are kept.
        return made + Part(self.plain.passes(launches=8), kept=2 * self.rows * INDEX) + self._router()

    # Sizes

    def _of(self, stacks: Sequence[Stack] | Mapping[Stack, Decision], *, gathers: bool) -> Stack | None:
        return next((stack for stack in stacks if stack.gathers is gathers), None)

    @cached_property
    def first(self) -> Stack:
        """The stack that reads tokens."""
        return next(stack for stack in self.stacks if stack.gathers)

    @property
    def rows(self) -> int:
        """One for each expert of each token."""
        return self.plain.tokens * self.first.top_k

    @property
    def _wide(self) -> int:
        """Elements of all rows of what goes into the activation."""
        return self.rows * self.first.out_features

    @property
    def _hidden(self) -> int:
        """Elements of all rows of what the experts read, and of what they give."""
        return self.rows * self.decoder.hidden

    @property
    def _tokens(self) -> int:
        """Elements of the tokens."""
        return self.plain.tokens * self.decoder.hidden

    def setting(self, *, gathers: bool) -> Setting:
        """Of one projection by itself."""
        stack = next(stack for stack in self.stacks if stack.gathers is gathers)
        (site,) = experts((stack,), chained=False)
        return setting_of(self.plain.workload, site, self.plain.rank, self.plain.tokens)

    # Frozen

    def _products(self, *, gathers: bool) -> tuple[Times, Times]:
        """The product by expert, forward and backward."""
        setting = self.setting(gathers=gathers)
        products = [operation for operation in setting.derivation.base if isinstance(operation, Contract)]
        costs = [price_operation(product, setting) for product in products]
        forward, backward = (self.plain.operators(Times(cost.device_s, cost.host_s)) for cost in costs)
        return forward, backward

    def _router(self) -> Part:
        """Its linear, the softmax in float32, the best of it, and these as weights."""
        router, tokens, first = self.decoder.router, self.plain.tokens, self.first
        assert router is not None
        there, back = self.plain.linear(self.decoder.hidden, first.experts, plain=True)
        every, chosen = tokens * first.experts, tokens * first.top_k
        cast = [every * (self.plain.size + FLOAT)]
        narrow = not router.float32
        forward = self.plain.passes([2 * FLOAT * every, FLOAT * every], casts=cast, launches=3 * router.normed + narrow)
        backward = self.plain.passes(
            # Zeros and what is scattered into them, the softmax's, and the sum with what the experts read.
            [FLOAT * every, FLOAT * every, 3 * FLOAT * every, 3 * self._tokens * self.plain.size],
            casts=cast,
            launches=7 * router.normed + narrow,
        )
        kept = FLOAT * every + INDEX * chosen + FLOAT * (chosen + tokens) * router.normed
        return Part(there + forward, back + backward, kept)

    def _sorting(self) -> Part:
        """Of the choices, how many each expert has, and the inverse; all of it on little."""
        return Part(self.plain.passes(launches=9), self.plain.passes(launches=2), self.rows * INDEX)

    def _first(self) -> Part:
        """Of each row its token, and the product."""
        size, (there, back) = self.plain.size, self._products(gathers=True)
        forward = self.plain.passes([2 * self._hidden * size])
        backward = self.plain.passes([self._tokens * size, (self._hidden + 2 * self._tokens) * size])
        beside = (self._wide + self._hidden + self._tokens) * size
        return Part(there + forward, back + backward, self.rows * INDEX, ((0, beside),))

    def _activation(self) -> Part:
        """silu(gate) * up: both are halves of a row."""
        size, inner = self.plain.size, self._wide // 2
        forward, backward = (
            self.plain.passes(passes.straight, passes.strided)
            for passes in (passes_of_activation(inner * size, gated=True, backward=back) for back in (False, True))
        )
        return Part(forward, backward, (self._wide + inner) * size, ((0, 3 * inner * size),))

    def _last(self) -> Part:
        """The product; of each token the sum of its rows, times their weights, in the order of the router."""
        router, size, hidden, tokens = self.decoder.router, self.plain.size, self._hidden, self._tokens
        assert router is not None
        wide = FLOAT if router.float32 else size
        there, back = self._products(gathers=False)
        cast = [tokens * (size + wide)] if wide != size else []
        forward = self.plain.passes([2 * hidden * wide, (hidden + tokens) * wide], [hidden * (size + wide)], casts=cast)
        backward = self.plain.passes(
            # What an expanded gradient is copied to; zeros, and what is put into them; the weights' gradient.
            [hidden * wide, 3 * hidden * wide, hidden * (size + 2 * wide), hidden * wide],
            [(tokens + hidden) * wide, 2 * hidden * wide],
            casts=[*cast, *([hidden * (size + wide)] if cast else [])],
        )
        kept = hidden * size + self.rows * (INDEX + wide)
        # The gradient of weighed rows, its products with rows and with weights, and the latter's cast.
        beside = hidden * (3 * wide + size * bool(cast))
        return Part(there + forward, back + backward, kept, ((0, beside),))

    # With adapters

    def _merged(self, frozen: Part, *, gathers: bool) -> Part:
        """A projection with PEFT's merged stack in place of the frozen one."""
        setting, size = self.setting(gathers=gathers), self.plain.size
        cost, forward = price_peft(setting), Times(*price_frozen_forward(setting))
        stack = setting.bytes_of(setting.derivation["W"])
        # The gradients of the rows that it gave, of those that it read, and of the stack.
        read, given = (self._hidden, self._wide) if gathers else (self._wide // 2, self._hidden)
        gone = 0 if gathers else self._hidden * size
        return Part(
            frozen.forward + cost.forward + forward * -1,
            frozen.backward + cost.backward + (frozen_times(setting) + forward * -1) * -1,
            frozen.kept + cost.own_bytes,
            (*frozen.moments, (gone, (read + given) * size + stack)),
        )

    def _module(self, decision: Decision) -> Part:
        """A projection by a generated module."""
        setting, cost = decision.setting, decision.chosen.cost
        passed = {"dX", "dY", "dU"} & set(setting.derivation.symbols)
        beside = sum(setting.bytes_of(setting.derivation[name]) for name in passed)
        if "U" in setting.derivation.symbols:  # whose gradient goes on in the place of X's
            beside -= setting.bytes_of(setting.derivation["dX"])
        return Part(
            Times.of(cost.forward),
            Times.of(cost.backward),
            cost.saved_bytes,
            ((0, beside + cost.backward.workspace_bytes),),
        )
