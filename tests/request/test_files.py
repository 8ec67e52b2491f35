"""What is read from outside: only regular files, only up to a limit, and every refusal is one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runlora_gen.request import files
from runlora_gen.request.errors import SpecError
from runlora_gen.request.files import is_plain, read_if_there, read_text

WHAT = {"label": "--it: 'x'", "limit": 10, "kind": "thing"}


def test_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("é\r\n".encode())
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_if_there(tmp_path / name, **WHAT) == "é\r\n".encode()
        assert read_text(tmp_path / name, **WHAT) == "é\r\n"


@pytest.mark.parametrize("name", ["missing", "file/x", "dangling", "nul\0", "surrogate\ud800"], ids=ascii)
def test_what_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_if_there(tmp_path / name, **WHAT) is None
    with pytest.raises(SpecError, match=r"^--it: 'x': cannot be read: No such file or directory$"):
        read_text(tmp_path / name, **WHAT)
    assert is_plain(tmp_path / name) is (False if name == "dangling" else None)


@pytest.mark.parametrize("read", [read_text, read_if_there])
def test_what_is_no_file(tmp_path: Path, odd: Callable[[Path], None], read: Callable[..., object]) -> None:
    odd(tmp_path / "odd")
    with pytest.raises(SpecError, match=r"^--it: 'x': not a regular file$"):
        read(tmp_path / "odd", **WHAT)
    assert is_plain(tmp_path / "odd") is False


@pytest.mark.parametrize("size", [10, 11, 2**40])
def test_limit(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", size)  # of which the disk holds nothing
    if size <= 10:
        assert read_if_there(tmp_path / "file", **WHAT) == bytes(size)
    else:
        with pytest.raises(SpecError, match=r"^--it: 'x': larger than 10 bytes, which no thing is$"):
            read_if_there(tmp_path / "file", **WHAT)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_limit_of_files_that_state_no_size() -> None:
    with pytest.raises(SpecError, match="larger than 10 bytes"):
        read_if_there("/proc/self/maps", **WHAT)


@pytest.mark.parametrize("call", ["open", "stat"])
def test_what_cannot_be_read(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/secret")

    monkeypatch.setattr(files if call == "open" else os, call, fail, raising=False)
    for read in (read_text, read_if_there):
        with pytest.raises(SpecError, match=r"^--it: 'x': cannot be read: Permission denied$"):
            read(tmp_path / "file", **WHAT)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(SpecError, match=r"^--it: 'x': not UTF-8 text \(byte 2\)$"):
        read_text(tmp_path / "file", **WHAT)


def test_a_link_is_not_plain(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert is_plain(tmp_path / "file") is True and is_plain(tmp_path / "link") is False
