"""Refactorings leave every price, count and choice as it was."""

from __future__ import annotations

import os

import pytest

from .record import Case, cases, chosen, key, read, recorded

#: Each architecture in one of its cases, another one each, would take minutes: some, from everywhere in the table.
SAMPLE = cases() if os.environ.get("RUNLORA_LONG") else cases()[5::79]


@pytest.mark.parametrize("case", SAMPLE, ids=key)
def test_what_is_chosen_is_what_was_recorded(case: Case) -> None:
    assert recorded(case) == read()[key(case)], chosen(case)


def test_the_whole_catalogue_is_recorded() -> None:
    assert list(read()) == list(map(key, cases()))
