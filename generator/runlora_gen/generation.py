"""From what a user asks for to packages on disk: the one way of the command line and of Python.

torch is imported by what takes a live model, and by nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .from_model import meta
from .request.architecture import LIVE, Architecture, architecture_of, load_architecture
from .request.errors import SpecError, shorten
from .request.layout import STANDALONE, parse_layout
from .request.workload import (
    CHOICES,
    DTYPE_ALIASES,
    Workload,
    make_workload,
    parse_counts,
    parse_name,
    parse_names,
    parse_targets,
)

if TYPE_CHECKING:
    import torch

    from .emit.package import Package
    from .from_model.live import LiveModel

MAX_RANK = 2**20
#: Token counts that modules of a live model are chosen for where nobody says more: short and long batches.
TOKENS = (2048, 16384)


@dataclass(frozen=True)
class Request:
    """What to generate: a package for each rank.

    Attributes:
        by_rank: the linears of each rank: adapters of a live model may differ in them.
        workload: what they are chosen for.
        layout: whether each module has what they share, or their folder.
    """

    by_rank: Mapping[int, Architecture]
    workload: Workload
    layout: str = STANDALONE

    @property
    def ranks(self) -> tuple[int, ...]:
        """In the order of the packages."""
        return tuple(self.by_rank)

    @property
    def architecture(self) -> Architecture:
        """That of the first rank: of all of them, where they were given."""
        return next(iter(self.by_rank.values()))

    def checked(self) -> Request:
        """Itself.

        Raises:
            SpecError: it can't be generated, with the reason in one line.
        """
        from .search.limits import check_bias, check_request

        check_bias(self.by_rank.values(), self.workload)
        groups: dict[Architecture, list[int]] = {}  # what is said of several ranks is of all that share their linears
        for rank, architecture in self.by_rank.items():
            groups.setdefault(architecture, []).append(rank)
        for architecture, ranks in groups.items():
            check_request(architecture, ranks, self.workload)
        return self

    def notes(self) -> list[str]:
        """What is to be said of it: what is left out, and a base that is not the one of the model's config."""
        stored, base = self.architecture.stored, self.workload.base
        lines = self.architecture.left_out_lines()
        if stored is not None and stored != base:
            how = f"--base {stored} generates for those" if stored in CHOICES["base"] else "those are not covered"
            lines.append(f"note: the config says that weights are quantized ({stored}), the base here is {base}: {how}")
        return lines

    def rounding(self) -> tuple[str, ...]:
        """What is to be said where products may round their inputs and nobody asked for it: a line, or none."""
        from .cost.rounding import FLOAT8_MANTISSA_BITS, rounding_error
        from .search.candidates import multiplies_float8

        if not multiplies_float8(self.workload):
            return ()
        error = 100 * rounding_error(1.0, FLOAT8_MANTISSA_BITS)
        return (
            f"note: activations and gradients are rounded to float8 where that is faster, an error of {error:.1f} % of "
            "each product: --float8 none keeps them, --float8 both agrees",
        )


def generate(
    model: Any,
    *,
    rank: int | Sequence[int] | None = None,
    output: str | os.PathLike[str] = "generated",
    name: str | None = None,
    layout: str = STANDALONE,
    force: bool = False,
    **workload: Any,
) -> tuple[Path, ...]:
    """Generate the LoRA linears of a model, as the command line does.

    Args:
        model: a ``torch.nn.Module`` (also on the meta device; a PeftModel also gives its ranks), a config of
            Transformers, or what ``--arch`` takes: a name, a config.json or its folder.
        rank: of the adapters, one or several; None for those of a PeftModel.
        output: the folder to write into: a package for each rank.
        name: of the packages; None for that of the model.
        layout: ``standalone``, for modules each of which works alone, or ``folder``, for what they share to stand once.
        force: overwrite files that were not generated.
        workload: fields of ``Workload``: tokens, dtype, adapter_dtype, device, target_modules, target_parameters,
            ... A live model gives its own dtypes and device.

    Returns:
        The folders of the packages, one a rank.

    Raises:
        SpecError: a value that is not allowed, named in one line; nothing is written then.
    """
    request = read_request(model, rank=rank, name=name, layout=layout, **workload)
    told = () if "float8" in workload else request.rounding()
    for line in (*request.notes(), *told):
        print(line, file=sys.stderr)
    return generated(request, Path(output), force=force)


