"""Copies of modules on which it is tried what they do, and classes that stand in front of theirs.

Generated packages hold this as it stands here: see :mod:`.gated`, and the package's own ``norms``.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def own_class(module: Any) -> Any:
    """The class of a module, beneath one that stands in front of it."""
    return getattr(type(module), "replaces", type(module))


def in_front(front: Any, own: Any, **facts: Any) -> Any:
    """A class that stands in front of a module's own, and is called as that; ``facts``: attributes of it."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (front, own), {**names, **facts, "replaces": own})


#: What every module has.
_INHERITED = frozenset(vars(nn.Module()))


def fields(module: Any) -> dict[str, Any]:
    """What a module has beside what every module has."""
    return {name: value for name, value in vars(module).items() if name not in _INHERITED}


def is_plain(value: Any) -> bool:
    """Whether it is a number, a name or the like, or a container."""
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, set, dict))


def lasting(module: Any) -> dict[str, Any]:
    """What of a module's fields a call can change: what is plain as it is, of all else which it is."""
    return {name: value if is_plain(value) else id(value) for name, value in fields(module).items()}


def copied(module: Any, children: dict[str, Any]) -> Any:
    """A copy of a module of the class that it was made as, with these children, and copies of the others."""
    made = object.__new__(own_class(module))  # copy.copy may be of the class's own making
    vars(made).update(vars(module))
    vars(made).update(copy.deepcopy({n: v for n, v in fields(module).items() if isinstance(v, (list, dict, set))}))
    vars(made)["_modules"] = {
        name: children[name] if name in children else child and copied(child, {})
        for name, child in module._modules.items()
    }
    return made
