"""Steps of whole models: what Transformers' layers keep is counted on them, times are held against measured ones."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runlora_gen.cost.device import load_device
from runlora_gen.cost.price import spares
from runlora_gen.forecast.estimate import START_S, Batch, Estimate, estimate
from runlora_gen.forecast.gain import gain, keeps
from runlora_gen.measure.memory import peak_bytes, saved_bytes
from runlora_gen.request.architecture import Architecture, load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.layers import layers
from runlora_gen.request.workload import Workload
from runlora_gen.search.grouped import decide_groups_of_step
from runlora_gen.search.ranges import decide_step, rest_of_step
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from check_estimate import RESULTS, RESULTS_OF_BLOCKS, RESULTS_OF_GEMMA, compared, table  # noqa: E402

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 56,
}
BATCH = Batch(2, 40)


def read(model_type: str, folder: Path) -> Architecture:
    (folder / "config.json").write_text(json.dumps({**SIZES, "model_type": model_type}))
    return load_architecture(str(folder))


def built(model_type: str, **options: Any) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **SIZES, attn_implementation="sdpa", use_cache=False)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def forward(model: torch.nn.Module) -> Any:
    ids = torch.randint(SIZES["vocab_size"], (BATCH.size, BATCH.length))
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())  # type: ignore[operator]
    return lambda: model(input_ids=ids, labels=ids)


#: Of Transformers, which is renaming it.
RENAMED = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@RENAMED
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gemma3_text"])
def test_what_the_forward_keeps(model_type: str, tmp_path: Path) -> None:
    """Frozen and with PEFT: the bytes that autograd saves, but for the tables of sines and a few numbers."""
    peft = pytest.importorskip("peft")
    model = built(model_type)
    found = estimate(read(model_type, tmp_path), 4, Workload(tokens=(80,), adapter_dtype="bf16"), BATCH)
    small = 4 * BATCH.length * SIZES["head_dim"] + 32 * BATCH.tokens
    kept = saved_bytes(forward(model), model.parameters())
    assert 0 <= kept - found["frozen"].memory.forward <= small
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    kept = saved_bytes(forward(adapted), adapted.parameters())
    assert 0 <= kept - found["peft"].memory.forward <= small


@RENAMED
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma3_text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step(model_type: str, checkpointing: bool, tmp_path: Path) -> None:
    """Forward and backward of a whole model with head and loss, as torch's allocator sees it."""
    model = built(model_type)
    step = forward(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    step().loss.backward()
    peak = peak_bytes(lambda: step().loss.backward(), torch.device("cpu"))
    batch = replace(BATCH, checkpointing=checkpointing)
    found = estimate(read(model_type, tmp_path), 4, Workload(tokens=(80,)), batch)
    assert found["frozen"].memory.step == pytest.approx(peak, rel=0.1)


def test_weights_and_adapters(tmp_path: Path) -> None:
    for model_type in ("llama", "qwen3", "qwen2", "mistral", "gemma", "gemma3_text"):
        found = estimate(read(model_type, tmp_path), 4, Workload(tokens=(80,)), BATCH)
        model = built(model_type)
        assert found["frozen"].memory.weights == sum(p.numel() for p in model.parameters()) * 2
        assert found["frozen"].memory.adapters == 0
        linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        rows = sum(linear.in_features + linear.out_features for linear in linears)
        assert found["ours"].memory.adapters == found["peft"].memory.adapters == 2 * 4 * 4 * rows


VIEWS = {"view", "_unsafe_view", "transpose", "t", "expand", "unsqueeze", "slice", "detach", "alias", "select"}


class _Operators(TorchDispatchMode):
    """Counts those that launch something."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.__name__.split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma3_text"])
def test_the_operators_of_a_layer(model_type: str, tmp_path: Path) -> None:
    """As many as the dispatcher sees in one more layer, forward and backward."""
    transformers = pytest.importorskip("transformers")

    def counted(count: int) -> tuple[int, int]:
        sizes = {**SIZES, "num_hidden_layers": count}
        config = transformers.AutoConfig.for_model(model_type, **sizes, attn_implementation="sdpa", use_cache=False)
        model = transformers.AutoModel.from_config(config).to(torch.bfloat16).requires_grad_(False)
        x = torch.randn(2, 8, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
        with _Operators() as there:
            y = model(inputs_embeds=x).last_hidden_state
        with _Operators() as back:
            y.backward(torch.ones_like(y))
        return there.count, back.count

    two, three = counted(2), counted(3)
    architecture = read(model_type, tmp_path)
    decoder = architecture.decoder
    assert decoder is not None

    def host_s(count: int) -> float:
        projections = tuple(replace(p, count=count) for p in architecture.projections)
        model = replace(
            architecture,
            projections=projections,
            decoder=replace(decoder, layers=count, projections=projections),
        )
        return estimate(model, 8, Workload(tokens=(64,)), Batch(1, 64))["frozen"].times.host_s

    from runlora_gen.forecast.plain import PLAIN_HOST

    launches = (host_s(3) - host_s(2)) / load_device("h100").host_s / PLAIN_HOST
    assert launches == pytest.approx(sum(three) - sum(two))


def guess(**options: Any) -> dict[str, Estimate]:
    batch = Batch(**{"size": 2, "length": 2048, **options.pop("batch", {})})
    return estimate(
        load_architecture("llama-3.2-1b"), 16, Workload(tokens=(batch.tokens,), kernels=False, **options), batch
    )


def test_checkpointing_takes_time_and_frees_memory() -> None:
    plain, checkpointed = guess(), guess(batch={"checkpointing": True})
    for way, one in plain.items():
        assert 1.2 < checkpointed[way].times.device_s / one.times.device_s < 1.5
        assert checkpointed[way].memory.forward < one.memory.forward / 2
        assert checkpointed[way].memory.peak < one.memory.peak


def _products_again(model: torch.nn.Module) -> int:
    """How many of the last linear's own products a step with checkpointing has more than one without."""
    tokens, shape = BATCH.tokens, (SIZES["intermediate_size"], SIZES["hidden_size"])

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.__name__.split(".")[0] in ("mm", "addmm"):
                left, right = args[-2:]
                self.count += left.shape == (tokens, shape[0]) and right.shape == shape
            return function(*args, **(kwargs or {}))

    counts = []
    for again in (False, True):
        if again:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with Products() as products:
            forward(model)().loss.backward()
        counts.append(products.count)
    return counts[1] - counts[0]


@RENAMED
@pytest.mark.parametrize("way", ["frozen", "peft", "peft without down", "ours"])
def test_where_a_checkpoint_stops(way: str, tmp_path: Path) -> None:
    """Before the last linear, as nothing of it is missing in the backward; adapters of PEFT's run after it."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"] if way.endswith("down") else "all-linear"
    model = built("llama").train()
    if way != "frozen":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets), autocast_adapter_dtype=False)
    if way == "ours":
        import runlora_gen

        runlora_gen.accelerate(model, tmp_path / "generated", tokens=80, device="cpu", strict=True)
    assert _products_again(model) == (3 if way == "peft" else 0)


def test_that_a_checkpoint_stops_is_counted() -> None:
    """With an adapter in down PEFT computes it again; ours does not, nor does PEFT without."""
    batch, whole = Batch(1, 4096), load_architecture("llama-13b")
    workload = Workload(tokens=(4096,), adapter_dtype="bf16", device="h100", groups="none")

    def again(way: str, *targets: str) -> float:
        plain, twice = (
            estimate(whole.restricted(targets), 8, workload, replace(batch, checkpointing=on))[way].times.device_s
            for on in (False, True)
        )
        return twice - plain

    (down,) = (p for p in whole.projections if p.name == "down_proj")
    flops = 2 * 4096 * down.count * down.in_features * down.out_features
    product = flops / load_device("h100").flops_per_s["bf16"]
    more = {way: again(way, "q_proj", "down_proj") - again(way, "q_proj") for way in ("frozen", "peft", "ours")}
    normed = replace(whole, decoder=replace(whole.decoder, post_norms=True))
    stopped, through = (
        estimate(each, 8, workload, replace(batch, checkpointing=True))["frozen"].times.device_s
        - estimate(each, 8, workload, batch)["frozen"].times.device_s
        for each in (whole, normed)
    )
    assert through - stopped > product, "a norm reads what down gave"
    assert more["frozen"] == 0 and 0 < more["ours"] < 0.2 * product and 1 < more["peft"] / product < 1.5


def test_ours_keeps_what_its_programs_keep() -> None:
    """S, and inputs that several linears read once: with 16-bit adapters as much as PEFT."""
    architecture, workload = load_architecture("llama-13b"), Workload(kernels=False, norms="none")
    found = estimate(architecture, 8, replace(workload, adapter_dtype="bf16"), Batch(2, 2048))
    assert found["ours"].memory.forward == found["peft"].memory.forward > found["frozen"].memory.forward
    wide = estimate(architecture, 8, workload, Batch(2, 2048))
    assert wide["ours"].memory.forward < wide["peft"].memory.forward


def test_norms_that_keep_their_input_as_it_is() -> None:
    """Ours alone: 16 bits in place of 32 for two a layer and the last one; of float32 nothing."""
    architecture, batch = load_architecture("llama-13b"), Batch(2, 2048)
    lean, plain = (
        estimate(architecture, 8, Workload(tokens=(4096,), norms=norms), batch) for norms in ("auto", "none")
    )
    assert lean["frozen"] == plain["frozen"] and lean["peft"] == plain["peft"]
    assert plain["ours"].memory.forward - lean["ours"].memory.forward == 81 * 4096 * 5120 * 2
    assert lean["ours"].times.device_s < plain["ours"].times.device_s
    assert lean["ours"].times.host_s < plain["ours"].times.host_s
    # On a CPU torch has no kernel: what norms do takes as long, and what they keep is less, also the number of a row.
    lean, plain = (
        estimate(architecture, 8, Workload(tokens=(4096,), norms=norms, device="cpu"), batch)
        for norms in ("auto", "none")
    )
    assert lean["ours"].times == plain["ours"].times
    assert plain["ours"].memory.forward - lean["ours"].memory.forward == 81 * 4096 * (5120 * 2 + 4)
    wide = Workload(tokens=(4096,), dtype="fp32")
    assert estimate(architecture, 8, wide, batch) == estimate(architecture, 8, replace(wide, norms="none"), batch)


def test_rotary_embeddings_in_one_kernel() -> None:
    """Ours alone, where there are kernels and 16 bits: two passes over queries and keys each way in place of 26."""
    architecture, batch = load_architecture("llama-13b"), Batch(2, 2048)
    turned, plain = (
        estimate(architecture, 8, Workload(tokens=(4096,), rotary=rotary), batch) for rotary in ("auto", "none")
    )
    assert turned["frozen"] == plain["frozen"] and turned["peft"] == plain["peft"]
    assert turned["ours"].memory == plain["ours"].memory
    assert turned["ours"].times.host_s < plain["ours"].times.host_s
    h100, both = load_device("h100"), 2 * 4096 * 5120 * 2  # of queries and keys, bytes
    strided = 26 * both / (0.58 * h100.bytes_per_s)
    less = (plain["ours"].times.device_s - turned["ours"].times.device_s) / 40
    assert less == pytest.approx(strided - 4 * both / h100.bytes_per_s, rel=0.1)
    for fields in ({"dtype": "fp32"}, {"device": "cpu"}, {"kernels": False}):
        here = Workload(tokens=(4096,), **fields)
        assert estimate(architecture, 8, here, batch) == estimate(architecture, 8, replace(here, rotary="none"), batch)


def test_the_start_of_a_step() -> None:
    """The device waits for its first launches, but never longer than the host takes; not in a graph, nor on a CPU."""
    for one in guess(batch={"size": 64}).values():
        assert one.start_s == START_S and one.time_s == START_S + one.times.device_s > one.times.host_s
    assert all(one.time_s == one.times.device_s for one in guess(launch="graph").values())
    assert all(one.start_s == 0 for one in guess(device="cpu", dtype="fp32").values())
    few = estimate(load_architecture("llama-60m"), 8, Workload(tokens=(8,)), Batch(1, 8))["frozen"]
    assert few.start_s == min(START_S, few.times.host_s)


def test_only_the_targets_have_adapters() -> None:
    architecture = load_architecture("llama-3.2-1b")
    workload, batch = Workload(tokens=(4096,), kernels=False, norms="none"), Batch(2, 2048)
    whole = estimate(architecture, 16, workload, batch)
    some = estimate(architecture.restricted(("q_proj", "v_proj")), 16, workload, batch)
    assert some["frozen"] == whole["frozen"]
    for way in ("peft", "ours"):
        assert whole["frozen"].times.device_s < some[way].times.device_s < whole[way].times.device_s
        assert some[way].memory.adapters < whole[way].memory.adapters
        assert whole["frozen"].memory.forward < some[way].memory.forward < whole[way].memory.forward


def test_ours_is_what_the_choice_says() -> None:
    """Beside the frozen model: the difference of the chosen programs and the frozen linears."""
    architecture = load_architecture("llama-3.2-1b")
    workload = Workload(tokens=(4096,), kernels=False, groups="none", norms="none")
    found = estimate(architecture, 16, workload, Batch(2, 2048))
    from runlora_gen.forecast.gain import frozen_times

    sites = layers(architecture)
    more = sum(
        site.count * (decision.chosen.cost.device_s - frozen_times(decision.setting).device_s)
        for site, decision in zip(sites, decide_step(workload, sites, 16, 4096), strict=True)
    )
    assert found["ours"].times.device_s - found["frozen"].times.device_s == pytest.approx(more)


def test_groups_are_in_the_step() -> None:
    """In place of their linears, and without the sums that autograd is spared; of a model without MLPs as a whole."""
    architecture, workload = replace(load_architecture("llama-13b"), gated=()), Workload(tokens=(4096,))
    together, apart = (
        estimate(architecture, 16, replace(workload, groups=groups), Batch(2, 2048)) for groups in ("auto", "none")
    )
    chosen = decide_groups_of_step(workload, architecture, 16, 4096)
    assert "qkv" in {group.kind for group, _ in chosen}
    lone = {
        (site.in_features, site.out_features): decision.chosen.cost.device_s
        for site, decision in zip(
            layers(architecture), decide_step(workload, layers(architecture), 16, 4096), strict=True
        )
    }
    spared = sum(
        group.count
        * (
            sum(lone[group.in_features, width] for width in group.out_features)
            + sum(times.device_s for times in spares(decision.setting))
            - decision.chosen.cost.device_s
        )
        for group, decision in chosen
    )
    assert spared > 0
    assert apart["ours"].times.device_s - together["ours"].times.device_s == pytest.approx(spared)
    assert together["peft"] == apart["peft"] and together["frozen"] == apart["frozen"]
    assert together["ours"].memory.forward == apart["ours"].memory.forward


#: Where those are chosen: the kernels of what is between are priced by the roofline.
OF_MLPS = Workload(tokens=(4096,), device="a100", launch="graph")


def test_mlps_are_in_the_step() -> None:
    """In place of their group and down, and without what the model does between them, and what it keeps of it."""
    architecture, batch = load_architecture("llama-13b"), Batch(2, 2048)
    without = replace(architecture, gated=())  # nobody says what is between
    together, apart = (estimate(one, 16, OF_MLPS, batch) for one in (architecture, without))
    chosen, others = (
        {site.name: (site, decision) for site, decision in decide_groups_of_step(OF_MLPS, one, 16, 4096)}
        for one in (architecture, without)
    )
    (mlp, whole), (_, pair) = chosen["mlp_5120x13824"], others["gate_up_5120x13824"]
    assert chosen.keys() ^ others.keys() == {"mlp_5120x13824", "gate_up_5120x13824"}
    lone = layers(architecture)
    (down,) = (
        decision
        for site, decision in zip(lone, decide_step(OF_MLPS, lone, 16, 4096), strict=True)
        if (site.in_features, site.out_features) == (13824, 5120)
    )
    spared = (
        pair.chosen.cost.device_s
        - sum(times.device_s for times in spares(pair.setting))
        + down.chosen.cost.device_s
        + sum(times.device_s for times in spares(whole.setting))
        - whole.chosen.cost.device_s
    )
    assert apart["ours"].times.device_s - together["ours"].times.device_s == pytest.approx(mlp.count * spared)
    assert spared > 0 and together["peft"] == apart["peft"] and together["frozen"] == apart["frozen"]
    # Neither silu(gate) nor what it is multiplied to, which down read.
    inner = 4096 * 13824 * 2
    assert keeps(down).input and keeps(pair).input and keeps(whole).input
    own = keeps(pair).own_bytes + keeps(down).own_bytes - keeps(whole).own_bytes
    assert apart["ours"].memory.forward - together["ours"].memory.forward == mlp.count * (2 * inner + own)


def test_what_an_mlp_gains() -> None:
    """Times and bytes of all linears, where those of MLPs are computed together."""
    architecture = load_architecture("llama-13b")
    lone = layers(architecture)
    decisions = decide_step(OF_MLPS, lone, 8, 4096)
    grouped = decide_groups_of_step(OF_MLPS, architecture, 8, 4096)
    found = gain(architecture, lone, decisions, rest_of_step(OF_MLPS, lone, 8, 4096), grouped)
    by_shape = {(site.in_features, site.out_features): d for site, d in zip(lone, decisions, strict=True)}
    alone = by_shape[5120, 5120]
    (_, qkv), (_, mlp) = grouped
    device_s = alone.chosen.cost.device_s + sum(
        decision.chosen.cost.device_s - sum(times.device_s for times in spares(decision.setting))
        for decision in (qkv, mlp)
    )
    assert found.ours.times.device_s == pytest.approx(40 * device_s)
    own = sum(keeps(decision).own_bytes for decision in (alone, qkv, mlp))
    # What q, k and v read, what o reads, what gate and up read: of what down reads nothing is kept.
    assert found.ours.kept_bytes == 40 * (own + 3 * 4096 * 5120 * 2)
    kept = {str(symbol) for symbol in mlp.chosen.program.kept}
    assert {"Y_gate", "Y_up"} <= kept and "X_down" not in kept, "the model keeps what gate and up make anyway"
    assert keeps(mlp).own_bytes == sum(
        mlp.setting.bytes_of(mlp.setting.derivation[name]) for name in kept - {"Y_gate", "Y_up"}
    )


def test_under_cuda_graphs_the_host_does_not_count() -> None:
    eager, graph = guess(batch={"length": 64}), guess(batch={"length": 64}, launch="graph")
    assert eager["frozen"].time_s == eager["frozen"].times.host_s
    assert graph["frozen"].time_s == graph["frozen"].times.device_s < eager["frozen"].time_s


def test_a_compiled_step_is_not_guessed() -> None:
    with pytest.raises(SpecError, match=r"^--launch: compile is not allowed for estimate, .*; give eager or graph$"):
        guess(launch="compile")


def test_the_documented_table_is_that_of_the_result_file() -> None:
    """And it predicts: time within 7 %, peaks within 10 %."""
    document = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
    rows = list(compared(json.loads(RESULTS.read_text(encoding="utf-8"))))
    assert table(rows) in document
    assert max(abs(row.peak_off) for row in rows) < 0.1
    assert len(rows) >= 20 and max(abs(row.time_off) for row in rows) < 0.07


def test_the_documented_table_of_blocks_is_that_of_the_result_file() -> None:
    document = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
    rows = list(compared(json.loads(RESULTS_OF_BLOCKS.read_text(encoding="utf-8"))))
    assert table(rows) in document and len(rows) == 18
    said = " ".join(document.split())
    eight, thirteen = (max(abs(row.time_off) for row in rows if row.shape == shape) for shape in ("8b", "13b"))
    off = max(abs(row.peak_off) for row in rows)
    assert (
        f"8B-shaped layers are at most {eight * 100:.1f} % off, of 13B-shaped ones {thirteen * 100:.1f} %; "
        f"peaks {off * 100:.1f} %." in said
    )
    assert off < 0.05 and max(eight, thirteen) < 0.07


def test_the_documented_table_of_gemma_is_that_of_the_result_file() -> None:
    document = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
    rows = list(compared(json.loads(RESULTS_OF_GEMMA.read_text(encoding="utf-8"))))
    assert table(rows) in document and len(rows) == 6
    time, peak = (max(abs(getattr(row, name)) for row in rows) for name in ("time_off", "peak_off"))
    assert f"Times are at most {time * 100:.1f} % off, peaks {peak * 100:.1f} %." in " ".join(document.split())
    assert time < 0.05 and peak < 0.05