def read_request(
    model: Any,
    *,
    rank: Any = None,
    name: str | None = None,
    target_modules: Any = (),
    target_parameters: Any = (),
    layout: str = STANDALONE,
    prefix: str = "",
    **fields: Any,
) -> Request:
    """What is asked for, from values as Python has them or from texts of options.

    Args:
        model: a ``torch.nn.Module`` (also on the meta device; a PeftModel also gives its ranks), a config of
            Transformers, or what ``--arch`` takes: a name, a config.json or its folder.
        rank: of the adapters, one or several; None for those of a PeftModel.
        name: of the packages; None for that of the model.
        target_modules: names of projections; none or "all-linear" for all.
        target_parameters: names of parameters of experts, or their ends, as PEFT takes them; without target_modules
            it is only these that are generated for.
        layout: ``standalone``, for modules that work alone, or ``folder``, for what they share to stand once.
        prefix: what errors put before a name: ``--`` for options.
        fields: of ``Workload``; a live model gives its own dtypes, dropout, biases and device.

    Raises:
        SpecError: a value that is not allowed, or that does not fit the others, named in one line.
    """
    modules, parameters = _texts(target_modules), parse_names(_texts(target_parameters))
    targets = parse_targets(modules)
    options: dict[str, Any] = {}
    adapted: Mapping[int, Architecture] = {}
    if isinstance(model, str | os.PathLike):
        architecture = load_architecture(os.fspath(model), model_type=fields.get("model_type"), others=meta)
    elif hasattr(model, "named_modules"):
        from .from_model.live import read_model

        live = read_model(model)
        options, _ = of_model(model, live)
        architecture, adapted = live.architecture, live.adapted
    elif hasattr(model, "to_dict") and hasattr(model, "model_type"):
        architecture = architecture_of(model.to_dict(), others=meta)
    else:
        kind = type(model).__name__
        raise SpecError(f"model: {shorten(kind)} is not allowed; give a torch module, a config, a name or a path")
    ranks = () if rank is None else (rank,) if isinstance(rank, int | str) else tuple(rank)
    if ranks or not adapted:
        if not ranks:
            raise SpecError(f"{prefix}rank: missing; give a whole number such as 8")
        adapted = dict.fromkeys(parse_counts(f"{prefix}rank", map(str, ranks), maximum=MAX_RANK), architecture)

    def narrowed(architecture: Architecture) -> Architecture:
        if name is not None:
            architecture = replace(architecture, package=parse_name(f"{prefix}name", name))
        if not targets and architecture.source != LIVE:
            architecture = architecture.without_gates()
        if targets or parameters:
            every = tuple(p.name for p in architecture.projections) if modules else ()  # what all-linear stands for
            return architecture.only(targets or every, parameters)
        return architecture

    if targets or parameters:
        _all_of(adapted.values()).restricted(targets, parameters)  # a name may be of some ranks alone
    by_rank = {rank: narrowed(architecture) for rank, architecture in adapted.items()}
    by_rank = {rank: architecture for rank, architecture in by_rank.items() if architecture.sites}
    # The architecture's order, each name once: the same modules are the same command and digest.
    names = dict.fromkeys(p.name for a in by_rank.values() for p in a.projections) if targets or parameters else ()
    called = dict.fromkeys(s.parameter for a in by_rank.values() for s in a.stacks) if parameters else ()
    workload = make_workload(
        prefix=prefix, target_modules=tuple(names), target_parameters=tuple(called), **{**options, **fields}
    )
    return Request(by_rank, workload, parse_layout(f"{prefix}layout", layout)).checked()


def _texts(value: Any) -> Sequence[str]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _all_of(architectures: Collection[Architecture]) -> Architecture:
    """What those of several ranks have together."""
    return replace(
        next(iter(architectures)),
        projections=tuple(p for each in architectures for p in each.projections),
        stacks=tuple(stack for each in architectures for stack in each.stacks),
        offered=tuple(stack for each in architectures for stack in each.offered),
    )


