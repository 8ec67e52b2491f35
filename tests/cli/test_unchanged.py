"""A run that finds what it would write: an installed generator chooses nothing anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.emit import package, render

from ..conftest import Run

OUT = "llama_9m_r4"


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that were chosen for, by a generator that is installed."""
    ranks: list[int] = []
    real = package.decide_model

    def decide_model(workload: Any, sites: Any, rank: int) -> Any:
        ranks.append(rank)
        return real(workload, sites, rank)

    monkeypatch.setattr(package, "decide_model", decide_model)
    monkeypatch.setattr(render, "is_installed", lambda: True)
    return ranks


def test_nothing_is_chosen_and_nothing_written(
    run: Run, small: tuple[str, ...], fresh: Path, tree: Callable[[Path], Any], chosen: list[int]
) -> None:
    before = tree(fresh)
    assert run(*small, "-o", fresh).ok().out == f"{fresh / OUT}: 1 modules, up to date\n"
    assert run(*small, "-o", fresh, "--dry-run").ok().out == f"{fresh / OUT}: 1 modules, up to date\n"
    assert not chosen and tree(fresh) == before


def test_a_checkout_and_who_asks_what_was_chosen_choose(
    run: Run, small: tuple[str, ...], fresh: Path, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*small, "-o", fresh, "--check").ok().out == ""
    assert "128x128" in run(*small, "-o", fresh, "-v").err
    assert chosen == [4, 4]
    monkeypatch.setattr(render, "is_installed", lambda: False)
    run(*small, "-o", fresh).ok()
    assert chosen == [4, 4, 4]


def edited(fresh: Path) -> None:
    module = next((fresh / OUT).glob("linear_*.py"))
    module.write_text(module.read_text().replace("\nRANK = 4\n", "\nRANK = 5\n"))


def removed(fresh: Path) -> None:
    (fresh / OUT / "py.typed").unlink()


def styled(fresh: Path) -> None:
    (fresh / "pyproject.toml").write_text("[tool.black]\nskip-string-normalization = true\n")


def of_another_version(fresh: Path) -> None:
    manifest = fresh / OUT / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"generator_version": "', '"generator_version": "0'))


@pytest.mark.parametrize("change", [edited, removed, styled, of_another_version])
def test_what_is_not_as_it_was_written_is_written_anew(
    run: Run, small: tuple[str, ...], fresh: Path, chosen: list[int], change: Callable[[Path], None]
) -> None:
    change(fresh)
    assert "wrote" in run(*small, "-o", fresh).ok().out
    assert chosen == [4]
    assert "up to date" in run(*small, "-o", fresh).ok().out
    assert chosen == [4]


@pytest.mark.parametrize(
    "options",
    [
        ("--line-length", "100"),
        ("--all-variants",),
        ("--layout", "folder"),
        ("--criterion", "memory"),
        ("--tokens", "8k"),
        ("--dropout", "0.1"),
    ],
    ids=" ".join,
)
def test_what_is_asked_for_now_counts(
    run: Run, small: tuple[str, ...], fresh: Path, chosen: list[int], options: tuple[str, ...]
) -> None:
    for done in ("wrote", "up to date"):
        assert done in run(*small, *options, "-o", fresh).ok().out
    assert chosen == [4]


def test_of_several_packages_those_that_differ_are_made(
    run: Run, small: tuple[str, ...], fresh: Path, chosen: list[int]
) -> None:
    both = (*small, "--rank", "8")
    run(*both, "-o", fresh).ok()
    assert chosen == [8]
    shutil.rmtree(fresh / "llama_9m_r8")
    lines = run(*both, "-o", fresh).ok().out.splitlines()
    assert lines[0] == f"{fresh / OUT}: 1 modules, up to date"
    assert lines[1].startswith(f"{fresh / 'llama_9m_r8'}: 1 modules, wrote ")
    assert chosen == [8, 8]
