"""Are the proofs any good? Each mutant of the catalogue, ``mutants.toml``, is one defect; something must find it.

    python tools/mutants.py --json tools/results/mutants.json
    python tools/mutants.py --category triton --name "tile walk"
    python tools/mutants.py --sample 10 --seed 3

A mutant of a generated module is killed if a property that ``runlora-gen verify`` proves fails on it, or if it can't be
imported; one of a source file, if the tests that its entry names fail on a copy of the checkout. Before that the module
is proved as it was generated, by ``runlora-gen verify`` itself, and the tests must pass on the sources as they are.
Exit code 1: a mutant survived, or is stale, as its text is not where it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tomllib
from runlora_gen.cli import main as runlora_gen

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = Path(__file__).with_suffix(".toml")
#: What kills a mutant of a generated module.
VERIFY = "verify"
KILLED, SURVIVED, EQUIVALENT = "killed", "SURVIVED", "equivalent"
#: Seconds after which a mutant counts as killed: what waits forever is found by waiting.
TIMEOUT = 900
#: Cases that hypothesis draws for a property: the default of ``verify``.
EXAMPLES = 30
#: What a copy of the checkout does without.
_NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


class StaleError(Exception):
    """A mutant, or the check that should kill it, no longer fits what it is about."""


@dataclass(frozen=True)
class Mutant:
    """One defect.

    Attributes:
        name: what is wrong, for people; unique.
        category: its table in the catalogue.
        where: a module of the catalogue's ``modules``, or the path of a source file in the checkout.
        old, new: the text that is replaced, and what takes its place.
        within: how the line begins that opens the block in which ``old`` stands: a function or a class, or a function
            of a class as ``class _Name / def backward``. Empty: anywhere in the file.
        times: how often ``old`` must be there; each is replaced.
        killed_by: ``verify``, or what pytest is called with.
        equivalent: why nothing can find it; then it is only applied, and never run.
    """

    name: str
    category: str
    where: str
    old: str
    new: str
    within: str = ""
    times: int = 1
    killed_by: str = VERIFY
    equivalent: str = ""

    @property
    def of_module(self) -> bool:
        """Whether a generated module is changed, and no source file."""
        return "/" not in self.where

    def apply(self, text: str) -> str:
        """The text with the defect.

        Raises:
            StaleError: ``within`` or ``old`` is not there as often as it should be.
        """
        start, end = 0, len(text)
        for line in filter(None, self.within.split(" / ")):
            start, end = _block(text, line, start, end, self.name)
        found = text.count(self.old, start, end)
        if found != self.times or self.old == self.new:
            place = f"{self.where}{f', {self.within}' if self.within else ''}"
            raise StaleError(f"{self.name}: in {place} its text is found {found} times, not {self.times}")
        return text[:start] + text[start:end].replace(self.old, self.new) + text[end:]


def _block(text: str, line: str, start: int, end: int, name: str) -> tuple[int, int]:
    """From a line that begins with ``line`` to the end of what is indented below it."""
    opened = list(re.compile(rf"^([ \t]*){re.escape(line)}", re.MULTILINE).finditer(text, start, end))
    if len(opened) != 1:
        raise StaleError(f"{name}: {len(opened)} lines begin with {line!r}, not one")
    # The closing bracket of a signature stands as far to the left as what opened it.
    after = re.compile(rf"^(?!{opened[0][1]}(?:[ \t]|[)\]}}]))(?=.*\S)", re.MULTILINE)
    closed = after.search(text, text.index("\n", opened[0].end()) + 1, end)
    return opened[0].start(), closed.start() if closed else end


def catalogue() -> tuple[dict[str, str], tuple[Mutant, ...]]:
    """Options by which each module is generated, and all mutants."""
    data = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    modules = data.pop("modules")
    mutants = tuple(Mutant(category=category, **entry) for category, entries in data.items() for entry in entries)
    doubled = [name for name, count in Counter(mutant.name for mutant in mutants).items() if count > 1]
    if doubled:
        raise StaleError(f"several mutants are called {doubled[0]!r}")
    for mutant in mutants:
        if mutant.of_module and (mutant.where not in modules or mutant.killed_by != VERIFY):
            raise StaleError(f"{mutant.name}: {mutant.where} is no module of the catalogue, or not for verify")
        if not mutant.of_module and mutant.killed_by == VERIFY and not mutant.equivalent:
            raise StaleError(f"{mutant.name}: no tests are named that kill it")
    return modules, mutants


@cache
def module_text(options: str) -> str:
    """The module that is generated by some options: a single one, of an MLP, or of experts, the last one of a chain."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
        command = [*shlex.split(options), "--line-length", "120", "-q", "-o", folder]
        runlora_gen.main(command, standalone_mode=False)
        kinds = ("*_experts_*",) if "--target-parameters" in options else ("mlp_*", "linear_*")
        found = next(filter(None, (list(Path(folder).glob(f"*/{kind}.py")) for kind in kinds)))
        (module,) = [path for path in found if not path.name.startswith("first_")]
        return module.read_text(encoding="utf-8")


