"""What a package says that it is, by which a run sees that nothing is to be done.

Without what chooses, renders and formats: importing that takes as long as all else of such a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

from .. import __version__
from ..cost.device import load_device
from ..request.architecture import Architecture
from ..request.files import read_text
from ..request.layout import STANDALONE
from ..request.workload import Workload
from .render import MAX_GENERATED_BYTES, template_digest
from .style import style_of

MANIFEST = "manifest.json"
#: What does not go into a generated file as a name.
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]")


def sha256(text: str) -> str:
    """Of a text, as the manifest has it."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def folder_name(architecture: Architecture, rank: int) -> str:
    """What a package is called."""
    return f"{architecture.slug}_r{rank}"


def package_digest(
    architecture: Architecture,
    rank: int,
    workload: Workload,
    *,
    all_variants: bool = False,
    layout: str = STANDALONE,
) -> str:
    """Of everything that a package's choice and text follow from, but for the style of its place."""
    spec = {
        "projections": [asdict(projection) for projection in architecture.projections],
        "stacks": [asdict(stack) for stack in architecture.stacks],
        "gated": [asdict(gated) for gated in architecture.gated],
        "rank": rank,
        "workload": asdict(public_part(workload)),
        "device": load_device(workload.device).digest,
        "all_variants": all_variants,
        "templates": template_digest(),
    }
    if layout != STANDALONE:
        spec["layout"] = layout
    if workload.memory_budget is not None:
        spec["decoder"] = None if architecture.decoder is None else asdict(architecture.decoder)
    return sha256(json.dumps(spec, sort_keys=True))


def current_modules(
    folder: Path,
    architecture: Architecture,
    rank: int,
    workload: Workload,
    *,
    line_length: int | None = None,
    all_variants: bool = False,
    layout: str = STANDALONE,
) -> int | None:
    """How many modules a folder has that holds just what this version would generate; None if it holds anything else.

    That is seen by its manifest: nothing is chosen anew. The arguments are those of ``build_package``.
    """
    with contextlib.suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
        manifest = json.loads(read_text(folder / MANIFEST, label=MANIFEST, limit=MAX_GENERATED_BYTES, kind="manifest"))
        expected = {
            "digest": package_digest(architecture, rank, workload, all_variants=all_variants, layout=layout),
            "generator_version": __version__,
            "style": sha256(style_of(folder, line_length).key),
        }
        files = manifest["files"]
        if any(manifest[name] != value for name, value in expected.items()):
            return None
        if set(files) != {path.name for path in folder.iterdir() if path.is_file()} - {MANIFEST}:
            return None
        texts = {name: read_text(folder / name, label=name, limit=MAX_GENERATED_BYTES, kind="file") for name in files}
        count = sum(len(manifest[kind]) for kind in ("layers", "groups", "mlps", "experts"))
        return count if {name: sha256(text) for name, text in texts.items()} == files else None
    return None


def public_part(workload: Workload) -> Workload:
    """Of a profile's path only the name: a generated file says nothing of the machine that it was made on."""
    return replace(workload, device=_NOT_PLAIN.sub("_", Path(workload.device).name))
