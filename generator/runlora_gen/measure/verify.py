"""Prove generated modules, in a folder or alone, against a plain autograd LoRA.

The properties are those of the emitted ``test_equivalence.py`` and ``test_experts.py``, rendered afresh from the
templates, so that a folder cannot prove itself with a test that was changed. They run in processes of their own:
:mod:`.proof`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..emit.manifest import MANIFEST
from ..emit.render import MARKER, MAX_GENERATED_BYTES
from ..request.architecture import GENERATOR
from ..request.errors import SpecError, shorten
from ..request.files import is_plain, read_text
from .proof import KERNELS, TORCH

#: What a generated module holds, and no other generated file.
_MODULE = "\nVARIANTS: Mapping["


@dataclass
class _Verdict:
    """What was found out about one module."""

    proved: int = 0
    failures: list[str] = field(default_factory=list)
    #: Why the kernels did not run; empty if they did; None for a module without kernels.
    not_run: str | None = None
    kernels: str | None = None

    def text(self, require_kernels: bool) -> str:
        """The verdict on one line."""
        count = self.proved + len(self.failures)
        if self.failures:
            return f"FAILED {len(self.failures)} of {count} properties"
        if self.not_run:
            verdict = f"kernels not run: {self.not_run}"
            return f"FAILED: {verdict}" if require_kernels else f"proved (torch path; {verdict}), {count} properties"
        where = f", {self.kernels}" if self.kernels else ""
        return f"proved, {count} properties{where}"

    def failed(self, require_kernels: bool) -> bool:
        """Whether it is no proof."""
        return bool(self.failures) or (require_kernels and bool(self.not_run))


def verify(
    path: Path, *, examples: int, quiet: bool = False, require_kernels: bool = False, exit_first: bool = False
) -> int:
    """Run every property on a module, on every module of a folder, or on those of the folders below it.

    Args:
        path: a module's file, a folder that holds some, with or without a manifest, or one that holds such folders.
        examples: cases that hypothesis draws for a property.
        quiet: print failing modules only.
        require_kernels: kernels that can't run here are a failure.
        exit_first: stop at the first property that fails.

    Returns:
        The number of modules that failed.

    Raises:
        SpecError: there is nothing generated at ``path``, or a module can't be imported.
    """
    failed = 0
    for files in _found(path):
        # A file's name need not be one that Python could import.
        names = {
            f"module_{number}" if not file.stem.isidentifier() else file.stem: file for number, file in enumerate(files)
        }
        verdicts = _prove(names, examples, exit_first)
        for name, file in names.items():
            verdict = verdicts[name]
            failed += verdict.failed(require_kernels)
            if verdict.failed(require_kernels) or not quiet:
                click.echo(f"{file}: {verdict.text(require_kernels)}")
            for failure in verdict.failures:
                click.echo(f"  {failure}")
        if failed and exit_first:
            break
    return failed


def _found(path: Path) -> Iterator[list[Path]]:
    """The modules to prove, by the folder that they lie in."""
    if is_plain(path):
        if _MODULE not in _read(path):
            raise SpecError(f"verify: {shorten(str(path))} is no generated module: it has no VARIANTS")
        yield [path]
        return
    folders = [path, *sorted(place for place in path.glob("*") if place.is_dir())] if path.is_dir() else []
    found = [files for folder in folders if (files := _modules_in(folder))]
    if not found:
        raise SpecError(
            f"verify: no generated module at {shorten(str(path))} or one folder below; give a file or a folder"
        )
    yield from found


def _modules_in(folder: Path) -> list[Path]:
    """The generated modules of a folder: those that its manifest lists, which must be there, or all with the mark."""
    if not os.path.lexists(folder / MANIFEST):
        files = sorted(file for file in folder.glob("*.py") if is_plain(file))
        texts = {file: _read(file) for file in files}
        return [file for file, text in texts.items() if MARKER in text and _MODULE in text]
    text = _read(folder / MANIFEST)
    try:
        manifest = json.loads(text)
        if manifest["generator"] != GENERATOR:
            raise ValueError
        sites = [site for kind in ("layers", "groups", "mlps", "experts") for site in manifest.get(kind, ())]
        names = [str(site["module"]) for site in sites]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise SpecError(f"verify: {shorten(str(folder / MANIFEST))} is no manifest of {GENERATOR}") from None
    for name in names:
        if not name.isidentifier() or MARKER not in _read(folder / f"{name}.py"):
            raise SpecError(f"verify: {shorten(str(folder / f'{name}.py'))} was not generated by {GENERATOR}")
    return [folder / f"{name}.py" for name in names]


def _read(path: Path) -> str:
    return read_text(path, label=f"verify: {shorten(str(path))}", limit=MAX_GENERATED_BYTES, kind="generated file")


def _prove(modules: Mapping[str, Path], examples: int, exit_first: bool) -> dict[str, _Verdict]:
    """Both parts side by side: the torch path, and the kernels on a GPU or in Triton's interpreter."""
    verdicts = {name: _Verdict() for name in modules}
    on_gpu = torch.cuda.is_available()
    where = f"kernels on {torch.cuda.get_device_name()}" if on_gpu else "kernels in Triton's interpreter"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    parts = [_Part(TORCH, modules, examples, {})]
    parts.append(_Part(KERNELS, modules, examples, {} if on_gpu else {"TRITON_INTERPRET": "1"}))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for part in parts:
            part.start(progress)
        try:
            while any(part.running for part in parts) and not (exit_first and any(part.failed for part in parts)):
                time.sleep(0.05)
        finally:
            for part in parts:
                part.stop()
    for part in parts:
        if part.refused is not None:
            raise SpecError(f"verify: {_label(modules)} can't be imported: {part.refused}")
        for module, title, result in part.results:
            verdict = verdicts[module]
            skipped = result.get("skipped")
            if "error" in result:
                verdict.failures.append(f"{title}: {result['error']}")
            elif skipped is None:
                verdict.proved += 1
                verdict.kernels = where if part.name == KERNELS else verdict.kernels
            elif skipped.startswith("kernels not run: "):
                verdict.not_run = skipped.removeprefix("kernels not run: ")
    return verdicts


