"""The documents quote only what the result files hold."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.work import work
from runlora_gen.cost.profile import parse_toml, read_profile

ROOT = Path(__file__).parents[1]
DEVICES = ROOT / "generator" / "runlora_gen" / "cost" / "devices"
README = "".join(
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/benchmarks.md", "docs/module.md", "docs/with-peft.md")
)
CONTENDERS = (
    "peft fp32 adapters, autocast",
    "peft",
    "peft compiled",
    "axolotl",
    "LoRAFusion",
    "paper's best",
    "generated, torch only",
)


def results(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "tools" / "results" / name).read_text(encoding="utf-8"))
    return data


def over_frozen(result: dict[str, Any], mode: str) -> str:
    return f"{result[mode]['over_frozen']['median']:.2f}"


@pytest.mark.parametrize(("mode", "ours"), [("graph", "generated"), ("eager", "generated for eager")])
def test_the_gpu_tables(mode: str, ours: str) -> None:
    for row in results("linear_h100_bf16_r16.json")["rows"]:
        cells = [over_frozen(row["results"][name], mode) for name in (*CONTENDERS, f"{ours}, 16-bit adapters")]
        line = " | ".join([f"| {row['tokens']}, {row['shape'].replace('x', '→')}", *cells])
        assert f"{line} | **{over_frozen(row['results'][ours], mode)}** |" in README


def test_the_table_of_dropout() -> None:
    ours = ("generated, torch only", "generated, 16-bit adapters")
    for row in results("linear_h200_dropout.json")["rows"]:
        cells = [over_frozen(row["results"][name], "graph") for name in ("peft fp32 adapters, autocast", "peft", *ours)]
        line = " | ".join([f"| {row['tokens']}, {row['shape'].replace('x', '→')}", *cells])
        assert f"{line} | **{over_frozen(row['results']['generated'], 'graph')}** |" in README


def test_the_table_of_groups() -> None:
    for row in results("group_h100.json")["rows"]:
        if row["rank"] == 16:
            tokens, shape = row["group"].split(":")
            apart, together = (over_frozen(row["results"][name], "graph") for name in ("ours, one by one", "ours"))
            cells = [f"{tokens}, {shape.replace('x', '→')}", over_frozen(row["results"]["peft"], "graph"), apart]
            peaks = [f"{row['results'][name]['peak_bytes'] / 2**20:.0f}" for name in ("frozen", "peft", "ours")]
            assert f"| {' | '.join(cells)} | **{together}** | {' | '.join(peaks)} |" in README


def test_the_table_of_projections_of_experts() -> None:
    for row in results("experts_h100.json")["rows"]:
        what = "tokens to rows" if row["site"].startswith("gathered") else "rows to tokens"
        _, in_features, out_features = row["site"].rpartition("_")[2].split("x")

        def cell(title: str, mode: str, row: dict[str, Any] = row) -> str:
            found = row["results"][title][mode]
            return f"{found['over_frozen']['median']:.2f} ({found['over_products']['median']:.2f})"

        line = f"| {what}, {in_features}→{out_features} | {row['load']} | {cell('split', 'graph')} "
        assert f"{line}| **{cell('generated', 'graph')}** | {cell('generated', 'forward')} |" in README


def test_the_tables_of_models_with_experts() -> None:
    titles = {"frozen": "frozen", "PEFT": "PEFT, 16-bit adapters", "**ours**": "ours, 16-bit adapters"}
    peft_s, ours = (results(f"model_experts_{name}h100.json")["rows"] for name in ("", "chain_"))
    for called, title in titles.items():
        cells = []
        for row in peft_s if called == "PEFT" else ours:
            found = row["results"][title]
            cells += [over_frozen(found, "eager"), over_frozen(found, "compiled")]
            cells.append(f"{found['compiled']['peak_bytes'] / 2**20:.0f} MiB")
        assert f"| {called} | {' | '.join(cells)} |" in README
    apart = "ours, projections of experts apart"
    for row, shape in zip(ours, ("Qwen3-30B-A3B, 2 layers: ", "gpt-oss-20b, 2 layers: "), strict=True):
        for mode in ("eager", "compiled", "checkpointing"):
            ways = [row["results"][name] for name in (apart, "ours", titles["**ours**"])]
            ratios = "{} | **{}** | **{}**".format(*(over_frozen(way, mode) for way in ways))
            peaks = [f"{way[mode]['peak_bytes'] / 2**20:.0f}" for way in (row["results"]["frozen"], *ways)]
            begins = shape if mode == "eager" else "… "
            assert f"| {begins}{mode} | {ratios} | {', '.join(peaks)} MiB |" in README
    (alone,) = results("model_experts_alone_h100.json")["rows"]
    named = ("frozen", "PEFT, 16-bit adapters", f"{apart.replace('ours', 'ours for graphs')}", "ours")
    needs = "{:.1f} ms for the frozen eager step, {:.1f} for PEFT's, {:.1f} apart and {:.1f} as a chain"
    assert needs.format(*(alone["results"][name]["device_ms"] for name in named)) in " ".join(README.split())
    eager = over_frozen(peft_s[0]["results"][titles["PEFT"]], "eager")
    assert (
        f"PEFT took {eager} eagerly and {over_frozen(peft_s[0]['results'][titles['PEFT']], 'compiled')} compiled"
        in README
    )
    (row,) = results("model_experts_rivals_h100.json")["rows"]
    peft, axolotl, ours = (
        row["results"][f"{name}, 16-bit adapters"] for name in ("PEFT", "axolotl's ScatterMoE", "ours")
    )
    for mode in ("eager", "checkpointing"):
        wide = over_frozen(row["results"]["ours"], mode)
        peaks = [f"{each[mode]['peak_bytes'] / 2**20:.0f}" for each in (row["results"]["frozen"], peft, axolotl, ours)]
        line = f"| {mode} | {over_frozen(peft, mode)} | {over_frozen(axolotl, mode)} "
        line += f"| **{over_frozen(ours, mode)} ({wide})**"
        assert f"{line} | {', '.join(peaks)} MiB |" in README


def test_experts_on_an_h200() -> None:
    modes, said = ("eager", "compiled", "checkpointing"), " ".join((ROOT / "README.md").read_text("utf-8").split())
    rows = [row["results"] for row in results("model_experts_h200.json")["rows"]]
    for found, shape in zip(rows, ("Qwen3-30B-A3B", "gpt-oss-20b"), strict=True):
        peft, narrow, wide = (found[name] for name in ("PEFT, 16-bit adapters", "ours, 16-bit adapters", "ours"))
        assert f"| {shape}: PEFT | {' | '.join(over_frozen(peft, mode) for mode in modes)} | |" in README
        cells = [f"**{over_frozen(narrow, mode)} ({over_frozen(wide, mode)})**" for mode in modes]
        peaks = ", ".join(mib(each["eager"]) for each in (found["frozen"], peft, narrow))
        assert f"| … **ours** | {' | '.join(cells)} | {peaks} MiB |" in README
    eager, compiled = (
        " and ".join(over_frozen(found["ours, 16-bit adapters"], mode) for found in rows) for mode in modes[:2]
    )
    assert f"ours takes {eager} eagerly, {compiled} compiled" in said
    spread = rows[0]["ours, 16-bit adapters"]["compiled"]["over_frozen"]
    assert f"which scatters ({spread['min']:.2f} to {spread['max']:.2f})" in " ".join(README.split())


def test_the_table_of_options_of_groups() -> None:
    options = ((16, "bf16", 0.0), (16, "fp32", 0.0), (16, "bf16", 0.05), (128, "bf16", 0.0))
    cells: dict[str, dict[tuple[int, str, float], str]] = {}
    for row in results("group_h100_options.json")["rows"]:
        ours, peft = (over_frozen(row["results"][name], "graph") for name in ("ours", "peft"))
        case = (row["rank"], row["adapter_dtype"], row["dropout"])
        cells.setdefault(row["group"], {})[case] = f"**{ours}** ({peft})"
    for group, found in cells.items():
        tokens, shape = group.split(":")
        line = " | ".join([f"{tokens}, {shape.replace('x', '→')}", *(found[option] for option in options)])
        assert f"| {line} |" in README


def test_ranks_with_dropout() -> None:
    said = " ".join(README.split())
    rows = results("linear_h100_dropout_ranks.json")["rows"]
    ranks = [
        ", ".join(
            over_frozen(row["results"]["generated, 16-bit adapters"], "graph") for row in rows if row["rank"] == rank
        )
        + f" at rank {rank}"
        for rank in (8, 64, 128)
    ]
    assert f"with 16-bit adapters: {', '.join(ranks)} (" in said
    former = [
        over_frozen(row["results"]["generated, 16-bit adapters"], "graph")
        for row in results("linear_h100_dropout.json")["rows"]
    ]
    assert "(at rank 16 {}, {} and {} there: ".format(*former) in said


def test_models_with_groups() -> None:
    rows = {row["shape"]: row["results"] for row in results("model_groups_h100.json")["rows"]}
    together, apart = "ours, 16-bit adapters", "ours none"
    said = " ".join(README.split())

    def pair(name: str, mode: str) -> str:
        return " and ".join(over_frozen(rows[shape][name], mode) for shape in ("13b", "8b"))

    eager = [over_frozen(rows[shape][together], "eager") for shape in ("13b", "8b")]
    assert f"in eager mode {eager[0]} (13B-shaped) and {eager[1]} (8B-shaped) of the frozen" in said
    one_by_one = ", ".join(pair(apart, mode) for mode in ("eager", "checkpointing", "compiled"))
    assert (
        f"with checkpointing {pair(together, 'checkpointing')}, compiled {pair(together, 'compiled')}; with "
        f"`--groups none` {one_by_one} (" in said
    )
    former = {row["shape"]: row["results"][together] for row in results("model_h100.json")["rows"]}
    before = " and ".join(over_frozen(former[shape], "checkpointing") for shape in ("13b", "8b"))
    assert f"With checkpointing they took {before} one by one (" in said
    for mode in ("eager", "checkpointing", "compiled"):
        for shape in ("13b", "8b"):
            assert rows[shape][together][mode]["peak_bytes"] == rows[shape][apart][mode]["peak_bytes"]
    peaks = " and ".join(f"{rows[shape][together]['compiled']['peak_bytes'] / 2**20:.0f}" for shape in ("13b", "8b"))
    assert f"Both have the same peaks; compiled {peaks} MiB" in said


def test_models_of_4_bits() -> None:
    (row,) = results("model_nf4_h100.json")["rows"]
    said = " ".join(README.split())
    for name, result in row["results"].items():
        if name == "frozen":
            continue
        modes = ("eager", "compiled", "checkpointing")
        cells = " | ".join(over_frozen(result, mode) if mode in result else "–" for mode in modes)
        label = f"**{name}**" if name == "ours" else name
        assert f"| {label} | {cells} | {result['eager']['peak_total_bytes'] / 2**20:.0f} MiB |" in README
    ours, theirs = (row["results"][name] for name in ("ours", "PEFT default (fp32 adapters, autocast)"))
    pair = [(over_frozen(ours, mode), over_frozen(theirs, mode)) for mode in ("eager", "checkpointing")]
    assert (
        f"took {pair[0][0]} of the frozen step in eager mode and {pair[1][0]} with checkpointing, PEFT's default "
        f"{pair[0][1]} and {pair[1][1]} (" in said
    )


def test_shards_of_4_bits() -> None:
    found = results("sharded_h100.json")["results"]
    frozen, peft, ours = (found[name] for name in ("frozen", "PEFT, 16-bit adapters", "ours, 16-bit adapters"))
    shown, other = (f"{result['over_frozen']['median']:.2f}" for result in (ours, peft))
    peaks = [f"{result['peak_bytes'] / 2**20:.0f} MiB" for result in (ours, frozen)]
    assert ours["peak_bytes"] == pytest.approx(peft["peak_bytes"], rel=1e-3)
    said = " ".join(README.split())
    assert (
        f"ours takes {shown} of the frozen step, PEFT {other}; peak of a process {peaks[0]} both, frozen {peaks[1]}."
        in said
    )


def test_linears_of_4_bits() -> None:
    for row in results("quantized_h100.json")["rows"]:

        def cell(name: str, mode: str = "graph", of: Any = row["results"]) -> str:
            over, own = (of[name][mode][key]["median"] for key in ("over_frozen", "over_own"))
            return f"{over:.2f} ({own:.2f})"

        cells = [f"{row['tokens']}, {row['shape'].replace('x', '→')}", cell("peft"), cell("peft fp32 adapters")]
        cells += [f"**{cell('generated')}**", cell("in_pass, fused"), cell("in_pass, in_pass")]
        assert f"| {' | '.join([*cells, cell('generated', 'forward')])} |" in README
    small, large = (results("quantized_h100.json")["rows"][at]["kernels"] for at in (1, 2))
    library = " | ".join(f"{kernels['bitsandbytes']['median_us']:.1f} µs" for kernels in (small, large))
    assert f"| bitsandbytes makes W | {library} |" in README
    for name in ("dequantize", "dequantize_merged"):
        times, over = ([kernels[name][key] for kernels in (small, large)] for key in ("median_us", "over_bytes"))
        ends = (" of the time of its bytes" if name == "dequantize" else "", "")
        cells = [f"{time:.1f} µs, {ratio:.2f}{end}" for time, ratio, end in zip(times, over, ends, strict=True)]
        assert f"| `{name}` | {' | '.join(cells)} |" in README


#: The bases of 8 bits, with what their file calls the modules that are generated by default.
EIGHT_BITS = {"fp8": "generated, float8 both", "fp8_block": "generated", "int8": "generated"}


def eight_bits(base: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results(f"{base}_h100.json")["rows"]
    return rows


def test_linears_of_8_bits() -> None:
    def cell(of: dict[str, Any], name: str) -> str:
        over, own = (of["results"][name]["graph"][key]["median"] for key in ("over_frozen", "over_own"))
        return f"{over:.2f} ({own:.2f})"

    for fp8, block, int8 in zip(*map(eight_bits, EIGHT_BITS), strict=True):
        cells = [f"{fp8['tokens']}, {fp8['shape'].replace('x', '→')}", cell(fp8, "peft on bf16")]
        cells += [f"**{cell(fp8, 'generated, float8 both')}**"]
        cells += [cell(fp8, f"generated, float8 {way}") for way in ("forward", "none")]
        assert f"| {' | '.join([*cells, cell(block, 'generated'), cell(int8, 'generated')])} |" in README
    said = " ".join(README.split())
    alone = [
        ", ".join(over_frozen(row["results"][name], "forward") for row in eight_bits(base))
        for base, name in EIGHT_BITS.items()
    ]
    eager = ", ".join(over_frozen(row["results"][EIGHT_BITS["fp8"]], "eager") for row in eight_bits("fp8"))
    assert (
        f"a forward alone takes {alone[0]} (`fp8`), {alone[1]} (`fp8-block`) and {alone[2]} (`int8`), and an eager "
        f"step on `fp8` {eager}: " in said
    )
    rates = [row["kernels"]["torch._scaled_mm"]["tflops"] for row in eight_bits("fp8")]
    assert f"by itself runs at {rates[0]}, {rates[1]} and {rates[2]} TFLOP/s" in said
    square, wide = (over_frozen(row["results"][EIGHT_BITS["fp8"]], "graph") for row in eight_bits("fp8")[1:])
    assert f"one linear {square} to {wide} (" in said


def test_models_of_float8() -> None:
    (row,) = results("model_fp8_h100.json")["rows"]
    said, modes = " ".join(README.split()), ("eager", "compiled", "checkpointing")
    shown = {"PEFT default (fp32 adapters, autocast)": "PEFT default (fp32 adapters, autocast)"}
    for name, label in {**shown, "ours for graphs": "**ours on fp8**"}.items():
        result = row["results"][name]
        cells = " | ".join(over_frozen(result, mode) for mode in modes)
        assert f"| {label} | {cells} | {result['eager']['peak_total_bytes'] / 2**20:.0f} MiB |" in README
    ours = row["results"]["ours for graphs"]
    ratios = "{}, {} and {}".format(*(over_frozen(ours, mode) for mode in modes))
    assert f"ours takes {ratios} of the **frozen bf16** step" in said
    off = ours["deviation"]
    gradients = sorted(round(100 * off[name]) for name in ("dX", "dA", "dB"))
    assert f"off by {100 * off['output']:.1f} % of its size, gradients by {gradients[0]} to {gradients[-1]} %" in said


def test_losses_on_quantized_bases() -> None:
    on = {"nf4": ", on bitsandbytes' linears", "int8": ", on bitsandbytes' linears"}
    for base in ("nf4", "int8", "fp8"):
        runs = results(f"train_{base}_h100.json")["runs"]
        theirs, ours = (runs[name]["losses"] for name in ("peft", "ours"))
        assert len(theirs) == len(ours) == 300
        last = [f"{statistics.mean(losses[-50:]):.4f}" for losses in (theirs, ours)]
        apart = statistics.mean(b - a for a, b in zip(theirs, ours, strict=True))
        label = f"`{base}`{on.get(base, ', PEFT on the same weights in bf16')}"
        assert f"| {label} | {' | '.join(last)} | {apart:+.4f} |".replace("-0", "−0") in README
    assert abs(float(last[1]) / float(last[0]) - 1) < 0.002, "as the documents say"


def test_errors_on_8_bits() -> None:
    def span(found: list[dict[str, Any]], *names: str) -> str:
        errors = [result["error"][name] * 100 for result in found for name in names]
        low, high = f"{min(errors):.2f}", f"{max(errors):.2f}"
        return f"{low} %" if low == high else f"{low} to {high} %"

    both, forward, none = (
        [row["results"][f"generated, float8 {way}"] for row in eight_bits("fp8")] for way in ("both", "forward", "none")
    )
    none += [row["results"]["generated"] for base in ("fp8_block", "int8") for row in eight_bits(base)]
    for label, found in (
        ("`fp8`", both),
        ("`fp8`, `--float8 forward`", forward),
        ("in 16 bits, all bases", none),
    ):
        assert f"| {label} | {span(found, 'Y')} | {span(found, 'dX')} | {span(found, 'dA', 'dB')} |" in README
    assert f"Y and dX are off by {span(both, 'Y')} of their size" in " ".join(README.split())


def test_bitsandbytes_of_8_bits() -> None:
    names = ("bitsandbytes, frozen", "peft on bitsandbytes", "generated")
    for row in eight_bits("int8"):
        *others, ours = (over_frozen(row["results"][name], "eager") for name in names)
        peaks = (f"{row['results'][name]['peak_bytes'] / 2**20:.0f}" for name in names)
        cells = [f"{row['tokens']}, {row['shape'].replace('x', '→')}", *others, f"**{ours}**", *peaks]
        assert f"| {' | '.join(cells)} |" in README


@pytest.mark.parametrize("name", ["rescale", "rescale_merged"])
def test_weights_of_8_bits(name: str) -> None:
    for at in (1, 2):
        found = [eight_bits(base)[at] for base in EIGHT_BITS]
        kernels = [row["kernels"][name] for row in found]
        cells = [f"{kernel['median_us']:.1f} µs, {kernel['over_bytes']:.2f}" for kernel in kernels]
        assert f"| `{name}`, {found[0]['shape'].replace('x', '×')} | {' | '.join(cells)} |" in README


def test_models_with_dropout() -> None:
    rows = {row["shape"]: row["results"] for row in results("model_dropout_h100.json")["rows"]}
    peft, ours = ("PEFT, 16-bit adapters, dropout 0.05", "ours for graphs, 16-bit adapters, dropout 0.05")

    def pair(shape: str, mode: str) -> tuple[str, str]:
        mine, theirs = (over_frozen(rows[shape][name], mode) for name in (ours, peft))
        return mine, theirs

    text = " ".join(README.split())
    (eager, peft_eager), (compiled, peft_compiled) = pair("13b", "eager"), pair("13b", "compiled")
    assert (
        f"took {eager} of the frozen step in eager mode and {compiled} compiled, PEFT's {peft_eager} and "
        f"{peft_compiled}" in text
    )
    assert (
        f"13B-shaped {eager} of the frozen step, PEFT's {peft_eager}; 8B-shaped {' and '.join(pair('8b', 'eager'))}. "
        f"Compiled {compiled} and {peft_compiled}, and {' and '.join(pair('8b', 'compiled'))} (" in text
    )

    def share(shape: str, mode: str) -> str:
        mine, theirs = (rows[shape][name][mode]["peak_total_bytes"] for name in (ours, peft))
        return f"{100 * mine / theirs:.0f} %"

    assert f"The peak is {share('13b', 'eager')} of PEFT's for the 13B-shaped model in eager mode and " in text
    assert f" and {share('13b', 'compiled')} compiled, for the 8B-shaped one {share('8b', 'eager')} and " in text
    assert f"one {share('8b', 'eager')} and {share('8b', 'compiled')}." in text
    first, *_ = results("linear_h200_dropout.json")["rows"]
    kept = {name: f"{result['saved_bytes'] / 2**20:.1f}" for name, result in first["results"].items()}
    assert f"At 4096 tokens {kept['generated, 16-bit adapters']} MiB are kept" in text
    assert f"PEFT keeps {kept['peft']}." in text


def test_other_ranks() -> None:
    rows = {(row["rank"], row["shape"]): row["results"] for row in results("linear_h100_bf16_ranks.json")["rows"]}
    contenders = ("generated", "generated, 16-bit adapters", "generated, torch only", "axolotl", "peft")
    for rank in (8, 64, 128):
        cells = []
        for shape in ("5120x5120", "5120x13824"):
            ours, *others = (over_frozen(rows[rank, shape][name], "graph") for name in contenders)
            cells.append(f"**{ours}** ({'; '.join(others)})")
        assert f"| {rank} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("name", ["linear_h100_bf16_r16.json", "linear_h100_bf16_ranks.json"])
def test_nothing_got_slower(name: str) -> None:
    """Beside the modules of the release before: with 16-bit adapters as fast, with float32 ones slower by two casts."""
    for row in results(name)["rows"]:
        former, narrow, ours = (
            row["results"][contender]["graph"]["over_frozen"]["median"]
            for contender in ("former", "generated, 16-bit adapters", "generated")
        )
        # The same module twice in a run is up to 0.014 from itself.
        assert narrow < former + 0.02 and ours < former + 0.035


def test_a_step_of_a_model() -> None:
    names = {"13b": "Llama-13b", "8b": "Llama-3-8b", "1b": "Llama-3.2-1b"}
    contenders = ("generated", "generated for graphs", "generated, torch only")
    for row in results("step_h100.json")["rows"]:
        rows, frozen = row["results"], row["results"]["frozen"]
        device = (f"{rows[name]['device_ms'] / frozen['device_ms']:.2f}" for name in contenders)
        model = f"{names[row['shape']]}, {row['layers']} layers, {row['batch'] * row['sequence']}, {row['rank']}"
        cells = [
            model,
            f"{frozen['eager']['median_ms']:.1f} ms",
            *(over_frozen(rows[name], "eager") for name in contenders),
            ", ".join(device),
        ]
        assert f"| {' | '.join(cells)} |" in README


def test_the_cpu_table() -> None:
    rows = results("linear_cpu_llama_250m_fp32.json")["rows"]
    for row in rows:
        ours, peft = row["results"]["generated"], row["results"]["peft"]
        cells = [
            row["shape"],
            str(row["rank"]),
            f"{ours['eager']['over_peft']['median']:.2f}",
            f"{over_frozen(ours, 'eager')} ({over_frozen(peft, 'eager')})",
            *(f"{ours[k] / 2**20:.1f} ({peft[k] / 2**20:.1f})" for k in ("saved_bytes", "peak_bytes")),
        ]
        assert f"| {' | '.join(cells)} |" in README
    mean = sum(row["results"]["generated"]["eager"]["over_peft"]["median"] for row in rows) / len(rows)
    assert f"On average {mean:.2f} of PEFT's time" in README


def test_decoding_is_no_slower_than_the_plain_formula() -> None:
    rows = results("linear_cpu_llama_250m_decode.json")["rows"]
    assert {row["tokens"] for row in rows} == {1, 16, 128}
    worst = max(row["results"]["generated"]["eager"]["over_plain"]["median"] for row in rows)
    assert worst <= 1.05
    assert f"they take at most {worst:.2f} of the plain formula's time" in " ".join(README.split())


def test_the_mutants() -> None:
    counts = results("mutants.json")["counts"]
    assert f"of {sum(counts.values())} defects {counts['killed']} are found" in " ".join(README.split())


def test_memory_of_a_step() -> None:
    (row,) = (r for r in results("linear_h100_bf16_r16.json")["rows"] if r["shape"] == "5120x13824")
    ours, frozen, peft, default, compiled = (
        round(row["results"][name]["peak_bytes"] / 2**20)
        for name in ("generated", "frozen", "peft", "peft fp32 adapters, autocast", "peft compiled")
    )
    text = f"{ours} MiB, the frozen linear's {frozen}, PEFT's {peft} ({default} by default, {compiled} compiled)"
    assert text in " ".join(README.split())
    assert (
        f"the input, S and the adapter's casts, {row['results']['generated']['saved_bytes'] / 2**20:.1f} MiB" in README
    )


def test_the_generator_s_time() -> None:
    measured = results("generator_cpu.json")["results"]
    cold, known, unchanged = (measured[name]["median_s"] for name in ("cold", "formatted before", "unchanged"))
    said = (
        f"The generator itself takes {cold:.2f} s for `llama-13b`, {known:.2f} s where its functions were formatted "
        f"before, for another package or in another process, {unchanged:.2f} s where nothing changed"
    )
    assert said in " ".join(README.split())


def test_the_ablations() -> None:
    document = (ROOT / "docs" / "cost-model.md").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in document if re.match(r"\| (split|merged|full|fused)[, ]", line)]
    expected = []
    for name in ("ablation_h200_bf16.json", "ablation_cpu_fp32.json"):
        shapes = results(name)["rows"].values()
        for variant in (name for name in next(iter(shapes)) if name != "frozen linear"):
            cells = [
                f"{r['over_frozen']:.2f} · {r['saved_bytes'] / 2**20:.0f} · {r['peak_bytes'] / 2**20:.0f}"
                for r in (shape[variant] for shape in shapes)
            ]
            expected.append(f"| {variant} | {' | '.join(cells)} |")
    assert quoted == expected


def test_the_kernels_times_are_those_of_the_profile() -> None:
    path = DEVICES / "h200.toml"
    profile = read_profile(parse_toml(path.read_bytes()))
    document = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")

    def us(formula: str, *at: int) -> float:
        return profile.times["bf16"][work(LINEAR.parse(formula))][at]

    def show(value: float) -> str:
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"

    def read(rows: int, columns: int) -> float:
        return rows * columns * 2 / profile.memory_gb_per_s / 1e3

    r = 16
    for t, i, o in (
        (2048, 5120, 5120),
        (4096, 5120, 5120),
        (16384, 5120, 5120),
        (8192, 5120, 13824),
        (8192, 13824, 5120),
    ):
        two = us("P = s * dY @ B", t, o, r) + us("dB = dY.T @ S", t, o, r)
        forward = us("Y = S @ B.T + b", t, o, r) + us("Y += X @ W.T", t, i, o)
        backward = us("dX = P @ A", t, i, r) + us("dX += dY @ W", t, i, o)
        cells = (
            f"{t}, {i}→{o}",
            f"{show(read(t, i))}, {show(read(t, o))}",
            f"{show(us('x_at: S = s * X @ A.T', t, i, r))} ({show(us('S = s * X @ A.T', t, i, r))})",
            f"{show(us('pt_x: dA = P.T @ X', t, i, r))} ({show(us('dA = P.T @ X', t, i, r))})",
            f"{show(us('p_db: P = s * dY @ B; dB = dY.T @ S', t, o, r))} ({show(two)})",
            f"{show(us('fused_gemm: Y = S @ B.T + b; Y += X @ W.T', t, i, o, r))} "
            f"({show(us('Y = X @ W.T + b', t, i, o))}, {show(forward)})",
            f"{show(us('fused_gemm: dX = P @ A; dX += dY @ W', t, i, o, r))} "
            f"({show(us('dX = dY @ W', t, i, o))}, {show(backward)})",
        )
        assert f"| {' | '.join(cells)} |" in document
    for i, o in ((5120, 5120), (5120, 13824)):
        merge, plain = (round(us(f"{kernel}M = W + s * B @ A", i, o, r)) for kernel in ("merge: ", ""))
        assert f"{merge} µs for {i}×{o} (torch {plain}, limit {round(2 * read(o, i))})" in document


def test_the_table_of_a_profile() -> None:
    document = (ROOT / "docs" / "cost-model.md").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"```toml\n(.+?)…\n```", document, re.DOTALL)
    path = DEVICES / "h200.toml"
    assert quoted.count("\n") == 4 and quoted in path.read_text(encoding="utf-8")


def mib(measured: dict[str, Any]) -> str:
    return f"{measured['peak_bytes'] / 2**20:.0f}"


def test_the_table_of_the_readme() -> None:
    (row,) = (row for row in results("model_h200.json")["rows"] if row["shape"] == "8b")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    contenders = {name: result for name, result in row["results"].items() if "of Transformers" not in name}
    assert len(contenders) == 8
    for name, result in contenders.items():
        cells = [over_frozen(result, m) if m in result else "–" for m in ("eager", "compiled", "checkpointing")]
        cells += [f"{mib(result[m])} MiB" for m in ("eager", "checkpointing")]
        assert f"| {f'**{name}**' if name == 'ours' else name} | {' | '.join(cells)} |" in readme


def test_the_other_shape_of_the_readme_s_table() -> None:
    (row,) = (row for row in results("model_h200.json")["rows"] if row["shape"] == "13b")
    said, modes = " ".join(README.split()), ("eager", "checkpointing")
    ours, axolotl, peft = (
        row["results"][f"{name}"] for name in ("ours", "axolotl, 16-bit adapters", "PEFT, 16-bit adapters")
    )
    least, most = (f"{ours['eager']['over_frozen'][end]:.2f}" for end in ("min", "max"))
    pairs = [" and ".join(over_frozen(each, m) for m in modes) for each in (axolotl, peft)]
    compiled, narrow = ours["compiled"]["over_frozen"], row["results"]["ours, 16-bit adapters"]
    assert (
        f"Compiled it takes {compiled['median']:.2f} (least {compiled['min']:.2f}; one of {row['rounds']} rounds "
        f"{compiled['max']:.2f}: the host jitters), with 16-bit adapters {over_frozen(narrow, 'compiled')}." in said
    )
    assert (
        f'"ours" takes {over_frozen(ours, "eager")} of the frozen step in eager mode (least {least}, most {most}) and '
        f"{over_frozen(ours, 'checkpointing')} with checkpointing, axolotl's kernels {pairs[0]}, PEFT with 16-bit "
        f"adapters {pairs[1]}; peaks are {mib(ours['eager'])} MiB and {mib(ours['checkpointing'])} with checkpointing, "
        f"of the frozen step {mib(row['results']['frozen']['eager'])} and "
        f"{mib(row['results']['frozen']['checkpointing'])}." in said
    )


def test_how_long_a_device_waits_for_a_step_s_first_launches() -> None:
    steps = [*results("profile_h200.json")["steps"].items(), *results("profile_13b_h200.json")["steps"].items()]
    waits = [step["ms"] - step["busy_ms"] for name, step in steps if name.endswith("eager")]
    source = ROOT / "generator" / "runlora_gen" / "forecast" / "estimate.py"
    said = " ".join(source.read_text(encoding="utf-8").replace("#:", "").split())
    assert f"took {min(waits):.1f} to {max(waits):.1f} ms longer than their kernels (" in said


def test_peaks_of_compiled_steps() -> None:
    def peaks(shape: str) -> list[int]:
        (found,) = (row["results"] for row in results("model_h200.json")["rows"] if row["shape"] == shape)
        names = ("ours, 16-bit adapters", "PEFT, 16-bit adapters", "frozen")
        return [found[name]["compiled"]["peak_bytes"] for name in names]

    said = " ".join(README.split())
    (ours, theirs, frozen), (ours13, theirs13, frozen13) = peaks("8b"), peaks("13b")
    assert (
        f"the peak of ours with 16-bit adapters is {ours / frozen:.2f} times the frozen step's, of 13B-shaped layers "
        f"{ours13 / frozen13:.2f} times; PEFT's is {theirs / frozen:.2f} and {theirs13 / frozen13:.2f} times." in said
    )
    first = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"adapters is {ours / 2**20:.0f} MiB, the frozen step's {frozen / 2**20:.0f}." in first


def test_models_of_4_bits_with_blocks() -> None:
    (row,) = results("model_nf4_h200.json")["rows"]
    modes = ("eager", "checkpointing")
    ours, theirs = (row["results"][f"{name}, 16-bit adapters"] for name in ("ours", "PEFT"))
    of = [over_frozen(each, mode) for each in (ours, theirs) for mode in modes]
    text = "takes {} of the frozen NF4 step in eager mode and {} with checkpointing, PEFT {} and {}".format(*of)
    for document in (README, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert text in " ".join(document.split())
    peaks = [mib(each[mode]) for each in (ours, row["results"]["frozen"]) for mode in modes]
    assert "peaks are {} and {} MiB above what lies there before, of the frozen step {} and {} (".format(
        *peaks
    ) in " ".join(README.split())


def test_the_table_of_blocks() -> None:
    found = results("blocks_h200.json")["rows"][0]["results"]
    (whole,) = (row["results"] for row in results("model_h200.json")["rows"] if row["shape"] == "8b")
    rest, turned = "norms of Transformers, 16-bit adapters", "ours, rotary embeddings of Transformers, 16-bit adapters"
    labels = {
        "linears one by one": f"ours, linears one by one, {rest}",
        "… q, k, v and gate, up as groups": f"ours, no MLPs, {rest}",
        "… MLPs as a whole": f"ours, {rest}",
        "… norms that keep their input as it is": turned,
        "… rotary embeddings in one kernel": "ours, 16-bit adapters",
        "frozen": "frozen",
    }
    for label, name in labels.items():
        of = found[name] if "median_ms" in found[name].get("compiled", {}) else whole.get(name, {})
        compiled = over_frozen(of, "compiled") if of else "–"
        cells = [*(over_frozen(found[name], m) for m in ("eager", "checkpointing")), compiled]
        peaks = ", ".join(mib(found[name][m]) for m in ("eager", "checkpointing"))
        assert f"| {label} | {' | '.join(cells)} | {peaks} |" in README
    auto, own = found[turned], found[f"ours, {rest}"]
    both = [(each["ours, 16-bit adapters"], each[turned]) for each in (found, whole)]
    eager, compiled = (
        [over_frozen(each, mode) for each in pair] for pair, mode in zip(both, ("eager", "compiled"), strict=True)
    )
    assert (
        f"takes {eager[0]} of the frozen one with the kernel and {eager[1]} without, "
        f"compiled {compiled[0]} and {compiled[1]} (" in " ".join(README.split())
    )
    assert (
        f"takes {over_frozen(auto, 'eager')} of the frozen one with these norms and {over_frozen(own, 'eager')} "
        f"without, its peak is {mib(auto['eager'])} MiB in place of {mib(own['eager'])} (" in " ".join(README.split())
    )


def test_gemma_s_norms() -> None:
    (row,) = results("model_gemma_h200.json")["rows"]
    assert (row["layers"], row["batch"] * row["sequence"], row["rank"], row["rounds"]) == (3, 8192, 16, 7)
    found, modes = row["results"], ("eager", "checkpointing")
    ours, own, theirs, frozen = (
        found[name]
        for name in (
            "ours, 16-bit adapters",
            "ours, norms of Transformers, 16-bit adapters",
            "PEFT, 16-bit adapters",
            "frozen",
        )
    )
    of = [over_frozen(each, mode) for each in (ours, own, theirs) for mode in modes]
    peaks = [mib(each[mode]) for each in (ours, frozen) for mode in modes]
    assert (
        "ours with 16-bit adapters takes {} of the frozen step in eager mode and {} with checkpointing, with norms of "
        "Transformers {} and {}, PEFT {} and {}; peaks are {} and {} MiB, of the frozen step {} and {} (".format(
            *of, *peaks
        )
        in " ".join(README.split())
    )
    document = " ".join((ROOT / "docs" / "with-peft.md").read_text(encoding="utf-8").split())
    assert (
        f"of Gemma-7B-shaped ones {of[0]} and {of[2]}, {mib(ours['eager'])} MiB in place of {mib(own['eager'])}."
        in document
    )


def test_where_the_time_goes() -> None:
    steps = list(results("profile_h200.json")["steps"].values())
    said = " ".join(README.split())
    lines = {group: [f"{step['groups_ms'][group]:.1f}" for step in steps] for group in steps[0]["groups_ms"]}
    lines |= {"the step": [f"{step['ms']:.1f}" for step in steps], "MHz": [f"{step['mhz']:.0f}" for step in steps]}
    for label, cells in lines.items():
        assert f"| {label} | {' | '.join(cells)} |" in README
    (eager, ours, dropped, compiled, both), names = steps, ("LoRA's own passes", "between gate, up and down")
    of = [{kernel["name"]: kernel["ms"] for kernel in step["kernels"]} for step in steps]
    more = [both["groups_ms"][name] - compiled["groups_ms"][name] for name in names]
    theirs = next(ms for name, ms in of[3].items() if "silu_backward" in name)
    backward = "_mlp_activate_backward_kernel"
    read = 5 * 16384 * 14336 * 2 * 4 / 4275.8e9 * 1e3
    assert (
        f"Compiled, ours adds {both['ms'] - compiled['ms']:.1f} ms: {more[0]:.1f} for S, dA, P and dB of linears, and "
        f"{more[1]:.1f} between gate, up and down, where the backward's kernel takes {of[4][backward]:.1f} ms for what "
        f"Inductor's takes {theirs:.1f} for without a product ({read:.1f} would be its bytes' time)" in said
    )
    rest = "norms, rotary embeddings, sums"
    angles = sum(ms for name, ms in of[3].items() if "cos" in name)
    assert (
        f"In kernels for rotary embeddings Inductor spends {angles:.1f} ms of its group, as it computes cos and sin "
        f"anew for each element: [ours](with-peft.md#rotary-embeddings) takes {of[4]['_rotary_kernel']:.1f}, "
        f"and gives back {compiled['groups_ms'][rest] - both['groups_ms'][rest]:.1f} in its group." in said
    )
    slower = both["groups_ms"]["attention"] - compiled["groups_ms"]["attention"]
    assert f"whose kernels are the same in both, takes {slower:.1f} ms more in ours" in said
    less = eager["groups_ms"][rest] - ours["groups_ms"][rest]
    assert f"norms and rotary embeddings take {less:.0f} ms less of their group" in said
    assert (
        f"takes {of[2][backward.replace('backward', 'backward_dropped')]:.1f} ms in place of {of[1][backward]:.1f}, "
        f"and dX of groups a pass more for what is under masks ({of[2]['_dx_das_kernel']:.1f} ms)" in said
    )
    (row,) = (row["results"] for row in results("model_h200.json")["rows"] if row["shape"] == "8b")
    narrow = "ours, 16-bit adapters"
    more = {
        mode: (
            row[f"{narrow}, dropout 0.05"][mode]["over_frozen"]["median"] - row[narrow][mode]["over_frozen"]["median"]
        )
        for mode in ("eager", "checkpointing", "compiled")
    }
    assert (
        f"a step with dropout is {more['eager']:.3f} of the frozen one longer than one without, with checkpointing "
        f"{more['checkpointing']:.3f}, compiled {more['compiled']:.3f}." in said
    )
    assert dropped["ms"] > ours["ms"]


def test_losses_on_an_h200() -> None:
    runs = results("train_h200.json")["runs"]
    theirs, ours = (runs[name]["losses"] for name in ("peft", "ours"))
    assert len(theirs) == len(ours) == 200
    apart = abs(statistics.fmean(b - a for a, b in zip(theirs, ours, strict=True)))
    share = runs["peft"]["tokens_per_s"] / runs["ours"]["tokens_per_s"]
    said = " ".join(README.split())
    assert f"differ by {apart:.4f} in the mean (" in said and f"a step took {share:.2f} of the time of PEFT's" in said


def test_losses_of_experts() -> None:
    said = " ".join((ROOT / "docs" / "with-peft.md").read_text(encoding="utf-8").split())
    for name, digits, text in (
        ("train_experts_h200", 4, "differ by {} in the mean, at {} of PEFT's tokens a second and {} of its peak"),
        ("train_experts_fp32_h200", 5, "differ by {}, at {peak} of the peak, but **{share} of PEFT's tokens a second"),
    ):
        runs = results(f"{name}.json")["runs"]
        theirs, ours = runs["peft"], runs["ours"]
        pairs = list(zip(theirs["losses"], ours["losses"], strict=True))
        assert len(pairs) == 200
        apart = f"{statistics.fmean(abs(a - b) for a, b in pairs):.{digits}f}"
        share, peak = (f"{ours[what] / theirs[what]:.2f}" for what in ("tokens_per_s", "peak_bytes"))
        assert text.format(apart, share, peak, share=share, peak=peak) in said


def test_the_model_table() -> None:
    (row,) = (row for row in results("model_h100.json")["rows"] if row["shape"] == "8b")
    for name, result in row["results"].items():
        if name in ("PEFT, fp32 adapters without autocast", "ours for graphs"):
            continue
        modes = (result.get(mode, {}).get("over_frozen") for mode in ("eager", "compiled", "checkpointing"))
        cells = " | ".join("–" if ratios is None else f"{ratios['median']:.2f}" for ratios in modes)
        label = f"**{name}**" if name == "ours" else name
        assert f"| {label} | {cells} | {result['eager']['peak_bytes'] / 2**20:.0f} MiB |" in README


def test_the_large_shape() -> None:
    (row,) = (row for row in results("model_h100.json")["rows"] if row["shape"] == "13b")
    ours, theirs = row["results"]["ours"], row["results"]["PEFT default (fp32 adapters, autocast)"]
    said = " ".join(README.split())
    parts = (f"{ours[m]['over_frozen']['median']:.2f}" for m in ("eager", "compiled", "checkpointing"))
    least = (f"{ours[m]['over_frozen']['min']:.2f}" for m in ("eager", "compiled", "checkpointing"))
    first, second, third = (f"{part}|{low}" for part, low in zip(parts, least, strict=True))
    for text, value in (
        ("took {} of the frozen step in eager mode (least {})", first),
        ("{} compiled (least {})", second),
        ("{} with checkpointing (least {})", third),
    ):
        assert text.format(*value.split("|")) in said
    medians = [f"{theirs[m]['over_frozen']['median']:.2f}" for m in ("eager", "compiled", "checkpointing")]
    assert "PEFT's default {}, {} and {}".format(*medians) in said
    kernels = row["results"]["axolotl, 16-bit adapters"]
    medians = [f"{kernels[m]['over_frozen']['median']:.2f}" for m in ("eager", "compiled", "checkpointing")]
    assert "axolotl's kernels {}, {} and {}".format(*medians) in said


def test_what_the_host_takes() -> None:
    measured, other = results("host_h100.json"), results("host_h200.json")
    said = " ".join(README.split())
    table = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for name in ("fused_gemm", "x_at", "p_db", "pt_x"):
        kinds = (name, f"{name}, through Triton")
        rows = (of["launch"][row]["over addmm(out=)"]["median"] for of in (measured, other) for row in kinds)
        assert "| `{}` | {:.2f} | {:.2f} | {:.2f} | {:.2f} |".format(name, *rows) in table
    all_kernels, _, none = (name for name in measured["eager"] if "/" in name)
    eager, compiled = ({name: f"{row['us']:.0f}" for name, row in measured[m].items()} for m in ("eager", "compiled"))
    plain, frozen = "plain formula", "frozen"
    assert (
        f"takes the host {eager[all_kernels]} µs with all kernels, {eager[none]} with none and {eager[plain]} as the "
        f"plain formula, the frozen one {eager[frozen]} " in said
    )
    ours = sorted(compiled[name] for name in compiled if "/" in name)
    assert (
        f"compiled linear of the above takes the host {ours[0]} to {ours[-1]} µs, the plain formula {compiled[plain]}, "
        f"the frozen one {compiled[frozen]}." in said
    )


def test_the_h100_s_host() -> None:
    measured = results("host_h100.json")["of a profile"]
    text = (DEVICES / "h100.toml").read_text(encoding="utf-8")
    profile = parse_toml(text.encode())
    for key in ("compiled_host_us", "compiled_kernel_host_us"):
        assert profile[key] == measured[key]
    said = " ".join(text.replace("\n#", "").split())
    assert f"through Triton's Python, {profile['kernel_host_us'] / profile['host_us']:.1f} times host_us" in said
    kernel, operator = measured["kernel_host_us"], measured["host_us"]
    assert f"has {kernel / operator:.1f} times ({kernel} over {operator}, " in said


def test_small_and_compiled_models() -> None:
    def over(name: str, shape: str, contender: str, mode: str) -> str:
        (row,) = (row for row in results(name)["rows"] if row["shape"] == shape)
        return over_frozen(row["results"][contender], mode)

    said, peft = " ".join(README.split()), "PEFT, 16-bit adapters"
    wide, narrow = "generated for graphs", "generated for graphs, 16-bit adapters"
    ours, compiled_ours = "ours, 16-bit adapters", "ours for torch.compile, 16-bit adapters"
    wide_compiled = "ours for torch.compile"
    eager, later, compiled = (
        [over(name, "1b", contender, mode) for contender in contenders]
        for name, mode, contenders in (
            ("model_1b_h100.json", "eager", (narrow, wide, peft)),
            ("model_1b_h200.json", "eager", (ours, "ours", peft)),
            ("model_1b_h200.json", "compiled", (compiled_ours, wide_compiled, ours, peft)),
        )
    )
    text = "then took {} of the frozen step with 16-bit adapters, {} with fp32 ones, and PEFT {} with 16-bit ones"
    assert text.format(*eager) in said
    text = "took {} of the compiled frozen one ({} with fp32 adapters), those for eager mode {}, PEFT's {} a day before"
    assert text.format(*compiled) in said
    replayed = [over("model_1b_h200.json", "1b", name, "replayed") for name in (compiled_ours, wide_compiled, peft)]
    text = "which replays CUDA graphs: {} of the frozen step so ({} with fp32 adapters), PEFT {}"
    assert text.format(*replayed) in said
    document = " ".join((ROOT / "docs" / "with-peft.md").read_text(encoding="utf-8").split())
    assert (
        "A 1B-shaped Llama of 1024 tokens took {} of the frozen step so, PEFT {} (".format(*replayed[::2]) in document
    )
    (row,) = results("model_1b_h200.json")["rows"]
    spreads = [row["results"][name]["compiled"]["over_frozen"] for name in (compiled_ours, wide_compiled, ours, peft)]
    assert max(s["min"] for s in spreads) < min(s["max"] for s in spreads) and "(all spreads overlap)" in said
    peaks = [mib(row["results"][name]["eager"]) for name in (ours, peft, "frozen")]
    text = "takes {} in eager mode ({} with fp32 ones), and PEFT {}; "
    assert text.format(*later) in said
    assert "; peaks are {} and {} MiB, the frozen step's {} (".format(*peaks) in said
    gain = row["results"]["frozen"]["compiled"]["over_frozen_eager"]["median"]
    assert f"compiled it takes {gain:.2f} of the eager one" in said
    frozen, own = row["results"]["frozen"]["compiled"], row["results"][compiled_ours]
    alone = [own["compiled"]["device_ms"] / frozen["device_ms"], own["device_ms"] / frozen["device_ms"]]
    text = (
        "take {:.2f} of the compiled frozen step where they are compiled and {:.2f} where they are not: the host needs "
    )
    launched = "{:.1f} ms to launch the compiled step, and {:.1f} ms for the frozen one"
    assert text.format(*alone) + launched.format(own["compiled"]["host_ms"], frozen["host_ms"]) in said
    large = (over("model_graph_h200.json", s, narrow, m) for s in ("13b", "8b") for m in ("eager", "compiled"))
    text = "layers on modules for graphs took {} in eager mode and {} compiled, 8B-shaped ones {} and {} "
    assert text.format(*large) in said


def test_few_tiles() -> None:
    """The profile holds what small tiles take; large ones were measured with the rest of it."""
    profile = read_profile(parse_toml((DEVICES / "h200.toml").read_bytes()))
    ratios = {}
    for row in results("few_tiles_h200.json")["rows"]:
        at = row["tokens"], row["in_features"], row["out_features"]
        ratios.setdefault(at, []).append(row["us"] / row["us_of_large_tiles"])
        assert profile.times["bf16"][row["work"]][(*at, row["rank"])] == row["us"], row
    every = list(itertools.chain(*ratios.values()))
    document = " ".join((ROOT / "docs" / "cost-model.md").read_text(encoding="utf-8").split())
    assert f"`fused_gemm` takes {min(every):.2f} to {max(every):.2f} of what large ones took" in document
    said = f"{statistics.median(ratios[512, 2048, 2048]):.2f} of the time"
    launches = (ROOT / "generator/runlora_gen/kernels/support.jinja").read_text(encoding="utf-8")
    assert f"On an H200 512 tokens take {said} so, into 2048 columns." in launches
    assert f"{said} for 512 tokens into 2048 columns (H200)" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_first_step() -> None:
    document = (ROOT / "docs" / "with-peft.md").read_text(encoding="utf-8")
    rows = {
        (row["shape"], row["cache"], row["warmup"]): row
        for row in results("first_step_h100.json")["rows"]
        if not row["own_lines"]
    }
    for warmup, cache, what in (
        (False, "empty", "first step, nothing compiled before"),
        (False, "filled", "first step, kernels on disk"),
        (True, "empty", "`warmup`, nothing compiled before; the first step after it"),
        (True, "filled", "`warmup`, kernels on disk; the first step after it"),
    ):
        cells = []
        for row in (rows[shape, cache, warmup] for shape in ("1b", "8b")):
            first = row["first_step_s"]
            cells.append(f"{row['warmup_s']:.1f}; {first:.2f}" if warmup else f"{first:.1f}")
        assert f"| {what} | {' | '.join(cells)} |" in document
    (own,) = (row for row in results("first_step_h100.json")["rows"] if row["own_lines"])
    shared = rows[own["shape"], "empty", False]["compiled"]
    assert f"the {own['shape'].upper()}-shaped layers have {shared}, and would have {own['compiled']} if" in " ".join(
        document.split()
    )


def test_the_paper_s_rows() -> None:
    rows = results("paper_h100.json")["rows"]
    assert len(rows) == 12
    for row in rows:
        paper, found = row["paper"], row["results"]
        best = found.get("fp32") or found["same"]
        speed, same = (f"{result['speedup_percent']['median']:.1f} %" for result in (best, found["same"]))
        assert (
            f"| {paper['speedup']} % | **{speed}** | {same} | {paper.get('saved_mb') or '–'} | {best['saved_mb']:.0f} |"
            in README
        )
        assert best["speedup_percent"]["median"] >= paper["speedup"], "as it has been since this was measured"


@pytest.mark.parametrize("name", ["peft_tests.json", "peft_tests_experts.json"])
def test_peft_s_own_tests(name: str) -> None:
    data = results(name)
    groups = ("passed_on_ours", "passed_without_a_call", "broken", "fails_without_ours", "left_out")
    assert data["tests"] == sum(data[group] for group in groups) and data["broken"] == 0
    for group in ("broken", "fails_without_ours", "left_out"):
        assert data[group] == sum(sum(cases.values()) for cases in data["reasons"].get(group, {}).values())
    text = (ROOT / "docs" / "with-peft.md").read_text(encoding="utf-8")
    for group in ("passed_on_ours", "passed_without_a_call", "fails_without_ours", "tests"):
        assert re.search(rf"\b{data[group]}\b", text), group
