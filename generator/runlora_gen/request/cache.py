"""Caches of the user: our own, and the Hugging Face hub's, which is read without its packages and without a network.

In the hub's ``models--ORG--NAME/refs/main`` holds a revision, ``models--ORG--NAME/snapshots/REVISION/`` its files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import SpecError, shorten
from .files import read_if_there

#: What a model is called on the hub, and no path looks like by its end.
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_MAX_REVISION_BYTES = 256


def is_model_name(text: str) -> bool:
    """Whether a text has the form ``organisation/name``."""
    return bool(_MODEL.fullmatch(text)) and ".." not in text and "--" not in text and not text.endswith(".json")


def hub_folder() -> Path:
    """Where the cache is: ``$HF_HUB_CACHE``, else ``$HF_HOME/hub``, else ``~/.cache/huggingface/hub``."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.environ[variable]), below)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(base), "huggingface", "hub")


def own_folder() -> Path:
    """Where what we keep is: ``$XDG_CACHE_HOME/runlora_gen``, else ``~/.cache/runlora_gen``.

    Raises:
        RuntimeError: this user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "runlora_gen"


def cached_config(model: str, file: str) -> str:
    """The path of a file of a model's main revision.

    Args:
        model: as ``organisation/name``.
        file: such as ``config.json``.

    Raises:
        SpecError: it is not in the cache.
    """
    hub = hub_folder()
    folder = hub / f"models--{model.replace('/', '--')}"
    try:
        there = folder.is_dir()
    except OSError:
        there = False
    if not there:
        raise SpecError(
            f"{shorten(model)}: no such file or folder, and no model of that name in the Hugging Face cache {hub}"
        )
    data = read_if_there(folder / "refs" / "main", label="refs/main", limit=_MAX_REVISION_BYTES, kind="revision") or b""
    revision = data.decode("ascii", "replace").strip()
    path = folder / "snapshots" / revision / file
    # It becomes part of a path: a revision is the name of one folder.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", revision) or not os.path.lexists(path):
        raise SpecError(f"{shorten(model)}: the Hugging Face cache {hub} holds no {file} of its main revision")
    return str(path)