def source_of(mutant: Mutant, modules: Mapping[str, str]) -> str:
    """What a mutant is applied to."""
    return module_text(modules[mutant.where]) if mutant.of_module else (ROOT / mutant.where).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """What a check found: the first failure, empty if there was none, and how long it took."""

    failure: str
    seconds: float


def _call(command: Sequence[str | Path], folder: Path, generator: Path) -> tuple[int, str]:
    """Exit code and output of a process, which is ended with all its children after too long a time."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != _INTERPRET},
        "PYTHONPATH": str(generator),
        "PYTHONDONTWRITEBYTECODE": "1",  # two texts of one size within a second would share it
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "XDG_CACHE_HOME": str(folder / ".cache"),  # what a mutant formats is nobody else's
    }
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return -1, f"still running after {TIMEOUT} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


def verified(text: str) -> Run:
    """Prove a module's text as users do."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.py"
        path.write_text(text, encoding="utf-8")
        code, output = _call([sys.executable, "-m", "runlora_gen", "verify", path], Path(folder), ROOT / "generator")
    return Run("" if code == 0 else _shown(output), time.perf_counter() - started)


#: The parts of a proof, and in which categories of mutants the kernels are likelier to find something.
_PARTS = ("torch", "kernels")
_KERNELS_FIRST = ("triton", "launch", "strides")
#: Where processes are forked that have imported what takes longest: torch.
_forkserver = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "hypothesis", "pytest", "triton", "runlora_gen.measure.proof"]
_INTERPRET = "TRITON_INTERPRET"


def refuted(text: str, parts: Sequence[str] = _PARTS) -> Run:
    """Run what ``runlora-gen verify`` runs on a module, part by part, up to the first failure."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.py"
        path.write_text(text, encoding="utf-8")
        for part in parts:
            receiver, sender = _forkserver.Pipe(duplex=False)
            process = _forkserver.Process(target=_refute, args=(path, part, sender), daemon=True)
            process.start()
            sender.close()
            failure = f"still running after {TIMEOUT} s"
            try:
                if receiver.poll(TIMEOUT):
                    failure = receiver.recv()
            except EOFError:
                failure = "the process ended before the property was proved"
            process.kill()
            process.join()
            if failure:
                return Run(_shown(failure), time.perf_counter() - started)
    return Run("", time.perf_counter() - started)


def _refute(path: Path, part: str, sender: Connection) -> None:
    """In a process of its own: send the first failure, or nothing."""
    if part == _PARTS[0]:
        os.environ.pop(_INTERPRET, None)
    sender.send(first_failure(path, part))


def first_failure(path: Path, part: str) -> str:
    """Title and error of the first property that fails on a module; empty if all hold."""
    from runlora_gen.measure.proof import checks, load, outcome, reason

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            load({path.stem: path})
            found = list(checks([path.stem], part, EXAMPLES))
        except BaseException as error:
            return f"can't be imported: {reason(error)}"
        for check in found:
            result = outcome(check)
            if "error" in result:
                return f"{check.title}: {result['error']}"
    return ""


def tested(where: str, text: str | None, selection: str) -> Run:
    """Run tests on a copy of the checkout, in which a file has another text."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=_NOT_COPIED)
        if text is not None:
            (copy / where).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(selection)]
        code, output = _call(command, copy, copy / "generator")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    said = failed[0] if failed else (output.strip().splitlines() or [f"exit code {code}"])[-1]
    return Run("" if code == 0 else _shown(said), time.perf_counter() - started)


