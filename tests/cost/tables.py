"""Tables as the files of device profiles have them."""

from __future__ import annotations


def times(key: str, *lines: str) -> str:
    """What was measured of a kind of work."""
    return f"\"{key}\" = '''\n" + "".join(f"{line}\n" for line in lines) + "'''\n"


def tiles(constants: str, best: str = "0", key: str = "p_db: TO,OR->TR scaled; TO,TR->OR") -> str:
    """The best constants of a kernel in bf16, where all dimensions are 1."""
    return f'[tiles.bf16."{key}"]\nconstants = [{constants}]\n' + times("best", "T 1", "R 1", f"1 {best}")