def of_model(model: Any, live: LiveModel) -> tuple[dict[str, Any], str]:
    """What a live model says of its workload (dtypes, base, device, dropout, biases), and of the profile to be said."""
    base = dtype_name(live.dtype)
    adapters = {dtype_name(group.dtype) for group in live.adapters}
    adapter = adapters.pop() if len(adapters) == 1 else "fp32"
    device, note = profile_of(model)
    adapter = adapter if adapter == base else "fp32"
    dropout = max((group.dropout for group in live.adapters if group.dropout < 1), default=0.0)
    options = {"tokens": TOKENS, "dtype": base, "adapter_dtype": adapter, "device": device, "dropout": dropout}
    options["base"] = live.base
    trained = any(p.requires_grad for name, p in model.named_parameters() if name.endswith("base_layer.bias"))
    if any(group.bias for group in live.adapters):
        options["bias"] = "lora_bias"
    elif live.adapters and trained:
        options["bias"] = "all"
    return options, note


def dtype_name(dtype: torch.dtype) -> str:
    """As the workload calls it; what it has no name for is priced as fp32."""
    return DTYPE_ALIASES.get(str(dtype).removeprefix("torch."), "fp32")


def profile_of(model: Any) -> tuple[str, str]:
    """The device profile that stands for a model's device, and what is to be said if it is another machine's."""
    import torch

    from .cost.device import nearest_profile

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or not torch.cuda.is_available():
        known = device.type in ("cpu", "meta")
        return "cpu", "" if known else f"priced as on a CPU: there is no profile for {device.type} devices"
    return nearest_profile(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def built(
    request: Request,
    out: Path,
    *,
    line_length: int | None = None,
    all_variants: bool = False,
    reuse: bool = True,
) -> list[Package]:
    """The packages, chosen and rendered; nothing is written. See ``build_package``."""
    if not request.by_rank:
        return []  # without the imports, which take as long as all else of a run that finds nothing to do
    from .emit.package import build_package

    return [
        build_package(
            architecture,
            rank,
            request.workload,
            out=out,
            line_length=line_length,
            all_variants=all_variants,
            layout=request.layout,
            reuse=reuse,
        )
        for rank, architecture in request.by_rank.items()
    ]


def generated(request: Request, out: Path, *, force: bool = False) -> tuple[Path, ...]:
    """Folders of the packages, written where they are not there or are not what would be generated now.

    Raises:
        SpecError: the folder can't be written, or holds something foreign.
    """
    from .emit.manifest import folder_name
    from .emit.publish import publish

    folders = []
    with _alone():
        current = {} if force else up_to_date(request, out)
        for rank, architecture in request.by_rank.items():
            folder = out / folder_name(architecture, rank)
            folders.append(folder)
            if rank not in current:
                print(f"runlora-gen: generating LoRA linears of rank {rank} into {folder}", file=sys.stderr)
                publish(out, built(replace(request, by_rank={rank: architecture}), out), force=force)
    return tuple(folders)


def up_to_date(
    request: Request, out: Path, *, line_length: int | None = None, all_variants: bool = False
) -> dict[int, int]:
    """The ranks whose packages lie there as this version makes them, with the modules of each; nothing is chosen."""
    from .emit.manifest import current_modules, folder_name

    found = {}
    for rank, architecture in request.by_rank.items():
        count = current_modules(
            out / folder_name(architecture, rank),
            architecture,
            rank,
            request.workload,
            line_length=line_length,
            all_variants=all_variants,
            layout=request.layout,
        )
        if count is not None:
            found[rank] = count
    return found


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Of a user's processes on a machine one generates; the others wait, and find it done."""
    try:
        from filelock import FileLock  # torch needs it, too
    except ImportError:
        yield
        return
    import tempfile

    owner = os.getuid() if hasattr(os, "getuid") else 0
    with FileLock(Path(tempfile.gettempdir()) / f"runlora-gen-{owner}.lock"):
        yield