def _label(modules: Mapping[str, Path]) -> str:
    files = list(modules.values())
    return shorten(str(files[0] if len(files) == 1 else files[0].parent))


class _Part:
    """A process that runs one part of a proof, and a thread that reads what it says."""

    def __init__(self, name: str, modules: Mapping[str, Path], examples: int, environment: Mapping[str, str]) -> None:
        self.name = name
        #: Module, title and outcome of every check that was begun.
        self.results: list[tuple[str, str, dict[str, str]]] = []
        #: Why the modules could not be imported.
        self.refused: str | None = None
        spec = {"modules": {n: str(file.absolute()) for n, file in modules.items()}, "part": name, "examples": examples}
        self._first = next(iter(modules))
        self._stopped = False
        self._command = [sys.executable, "-m", "runlora_gen.measure.proof", json.dumps(spec)]
        # One thread each: two processes share the cores, and the products are small.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}

    def start(self, progress: Progress) -> None:
        """Begin."""
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        task = progress.add_task(f"{self.name}: starting", total=None)
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._listen, args=(self._process.stdout, progress, task), daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        """Whether there is more to hear of it."""
        return self._reader.is_alive()

    @property
    def failed(self) -> bool:
        """Whether something failed."""
        return self.refused is not None or any("error" in result for _, _, result in self.results)

    def stop(self) -> None:
        """End it, also where it would go on."""
        self._stopped = self.running
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._reader.join()

    def _listen(self, stream: IO[str], progress: Progress, task: TaskID) -> None:
        begun: tuple[str, str] | None = None
        announced, ended = False, False
        with stream:
            for text in stream:
                line: dict[str, Any] = json.loads(text)
                if "refused" in line:
                    self.refused = line["refused"]
                elif "total" in line:
                    announced = True
                    progress.update(task, total=line["total"])
                elif "title" in line:
                    begun = (line["module"], line["title"])
                    progress.update(task, description=f"{self.name}: {line['module']}: {line['title']}")
                elif "done" in line and begun is not None:
                    self.results.append((*begun, line))
                    begun = None
                    progress.advance(task)
                else:
                    ended = True
        if self._stopped:
            return
        if not announced:
            self.refused = self.refused or "it ended the process"
        elif not ended:
            # Whatever was not run is not proved.
            module, title = begun or (self._first, "all properties")
            self.results.append((module, title, {"error": "the process ended before the property was proved"}))
