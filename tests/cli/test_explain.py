"""The readable form of ``explain``: what is shown, and that it is true."""

from __future__ import annotations

import json
import re

import pytest

SPEC = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "8", "--tokens", "4096")
#: With adapters in the activations' dtype, of which no casts are kept or not kept, there are fewer programs.
NARROW = ("--adapter-dtype", "bf16")


@pytest.fixture(scope="module")
def layer(run) -> dict:
    (layer,) = json.loads(run("explain", *SPEC, *NARROW, "--json").ok().out)["layers"]
    return layer


def rows(text: str) -> dict[str, str]:
    """Table rows by the variant's id."""
    return {match[2]: match[0] for match in re.finditer(r"^([→ ][* ]) +(\S+/\S+/keep-\S+).*$", text, re.M)}


def test_shows_the_front_the_paper_s_and_the_chosen(run, layer: dict) -> None:
    text = run("explain", *SPEC, *NARROW).ok().out
    shown = rows(text)
    expected = {v["id"] for v in layer["variants"] if v["pareto"] or v["paper"] or v["id"] == layer["chosen"]}
    assert set(shown) == expected and len(expected) >= 24
    for variant in layer["variants"]:
        if variant["id"] in shown:
            row = shown[variant["id"]]
            assert (row[0] == "→") == (variant["id"] == layer["chosen"])
            assert (row[1] == "*") == variant["pareto"]
            assert f" {variant['launches']} " in row
            assert f"{variant['time_us']:,.1f}" in row
            if variant["paper"]:
                assert variant["paper"].replace("forward2/", "forward2|4/") in row
    assert f"→ chosen: {layer['chosen']} " in text
    assert text.count("→") == 2 and "the runner-up lost: " in text
    assert "128x128  rank 8  (q_proj; " in text and "4096 tokens, bf16, NVIDIA H100" in text


def test_all_shows_every_program_by_time(run, layer: dict) -> None:
    shown = rows(run("explain", *SPEC, *NARROW, "--all").ok().out)
    assert set(shown) == {v["id"] for v in layer["variants"]} and len(shown) == 310
    times = {v["id"]: v["time_us"] for v in layer["variants"]}
    assert [times[i] for i in shown] == sorted(times.values())


def test_json_is_the_same_with_all(run) -> None:
    assert run("explain", *SPEC, "--json", "--all").ok().out == run("explain", *SPEC, "--json").ok().out


def test_says_what_runs_on_16_bit_weights(run) -> None:
    text = run("explain", *SPEC, "--dtype", "fp32", "--device", "cpu").ok().out
    assert re.search(r"→ chosen: merged/.*\n.*\n.*\n  on 16-bit weights: (?!merged)\S+/keep-", text)


def test_no_line_is_cut_and_nothing_is_coloured_in_a_pipe(run) -> None:
    text = run("explain", "--arch", "llama-3.1-405b", "--rank", "8", "--all", *NARROW).ok().out
    assert "\x1b" not in text and "…" not in text
    programs = {name.split("/kernel-")[0] for name in rows(text)}
    assert len(programs) == 310  # the same for each shape, some with kernels for single products
    assert max(map(len, text.splitlines())) <= 180