def _shown(text: str) -> str:
    """On one line of a table."""
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def judge(mutant: Mutant, source: str) -> dict[str, Any]:
    """The verdict on one mutant."""
    text = mutant.apply(source)
    row = {"name": mutant.name, "category": mutant.category, "where": mutant.where}
    if mutant.equivalent:
        return {**row, "verdict": EQUIVALENT, "by": mutant.equivalent, "seconds": 0.0}
    if mutant.of_module:
        run = refuted(text, _PARTS[::-1] if mutant.category in _KERNELS_FIRST else _PARTS)
    else:
        run = tested(mutant.where, text, mutant.killed_by)
    verdict = KILLED if run.failure else SURVIVED
    return {**row, "verdict": verdict, "by": run.failure or mutant.killed_by, "seconds": round(run.seconds, 1)}


def check_unchanged(
    mutants: Iterable[Mutant], sources: Mapping[str, str], pool: ThreadPoolExecutor
) -> dict[str, float]:
    """Seconds of every check without a mutant.

    Raises:
        StaleError: something fails, so that it would seem to kill whatever it is run on.
    """
    checks = {}
    for mutant in mutants:
        if not mutant.equivalent:
            key = mutant.where if mutant.of_module else mutant.killed_by
            arguments = (sources[mutant.name],) if mutant.of_module else ("", None, mutant.killed_by)
            checks[key] = (verified if mutant.of_module else tested, arguments)
    pending = {key: pool.submit(check, *arguments) for key, (check, arguments) in checks.items()}
    seconds = {}
    for key, future in pending.items():
        run = future.result()
        if run.failure:
            raise StaleError(f"fails without a mutant: {key}: {run.failure}")
        seconds[key] = round(run.seconds, 1)
        print(f"unchanged: {key}: passes, {run.seconds:.0f} s", flush=True)
    return seconds


def selected(mutants: Sequence[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Those that the command line asks for, in the order of the catalogue."""
    chosen = [
        mutant
        for mutant in mutants
        if (not options.category or mutant.category in options.category)
        and (not options.where or mutant.where in options.where)
        and (not options.name or any(part in mutant.name for part in options.name))
    ]
    if options.sample is not None and options.sample < len(chosen):
        picked = random.Random(options.seed).sample(range(len(chosen)), options.sample)
        chosen = [chosen[i] for i in sorted(picked)]
    return chosen


def versions() -> dict[str, str]:
    """Of what the verdicts may depend on."""
    packages = ("torch", "triton", "hypothesis", "pytest")
    found = {d.metadata["name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **{name: found.get(name, "none") for name in packages}}


def main() -> None:
    """Judge the mutants, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", action="append", metavar="CATEGORY", help="mutants of this one only; repeat it")
    parser.add_argument("--where", action="append", metavar="WHERE", help="of this module or file only; repeat it")
    parser.add_argument("--name", action="append", metavar="PART", help="those with this in their names; repeat it")
    parser.add_argument("--sample", type=int, metavar="N", help="a random sample of them")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="checks at once")
    parser.add_argument("--list", action="store_true", help="apply all, but run nothing")
    parser.add_argument("--unproved", action="store_true", help="leave out that everything passes without a mutant")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    started = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    if not Path("/dev/nvidiactl").exists():
        os.environ[_INTERPRET] = "1"  # before Triton is imported, where processes are forked
    _forkserver.set_forkserver_preload(_PRELOADED)
    try:
        modules, mutants = catalogue()
        chosen = selected(mutants, options)
        sources = {mutant.name: source_of(mutant, modules) for mutant in chosen}
        for mutant in chosen:
            mutant.apply(sources[mutant.name])
        if options.list:
            for mutant in chosen:
                print(f"{mutant.category:<10} {mutant.where:<12} {mutant.name}")
            return
        with ThreadPoolExecutor(options.jobs) as pool:
            unchanged = {} if options.unproved else check_unchanged(chosen, sources, pool)
            rows = []
            for row in pool.map(lambda mutant: judge(mutant, sources[mutant.name]), chosen):
                rows.append(row)
                where = f"{row['category']:<10} {row['name']:<56}"
                print(f"{row['verdict']:<10} {row['seconds']:6.1f} s  {where} {row['by']}", flush=True)
    except StaleError as error:
        sys.exit(f"mutants: {error}")
    total = time.perf_counter() - started
    counts = Counter(row["verdict"] for row in rows)
    print(f"{len(rows)} mutants: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + f", {total:.0f} s")
    if options.json:
        report = {
            "date": datetime.date.today().isoformat(),
            "versions": versions(),
            "jobs": options.jobs,
            "seconds": round(total),
            "counts": dict(counts),
            "unchanged": unchanged,
            "mutants": rows,
        }
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(1 if counts[SURVIVED] else 0)


if __name__ == "__main__":
    main()
