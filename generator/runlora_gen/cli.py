"""The command line: reads options, calls the rooms, prints. Nothing is decided here."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from . import __version__
from .from_model import meta
from .generation import MAX_RANK, Request, built, read_request, up_to_date
from .request.architecture import architecture_names, load_architecture
from .request.errors import SpecError, one_line, reason, shorten
from .request.experts import experts
from .request.groups import Group
from .request.layers import layers
from .request.layout import LAYOUTS, STANDALONE
from .request.mlps import Mlp
from .request.mlps import mlps as mlps_of
from .request.workload import (
    CHOICES,
    DTYPE_NAMES,
    MAX_TOKENS,
    Workload,
    parse_counts,
    parse_dtype,
    parse_shapes,
    parse_stacks,
)

if TYPE_CHECKING:
    from rich.console import Console

    from .cost.device import DeviceProfile
    from .search.candidates import Site
    from .search.choose import Decision

EXIT_STALE = 1
EXIT_BAD_INPUT = 2
# Columns where no terminal says how many there are: of text for people, and of the tables of variants.
PLAIN_WIDTH, REPORT_WIDTH = 80, 180

Command = TypeVar("Command", bound=Callable[..., Any])


def _chosen(field: str, text: str | None = None) -> Callable[[Command], Command]:
    """The option of a field of workloads that allows some names; its default is theirs."""
    names, default = click.Choice(CHOICES[field]), getattr(Workload(), field)
    return click.option(f"--{field.replace('_', '-')}", type=names, default=default, show_default=True, help=text)


_DTYPES = f"[{'|'.join(DTYPE_NAMES)}]"
_SPEC_OPTIONS = (
    click.option(
        "--arch",
        metavar="NAME|PATH",
        help="Architecture (see `archs`), a config.json or its folder, or a model in the Hugging Face cache.",
    ),
    click.option("--model-type", metavar="TYPE", help="Read the config as one of this model type."),
    click.option(
        "--target-modules",
        metavar="NAMES",
        multiple=True,
        help="Only these projections, such as q_proj,v_proj; all-linear for all.",
    ),
    click.option(
        "--target-parameters",
        metavar="NAMES",
        multiple=True,
        help="Experts, such as mlp.experts.gate_up_proj; without --target-modules only these.",
    ),
    click.option("--rank", "-r", metavar="R", multiple=True, help="LoRA rank; repeat it or give a comma list."),
    click.option(
        "--tokens",
        metavar="T",
        multiple=True,
        help="Tokens a step (batch × sequence), such as 4096 or 4k; several allowed. [4k]",
    ),
    click.option(
        "--dtype",
        metavar=_DTYPES,
        default="bf16",
        show_default=True,
        help="Of activations and weight; torch's names will do.",
    ),
    click.option(
        "--adapter-dtype",
        metavar=_DTYPES,
        default="fp32",
        show_default=True,
        help="Of lora_A and lora_B: fp32, or that of --dtype.",
    ),
    click.option(
        "--base",
        type=click.Choice((*CHOICES["base"], *DTYPE_NAMES)),
        default="plain",
        show_default=True,
        help="How frozen weights are stored: in --dtype, in 4 or 8 bits by bitsandbytes, or in float8.",
    ),
    click.option(
        "--float8",
        type=click.Choice(CHOICES["float8"]),
        help="With --base fp8: which large products round their input to float8 too. [both, and says so]",
    ),
    click.option("--train", metavar="a,b|a|b", default="a,b", show_default=True, help="Which factors train."),
    click.option(
        "--dropout",
        metavar="P",
        default="0",
        show_default=True,
        help="Of the adapter's input while training: above 0 modules take any rate below 1.",
    ),
    _chosen("bias", "Which biases train, as PEFT calls it; lora_bias is that of an adapter."),
    click.option("--no-input-grad", is_flag=True, help="The input needs no gradient (a first layer)."),
    _chosen("criterion"),
    click.option("--max-saved-bytes", metavar="N", help="Most that one linear may keep for its backward."),
    click.option(
        "--allow-lossy-merge", is_flag=True, help="Allow merging into 16-bit weights, which drops small updates."
    ),
    _chosen("merge_rounding", "Of a weight merged in 16 bits; stochastic keeps small updates on average."),
    _chosen("launch", "How steps are launched: compile for torch.compile, graph for CUDA graphs."),
    _chosen("groups", "Compute q, k, v and gate, up together where that is priced no higher, or never."),
    _chosen("norms", "Let frozen RMSNorms of 16 bits keep their input as it is, or leave them."),
    _chosen("rotary", "Make rotary embeddings of 16 bits in one kernel, or leave them."),
    click.option(
        "--memory-budget",
        metavar="SIZE",
        help="Most that a step of the whole model may take, such as 38GiB: which layers keep what is planned by it.",
    ),
    click.option("--no-kernels", is_flag=True, help="Plain torch only: no fused Triton kernels."),
    click.option(
        "--device",
        metavar="NAME|PATH",
        default="h100",
        show_default=True,
        help="Device profile for the time: a name, or a file that `tune` wrote.",
    ),
)


def _spec_options(command: Command) -> Command:
    for option in reversed(_SPEC_OPTIONS):
        command = option(command)
    return command


#: Options that are fields of a workload as they are.
_AS_GIVEN = (
    *("dtype", "adapter_dtype", "train", "criterion", "max_saved_bytes", "allow_lossy_merge", "merge_rounding"),
    *("base", "bias", "device", "dropout", "float8", "groups", "launch", "memory_budget", "model_type"),
    *("norms", "rotary"),
)


def _read_spec(options: dict[str, Any]) -> Request:
    if options["arch"] is None:
        raise SpecError("--arch: missing; give a name (`runlora-gen archs` lists them) or the path of a config.json")
    request = read_request(
        options["arch"],
        rank=options["rank"],
        name=options.get("name"),
        target_modules=options["target_modules"],
        target_parameters=options["target_parameters"],
        layout=options.get("layout", STANDALONE),
        prefix="--",
        tokens=options["tokens"] or None,
        input_grad=not options["no_input_grad"],
        kernels=not options["no_kernels"],
        sequence=options.get("sequence"),
        **{name: options[name] for name in _AS_GIVEN},
    )
    if not options.get("quiet"):
        for line in (*request.notes(), *(() if options["float8"] else request.rounding())):
            click.echo(line, err=True)
    return request


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@_spec_options
@click.option("--sequence", "-s", metavar="T", help="Tokens of a sequence, for --memory-budget. [all of a step]")
@click.option("--name", metavar="NAME", help="What the package is called. [the architecture's name]")
@click.option("-o", "--output", metavar="DIR", default="generated", show_default=True, help="Folder to write into.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 and show a diff if the folder is stale.")
@click.option("--dry-run", is_flag=True, help="Write nothing; say what would be written.")
@click.option("--force", is_flag=True, help="Overwrite files that were not generated.")
@click.option("--all-variants", is_flag=True, help="Every enumerated pair in each module, selectable by id.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default=STANDALONE,
    show_default=True,
    help="Modules that work alone, or that share one base class and one set of kernels in their folder.",
)
@click.option("--line-length", metavar="N", help="Columns of a line. [the repository's [tool.black], else 88]")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Also print every file and every choice.")
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Generate the fastest LoRA linears for an architecture as standalone torch modules.

    \b
      runlora-gen --arch llama-13b --rank 8 -o generated/
      runlora-gen explain --arch llama-13b --rank 8 --tokens 4096
      runlora-gen verify generated/llama_13b_r8

    Exit codes: 0 done, 1 stale (--check) or a failed verification, 2 bad input.
    """  # noqa: D301  # \b is click's mark for lines to leave as they are
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if context.invoked_subcommand is not None:
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise SpecError(f"{option}: stands before the command {context.invoked_subcommand}; give it after it")
        return
    if not given:
        click.echo(context.get_help())
        return
    from .emit.manifest import folder_name
    from .emit.publish import plan_changes, publish
    from .emit.render import is_installed
    from .emit.style import MAX_LINE_LENGTH

    request = _read_spec(options)
    out = Path(options["output"])
    length, variants = options["line_length"], options["all_variants"]
    columns = None if length is None else parse_counts("--line-length", (length,), maximum=MAX_LINE_LENGTH)[0]
    quiet, verbose = options["quiet"], options["verbose"]
    # What is there is trusted where the generator's version says all, and nobody asks what was chosen.
    trusting = is_installed() and not (options["check"] or verbose)
    current = up_to_date(request, out, line_length=columns, all_variants=variants) if trusting else {}
    stale = {rank: architecture for rank, architecture in request.by_rank.items() if rank not in current}
    packages = built(
        replace(request, by_rank=stale),
        out,
        line_length=columns,
        all_variants=variants,
        reuse=not options["check"],  # a check trusts nothing that it can make anew
    )
    if verbose:
        for package in packages:
            for choice in (*package.layers, *package.groups, *package.mlps):
                for part in choice.ranges:
                    upto = "" if part.last_tokens is None else f" up to {part.last_tokens} tokens"
                    name = part.decision.chosen.program.id
                    click.echo(f"{package.folder} {choice.layer.name}{upto}: {name}", err=True)
    if options["check"] or options["dry_run"]:
        changes = plan_changes(out, packages, force=True)
    else:
        changes = publish(out, packages, force=options["force"])
    if options["check"]:
        if changes and not quiet:
            for change in changes:
                click.echo(change.diff(), nl=False)
            click.echo(one_line(f"stale: {_files(len(changes))} to write or remove in {out}"), err=True)
        context.exit(EXIT_STALE if changes else 0)
    if quiet:
        return
    verb, removed = ("would write", "would remove") if options["dry_run"] else ("wrote", "removed")
    if verbose or options["dry_run"]:
        for change in changes:
            click.echo(f"{verb if change.text is not None else removed} {change.path}")
    modules = current | {rank: package.modules for rank, package in zip(stale, packages, strict=True)}
    for rank, architecture in request.by_rank.items():
        folder = folder_name(architecture, rank)
        count = sum(change.path.parent.name == folder for change in changes)
        done = f"{verb} {_files(count)}" if count else "up to date"
        click.echo(f"{out / folder}: {modules[rank]} modules, {done}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def archs(as_json: bool) -> None:
    """List the architectures of the catalogue."""
    known = [load_architecture(name) for name in architecture_names()]
    if as_json:
        data = [
            {"name": a.name, "model_type": a.model_type, "projections": [asdict(p) for p in a.projections]}
            for a in known
        ]
        click.echo(json.dumps(data, indent=1))
        return
    width = max(len(architecture.name) for architecture in known)
    for architecture in known:
        shapes = ", ".join(f"{'/'.join(layer.projections)} {layer.name}" for layer in layers(architecture))
        click.echo(f"{architecture.name:<{width}}  {shapes}")


@main.command(short_help="Show what a model gains, what was chosen for each shape, and why.")
@_spec_options
@click.option("--variants", is_flag=True, help="Also each shape's variants: the Pareto front and the paper's.")
@click.option("--all", "show_all", is_flag=True, help="Also each shape's variants: every program.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(variants: bool, show_all: bool, as_json: bool, **options: Any) -> None:
    """Show what a model gains: time of its LoRA linears and experts, memory that they keep, and what decides.

    Then a line for each shape: what was chosen, and its time over that of the frozen linear, or of the frozen experts.
    """
    from .emit.report import SCHEMA_VERSION, adapted, explain_table, gain_data, gain_lines, gain_table, site_data
    from .forecast.gain import gain
    from .search.grouped import alone, decide_groups_of_step
    from .search.ranges import decide_step, rest_of_step, with_all

    request = _read_spec(options)
    architecture, workload = request.architecture, request.workload
    if workload.memory_budget is not None:
        raise SpecError(
            "--memory-budget: explain tells of layers one by one; give it to estimate, which shows the plan"
        )
    if len(request.ranks) > 1 or len(workload.tokens) > 1:
        raise SpecError("explain: several values of --rank or --tokens; give one of each")
    rank, tokens = request.ranks[0], workload.tokens[0]
    sites, stacks = layers(architecture), experts(architecture.stacks, chained=workload.chains_experts)
    every: list[Site] = [*sites, *stacks]
    decisions = decide_step(workload, every, rank, tokens)
    grouped = decide_groups_of_step(workload, architecture, rank, tokens)
    if as_json or variants or show_all:
        decisions = [with_all(workload, decision) for decision in decisions]
        grouped = tuple((site, with_all(workload, decision)) for site, decision in grouped)
    stacked = list(zip(stacks, decisions[len(sites) :], strict=True))
    rest = rest_of_step(workload, every, rank, tokens)
    found = gain(architecture, sites, decisions[: len(sites)], rest, grouped, stacked)
    decided = dict(zip(sites, decisions, strict=False))
    if as_json:
        data = {
            "schema_version": SCHEMA_VERSION,
            "arch": architecture.name,
            "rank": rank,
            "tokens": tokens,
            "dtype": workload.dtype,
            "adapter_dtype": workload.adapter_dtype,
            "base": workload.base,
            "device": workload.device,
            "launch": workload.launch,
            "model": gain_data(found),
            "layers": [site_data(layer, rank, decision) for layer, decision in decided.items()],
            **{
                kind: [site_data(site, rank, decision) for site, decision in grouped if isinstance(site, of)]
                for kind, of in (("groups", Group), ("mlps", Mlp))
            },
            "experts": [site_data(stack, rank, decision) for stack, decision in stacked],
        }
        click.echo(json.dumps(data, indent=1))
        return
    base = f" on {workload.base}" if workload.quantized else ""
    # What runs: groups, of each shape the linears that are in none, and experts.
    shapes = {(layer.in_features, layer.out_features): decision for layer, decision in decided.items()}
    rows: list[tuple[Site, Decision]] = [
        *grouped,
        *(
            (layer, shapes[layer.in_features, layer.out_features])
            for layer in alone(architecture, [group for group, _ in grouped])
        ),
        *stacked,
    ]
    console = _console(PLAIN_WIDTH)
    for line in gain_lines(found, [decision for _, decision in rows], workload):
        console.print(line, markup=False)
    console.print()
    console.print(
        f"{adapted(found)} of {architecture.name}, rank {rank}, {tokens} tokens, {workload.dtype}{base}, "
        f"{'' if workload.bias == 'none' else 'biases trained, '}{decisions[0].setting.device.title}"
    )
    console.print(gain_table(*zip(*rows, strict=True)))
    if variants or show_all:
        console = _console(REPORT_WIDTH)
        for site, decision in rows:
            console.print()
            for part in explain_table(site, rank, decision, show_all=show_all):
                console.print(part)


def _console(width: int) -> Console:
    """What prints tables: as wide as the terminal, else as told."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def _without_tokens(command: Command) -> Command:
    """The options of the spec, but for the tokens."""
    for option in reversed(_SPEC_OPTIONS):
        applied = option(command)
        parameters: list[click.Parameter] = applied.__click_params__
        if parameters[-1].name == "tokens":
            parameters.pop()
    return command


@main.command(short_help="Predict a training step of the whole model: time and peak memory.")
@_without_tokens
@click.option("--batch", "-b", metavar="N", help="Sequences a step. [1]")
@click.option("--sequence", "-s", metavar="T", help="Tokens of a sequence, such as 2048 or 2k.")
@click.option("--checkpointing", is_flag=True, help="Layers keep their inputs only, and run their forward twice.")
@click.option("--front", "show_front", is_flag=True, help="Also what steps take in which layers keep more or less.")
@click.option("--picture", metavar="FILE", help="Draw that: time against memory. Needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(
    batch: str | None,
    sequence: str | None,
    checkpointing: bool,
    show_front: bool,
    picture: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Predict a training step of the whole model, frozen, with PEFT, and with generated modules.

    \b
      runlora-gen estimate --arch llama-3-8b --rank 16 --batch 4 --sequence 4k --checkpointing
      runlora-gen estimate --arch llama-3-8b --rank 16 -b 4 -s 4k --memory-budget 64GiB

    Forward and backward, run eagerly on one device: time, and the most memory that it takes, with weights. Without the
    optimizer's step. With a memory budget also the plan for it: which layers keep what.
    """  # noqa: D301
    from .emit.picture import check_picture, draw
    from .emit.report import Predicted, estimate_data, estimate_lines
    from .forecast.estimate import Batch, check_modelled, steps_of
    from .forecast.plan import every_plan, front, plan_within

    if sequence is None:
        raise SpecError("--sequence: missing; give the tokens of a sequence, such as 2048")
    counts = {
        name: parse_counts(f"--{name}", (value,), maximum=MAX_TOKENS, kilo=name == "sequence")
        for name, value in (("batch", batch or "1"), ("sequence", sequence))
    }
    (size, *others), (length, *more) = counts.values()
    if others or more:
        raise SpecError("estimate: several values of --batch or --sequence; give one of each")
    if size * length > MAX_TOKENS:
        raise SpecError(f"--batch: {size} sequences of {length} tokens are above {MAX_TOKENS} tokens a step")
    if checkpointing and (options["memory_budget"] or show_front or picture):
        raise SpecError("--checkpointing: given beside a plan, which says itself which layers checkpoint")
    if picture is not None:
        check_picture(picture)
    planned = {"sequence": str(length)} if options["memory_budget"] else {}
    request = _read_spec({**options, **planned, "tokens": (str(size * length),)})
    if len(request.ranks) > 1:
        raise SpecError("estimate: several values of --rank; give one")
    architecture, rank, workload = request.architecture, request.ranks[0], request.workload
    check_modelled(architecture)
    step = Batch(size, length, checkpointing)
    steps = steps_of(architecture, rank, workload, step)
    found, budget = steps.all(), workload.memory_budget
    plans = every_plan(steps) if budget is not None or show_front or picture is not None else []
    plan = None if budget is None else plan_within(plans, budget)
    points = front(plans) if show_front or picture is not None else []
    if picture is not None:
        title = f"{architecture.name}, rank {rank}, {size} x {length} tokens, {workload.dtype}"
        draw(Path(picture), title, steps, points, plan, budget)
    predicted = Predicted(architecture, rank, workload, step, found, plan, points if show_front else ())
    if as_json:
        click.echo(json.dumps(estimate_data(predicted), indent=1))
        return
    console = _console(PLAIN_WIDTH)
    for line in estimate_lines(predicted):
        console.print(line, markup=False)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def devices(as_json: bool) -> None:
    """List the device profiles that --device knows."""
    from .cost.device import device_names, load_device

    profiles = [load_device(name) for name in device_names()]
    if as_json:
        data = [
            {
                "name": profile.name,
                "title": profile.title,
                "source": profile.source,
                "measured_on": profile.measured_on.name if profile.measured_on else None,
                "measured_dtypes": sorted(profile.meter.times),
                "kernels": profile.kernels,
                "bytes_per_s": profile.bytes_per_s,
                "flops_per_s": dict(profile.flops_per_s),
            }
            for profile in profiles
        ]
        click.echo(json.dumps(data, indent=1))
        return
    width = max(len(profile.name) for profile in profiles)
    for profile in profiles:
        rates = ", ".join(f"{dtype} {rate / 1e12:.4g}" for dtype, rate in profile.flops_per_s.items())
        lines = [profile.title, f"{rates} TFLOP/s; {profile.bytes_per_s / 1e9:.4g} GB/s", *_origin(profile)]
        for name, text in zip([profile.name, *[""] * len(lines)], lines, strict=False):
            click.echo(f"{name:<{width}}  {text}")


def _origin(profile: DeviceProfile) -> list[str]:
    """Where a profile's figures come from, in lines that fit."""
    dtypes = ", ".join(sorted(profile.meter.times))
    of_another = (
        f"operations ({dtypes}) in ratios measured on {profile.measured_on.name}" if profile.measured_on else ""
    )
    measured = [of_another or f"operations measured in {dtypes}"] if dtypes else ["data sheet: no operation measured"]
    return [*measured, *textwrap.wrap(profile.source, PLAIN_WIDTH - 12)]


@main.command(short_help="Prove generated modules, a file or a folder.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--examples", type=click.IntRange(1, 100_000), default=30, show_default=True, help="Cases a property.")
@click.option("--require-kernels", is_flag=True, help="Kernels that can't run here are a failure.")
@click.option("-x", "--exitfirst", is_flag=True, help="Stop at the first property that fails.")
@click.option("-q", "--quiet", is_flag=True, help="Print failures only.")
def verify(path: Path, examples: int, require_kernels: bool, exitfirst: bool, quiet: bool) -> None:
    """Prove generated modules, a file or a folder: every variant against a plain autograd LoRA.

    Kernels run on the GPU, without one in Triton's interpreter. Where neither can, the verdict says so.
    """
    try:
        from .measure.verify import verify as prove
    except ModuleNotFoundError as error:
        raise SpecError(f"verify: needs {error.name}: pip install torch hypothesis pytest") from None
    if prove(path, examples=examples, quiet=quiet, require_kernels=require_kernels, exit_first=exitfirst):
        sys.exit(EXIT_STALE)


@main.command()
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="What to measure."
)
@click.option("-o", "--output", metavar="FILE.toml", required=True, help="The profile; an unfinished one is resumed.")
@click.option("--arch", metavar="NAME|PATH", help="Measure at the shapes of an architecture.")
@click.option("--shapes", metavar="IxO", multiple=True, help="Measure at these shapes, such as 4096x4096,4096x11008.")
@click.option(
    "--experts",
    metavar="ExK:IxO",
    multiple=True,
    help="Measure stacks of E experts, K a token, such as 128x8:2048x1536.",
)
@click.option("--mlps", metavar="IxF", multiple=True, help="Measure gated MLPs of I to F features, such as 4096x14336.")
@click.option("--tokens", metavar="T", multiple=True, help="Token counts to measure at.")
@click.option("--rank", "-r", metavar="R", multiple=True, help="Ranks to measure at.")
@click.option("--dtype", metavar=_DTYPES, multiple=True, help="[bf16; on a CPU fp32]; repeat it.")
@click.option("--title", help="How people call the machine.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def tune(
    device: str,
    output: str,
    arch: str | None,
    shapes: tuple[str, ...],
    experts: tuple[str, ...],
    mlps: tuple[str, ...],
    tokens: tuple[str, ...],
    rank: tuple[str, ...],
    dtype: tuple[str, ...],
    title: str | None,
    quiet: bool,
) -> None:
    """Measure this machine: a profile for --device.

    \b
      runlora-gen tune --device cuda -o mine.toml --arch llama-13b --rank 16
      runlora-gen --arch llama-13b --rank 16 --device mine.toml -o generated/

    Without shapes, tokens or ranks it measures a grid of usual ones, which takes minutes. Timings that never agree are
    left out and named, which is no error: the same command again measures just what is missing.
    """  # noqa: D301
    if not output.endswith(".toml"):
        raise SpecError(f"--output: {shorten(output)} is not allowed; give a file that ends in .toml")
    for option, given in (("--shapes", shapes), ("--experts", experts), ("--mlps", mlps)):
        if arch is not None and given:
            raise SpecError(f"{option}: given beside --arch; give one of both")
    wanted, stacks = parse_shapes("--shapes", shapes), parse_stacks("--experts", experts)
    whole = parse_shapes("--mlps", mlps)
    if arch is not None:
        architecture = load_architecture(arch, others=meta)
        wanted = tuple((layer.in_features, layer.out_features) for layer in layers(architecture))
        whole = tuple(mlp.shapes[0] for mlp in mlps_of(architecture))
        stacks = tuple(
            dict.fromkeys(
                (s.experts, s.top_k, s.in_features, s.out_features)
                for s in (*architecture.stacks, *architecture.offered)
            )
        )
    counts = parse_counts("--tokens", tokens, maximum=MAX_TOKENS, kilo=True) if tokens else ()
    ranks = parse_counts("--rank", rank, maximum=MAX_RANK) if rank else ()
    try:
        from .measure.tune import GRID, GRID_OF_EXPERTS, GRID_OF_MLPS, points, points_of_experts, points_of_mlps
        from .measure.tune import tune as measure
    except ModuleNotFoundError as error:
        raise SpecError(f"tune: needs {error.name}: pip install torch") from None
    usual, usual_of_experts, usual_of_mlps = GRID[device], GRID_OF_EXPERTS[device], GRID_OF_MLPS[device]
    if not wanted and not stacks and not whole:
        wanted, stacks, whole = usual[0], usual_of_experts[0], usual_of_mlps[0]
    sizes = (
        *points(wanted, counts or usual[1], ranks or usual[2]),
        *points_of_experts(stacks, counts or usual_of_experts[1], ranks or usual_of_experts[2]),
        *points_of_mlps(whole, counts or usual_of_mlps[1], ranks or usual_of_mlps[2]),
    )
    if not sizes:
        raise SpecError(f"--rank: {ranks} are above min(in, out) of every shape")
    dtypes = tuple(parse_dtype("--dtype", name) for name in dtype) or ("bf16" if device == "cuda" else "fp32",)
    measure(Path(output), device=device, dtypes=tuple(dict.fromkeys(dtypes)), sizes=sizes, title=title, quiet=quiet)
    click.echo(output)


def run() -> None:
    """Entry point: every error on one line, exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a folder's name, or µ where the terminal knows ASCII only
    try:
        code = main.main(standalone_mode=False)
    except SpecError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(error.format_message())
    except OSError as error:
        # Files come with their paths; what has none is the terminal, or what stands in for it.
        what = "write the output" if error.filename is None else f"access {shorten(error.filename)}"
        _fail(f"cannot {what}: {reason(error)}")
    except (click.Abort, KeyboardInterrupt):
        click.echo("runlora-gen: interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"runlora-gen: error: {one_line(message)}", err=True)
    sys.exit(EXIT_BAD_INPUT)
