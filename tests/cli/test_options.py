"""What the options do, from the command line to the files."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.cost.device import device_names
from runlora_gen.emit.style import Style
from runlora_gen.request.bases import BASES

#: Adapters in the activations' dtype: without casts there are fewer programs to choose from.
NARROW = ("--adapter-dtype", "bf16")


@pytest.fixture
def generate(run, tmp_path: Path):
    """Generate one shape of llama-9m from few programs, and return its manifest and its module's text."""

    def call(*options: str, rank: int = 8) -> tuple[dict[str, Any], str]:
        arguments = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", str(rank))
        dtype = options[options.index("--dtype") + 1] if "--dtype" in options else "bf16"
        run(*arguments, "--adapter-dtype", dtype, "--no-kernels", *options, "-o", tmp_path / "out").ok()
        folder = tmp_path / "out" / f"llama_9m_r{rank}"
        module = folder / f"linear_128x128_r{rank}.py"
        return json.loads((folder / "manifest.json").read_text()), module.read_text()

    return call


def ranges(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["layers"][0]["ranges"]


@pytest.mark.parametrize(
    "options",
    [("--rank", "2,4", "--rank", "8"), ("-r", "8", "-r", " 4 , 2 "), ("-r", "8,8,4", "-r", "2")],
    ids=["mixed", "spaces", "repeats"],
)
def test_ranks_each_get_a_folder(run, tmp_path: Path, options: tuple[str, ...]) -> None:
    run("--arch", "llama-9m", "--target-modules", "q_proj", *options, *NARROW, "--no-kernels", "-o", tmp_path).ok()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama_9m_r2", "llama_9m_r4", "llama_9m_r8"]
    assert (tmp_path / "llama_9m_r2" / "linear_128x128_r2.py").is_file()


def test_target_modules_choose_the_shapes(run, tmp_path: Path) -> None:
    base = ("--arch", "llama-9m", "--rank", "4", *NARROW, "--no-kernels", "--dry-run", "-o", tmp_path)
    shapes = {
        (): {"128x128", "128x352", "352x128"},
        ("--target-modules", "q_proj,v_proj"): {"128x128"},
        ("--target-modules", "q_proj", "--target-modules", "down_proj"): {"128x128", "352x128"},
    }
    for options, expected in shapes.items():
        assert set(re.findall(r"linear_(\w+)_r4\.py", run(*base, *options).ok().out)) == expected


@pytest.mark.parametrize(
    ("options", "frozen", "gradients"),
    [
        ((), [], {"dX", "dA", "dB", "db"}),
        (("--train", "a"), ["lora_B"], {"dX", "dA", "db"}),
        (("--train", "b"), ["lora_A"], {"dX", "dB", "db"}),
        (("--train", "B, a"), [], {"dX", "dA", "dB", "db"}),
        (("--no-input-grad",), ["x"], {"dA", "dB", "db"}),
        (("--no-input-grad", "--train", "b"), ["x", "lora_A"], {"dB", "db"}),
    ],
    ids=["all", "a", "b", "spelled", "first layer", "first layer, b"],
)
def test_what_trains_shapes_the_module(generate, options, frozen: list[str], gradients: set[str]) -> None:
    manifest, text = generate(*options, "--adapter-dtype", "fp32")
    assert set(re.findall(r"^        (d\w+): Tensor \| None = None$", text, re.M)) == gradients
    assert re.findall(r'"(\w+) must not require a gradient', text) == frozen
    part = ranges(manifest)[-1]
    chosen = next(v for v in part["variants"] if v["id"] == part["chosen"])
    if "b" in options and "a" not in options:
        # X is not needed where A is frozen (LoRA-FA): only S is kept, and for dX the casts of A and B.
        casts = 0 if "--no-input-grad" in options else 2 * 128 * 8 * 2
        assert chosen["saved_bytes"] == 4096 * 8 * 2 + casts


def test_devices_price_differently(generate) -> None:
    times = set()
    for device in device_names():
        manifest, text = generate("--device", device, "--launch", "graph")
        assert manifest["workload"]["device"] == device
        # Under graphs the device counts, not the host, which is the same for all GPUs.
        times.add(ranges(manifest)[0]["variants"][0]["time_us"])
        assert f"--device {device} " in text or device == "h100"
    assert len(times) == len(device_names()) == 5


@pytest.mark.parametrize("criterion", ["time", "flops", "memory"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_criterion_is_minimised(generate, criterion: str, dtype: str) -> None:
    manifest, _ = generate("--criterion", criterion, "--dtype", dtype, "--tokens", "512")
    part = ranges(manifest)[-1]
    measure = {
        "time": lambda v: v["time_us"],
        "flops": lambda v: sum(v["flops"].values()),
        "memory": lambda v: v["saved_bytes"] + v["workspace_bytes"],
    }[criterion]
    allowed = [v for v in part["variants"] if dtype == "fp32" or not merges(v["id"])]
    chosen = next(v for v in part["variants"] if v["id"] == part["chosen"])
    assert measure(chosen) == min(map(measure, allowed))


def merges(variant: str) -> bool:
    """Whether an id names a merged weight, computed or kept."""
    forward, backward, kept = variant.split("/")
    return forward == "merged" or backward.startswith("merged") or "m" in kept.removeprefix("keep-").split("-")


class TestLossyMerge:
    CPU = ("--device", "cpu", "--tokens", "65536")

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @pytest.mark.parametrize("criterion", ["time", "flops", "memory"])
    def test_is_never_chosen_unasked(self, generate, dtype: str, criterion: str) -> None:
        manifest, text = generate(*self.CPU, "--dtype", dtype, "--criterion", criterion)
        part = ranges(manifest)[-1]
        assert not merges(part["chosen"]) and part["chosen"] == part["on_16_bit_weights"]
        assert "M = " not in text

    def test_is_chosen_when_allowed(self, generate) -> None:
        manifest, text = generate(*self.CPU, "--allow-lossy-merge")
        part = ranges(manifest)[-1]
        assert merges(part["chosen"]) and part["on_16_bit_weights"] == part["chosen"]
        assert "M = " in text and "\nLOSSY_MERGE = True\n" in text
        assert "--allow-lossy-merge" in manifest["command"]

    def test_fp32_module_runs_split_on_16_bit_weights(self, generate) -> None:
        torch = pytest.importorskip("torch")
        manifest, text = generate(*self.CPU, "--dtype", "fp32")
        part = ranges(manifest)[-1]
        assert merges(part["chosen"]) and not merges(part["on_16_bit_weights"])
        module: dict[str, Any] = {"__name__": "generated"}
        exec(compile(text, "generated", "exec"), module)
        assert set(module["VARIANTS"]) >= {part["chosen"], part["on_16_bit_weights"]}
        for dtype, expected in (
            (torch.float32, part["chosen"]),
            (torch.float64, part["chosen"]),
            (torch.bfloat16, part["on_16_bit_weights"]),
            (torch.float16, part["on_16_bit_weights"]),
        ):
            assert module["_select"](4096, dtype) == expected


def test_tokens_make_ranges_and_the_module_obeys_them(generate) -> None:
    torch = pytest.importorskip("torch")
    # No profile that was measured: crossovers of the roofline are known.
    options = ("--device", "a100", "--dtype", "fp32", "--launch", "graph", "--criterion", "memory", "--train", "b")
    options += ("--tokens",)
    manifest, text = generate(*options, "65536,16", "--tokens", "1024,16")
    parts = ranges(manifest)
    assert manifest["workload"]["tokens"] == [16, 1024, 65536]
    assert len(parts) == 3 and parts[-1]["last_tokens"] is None
    ends = [part["last_tokens"] for part in parts[:-1]]
    assert ends == sorted(ends) and 16 <= ends[0] < 1024 <= ends[1] < 65536
    module: dict[str, Any] = {"__name__": "generated"}
    exec(compile(text, "generated", "exec"), module)
    start = 0
    for part in parts:
        end = part["last_tokens"] or 10**9
        for tokens in (start, end):
            assert module["_select"](tokens, torch.float32) == part["chosen"]
            assert module["_select"](tokens, torch.bfloat16) == part["on_16_bit_weights"]
        start = end + 1


class TestMaxSavedBytes:
    BASE = ("--criterion", "flops", "--tokens", "4096")

    def saved(self, manifest: dict[str, Any]) -> int:
        part = ranges(manifest)[-1]
        return next(v["saved_bytes"] for v in part["variants"] if v["id"] == part["chosen"])

    def test_is_met(self, generate) -> None:
        free = self.saved(generate(*self.BASE)[0])
        assert self.saved(generate(*self.BASE, "--max-saved-bytes", str(free))[0]) == free
        assert self.saved(generate(*self.BASE, "--max-saved-bytes", str(free - 1))[0]) < free

    @pytest.mark.parametrize(
        "options",
        [
            ("--rank", "4", "--train", "b", "--no-kernels"),
            ("--rank", "4,64", "--train", "b", *NARROW, "--no-kernels"),
            ("--rank", "8", "--tokens", "16,4096", *NARROW, "--no-kernels"),
            ("--rank", "8", "--dtype", "fp32", "--device", "cpu", "--tokens", "65536"),
        ],
        ids=["b", "ranks", "tokens", "merged"],
    )
    def test_names_the_smallest_value_that_works(self, run, tmp_path: Path, options: tuple[str, ...]) -> None:
        # Several shapes: the value must serve all of them.
        base = ("--arch", "llama-9m", *options, "-o", tmp_path / "out")
        message = run(*base, "--max-saved-bytes", "1").error()
        least = int(re.search(r"the smallest feasible value is (\d+)$", message)[1])
        assert not (tmp_path / "out").exists()
        assert str(least) in run(*base, "--max-saved-bytes", str(least - 1)).error()
        run(*base, "--max-saved-bytes", str(least)).ok()


def test_all_variants_holds_every_pair_and_every_paper_label(
    generate, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Style, "format", lambda self, source: source)  # most of the time, and no matter here
    _, text = generate("--all-variants")
    path = tmp_path / "every_variant.py"  # a file: Triton reads the source of its kernels
    path.write_text(text, encoding="utf-8")
    variants = runpy.run_path(str(path))["VARIANTS"]
    arguments = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "8", *NARROW, "--no-kernels")
    (layer,) = json.loads(run("explain", *arguments, "--json").ok().out)["layers"]
    assert set(variants) >= {v["id"] for v in layer["variants"]}
    assert len(layer["variants"]) == 144
    assert len(variants) == len(set(variants.values()))
    labels = [label for v in layer["variants"] for label in v["paper_labels"]]
    assert sorted(labels) == [f"forward{i}/backward{j}" for i in range(1, 5) for j in range(1, 9)]


class TestBase:
    @pytest.mark.parametrize("base", [name for name in BASES if name != "plain"])
    def test_it_is_in_the_command_and_in_what_is_generated(self, run, tmp_path: Path, base: str) -> None:
        spec = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "8", *NARROW, "--no-kernels")
        run(*spec, "--base", base, "-o", tmp_path).ok()
        folder = tmp_path / "llama_9m_r8"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["workload"]["base"] == base and f" --base {base} " in manifest["command"]
        text = (folder / "linear_128x128_r8.py").read_text()
        assert f" --base {base} " in text.partition('"""')[0] and "class Quantized(NamedTuple):" in text
        assert f'\nBASE = "{BASES[base].kind}"\n' in (folder / "shapes.py").read_text()
        assert f'\nBASE = "{base}"\n' in text
        run(*manifest["command"].split()[1:-1], tmp_path, "--check").ok()

    def test_plain_is_what_is_taken_unless_it_is_given(self, generate) -> None:
        manifest, text = generate()
        assert manifest["workload"]["base"] == "plain" and "--base" not in manifest["command"]
        assert generate("--base", "plain") == (manifest, text) and "Quantized" not in text

    @pytest.mark.parametrize(
        ("quantization", "base", "said"),
        [
            (
                {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                "plain",
                "(nf4), the base here is plain: --base nf4",
            ),
            ({"load_in_4bit": True}, "nf4", "(fp4), the base here is nf4: --base fp4"),
            ({"quant_method": "gptq"}, "plain", "(gptq), the base here is plain: those are not covered"),
            ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", ""),
            ({"load_in_8bit": True, "load_in_4bit": False}, "plain", "(int8), the base here is plain: --base int8"),
            ({"quant_method": "fp8"}, "nf4", "(fp8-block), the base here is nf4: --base fp8-block"),
            (
                {"quant_method": "fp8", "weight_block_size": [128, 128]},
                "fp8",
                "(fp8-block), the base here is fp8: --base fp8-block",
            ),
            ({"quant_method": "fp8", "weight_block_size": None}, "int8", "(fp8), the base here is int8: --base fp8"),
            ({"quant_method": "fbgemm_fp8"}, "plain", "(fp8), the base here is plain: --base fp8"),
            ({"load_in_8bit": True}, "int8", ""),
            ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8-block", ""),
            ({"quant_method": "fbgemm_fp8"}, "fp8", ""),
        ],
    )
    def test_a_config_of_another_base_is_told(self, run, tmp_path: Path, quantization, base: str, said: str) -> None:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = {"model_type": "llama", "vocab_size": 50, **sizes, "quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(config))
        spec = ("--arch", tmp_path / "config.json", "--rank", "4", "--base", base, *NARROW, "--no-kernels")
        done = run(*spec, "-o", tmp_path / "out")
        errors = done.err
        assert (
            done.code == 0
            and ("the config says that weights are quantized " in errors) == bool(said)
            and said in errors
        )

    def test_what_is_allowed_is_named(self, run, tmp_path: Path) -> None:
        spec = ("--arch", "llama-9m", "--rank", "8", "--base", "int4", "-o", tmp_path / "out")
        names = "'plain', 'nf4', 'fp4', 'int8', 'fp8', 'fp8-block', 'bf16', 'fp16', 'fp32'"
        assert run(*spec).error() == f"Invalid value for '--base': 'int4' is not one of {names}."
        assert not (tmp_path / "out").exists()

    def test_the_name_of_the_dtype_is_the_plain_base(self, run) -> None:
        spec = ("explain", "--arch", "llama-9m", "--rank", "8", "--json")
        assert json.loads(run(*spec, "--base", "bf16").ok().out)["base"] == "plain"
        message = "--base: 'fp16' is not allowed beside another dtype; give plain, or that one"
        assert run(*spec, "--base", "fp16").error() == message

    @pytest.mark.parametrize("base", ["nf4", "int8", "fp8-block"])
    def test_explain_prices_what_is_made_of_codes(self, run, base: str) -> None:
        spec = ("explain", "--arch", "llama-13b", "--target-modules", "q_proj", "--rank", "8", *NARROW)
        plain, coded = (json.loads(run(*spec, *more, "--json").ok().out) for more in ((), ("--base", base)))
        for of in ("frozen", "peft"):
            assert coded["model"][of]["device_us"] > plain["model"][of]["device_us"]
        (layer,) = coded["layers"]
        assert layer["variants"] and not any("W" in variant["keeps"] for variant in layer["variants"])
        text = run(*spec, "--base", base).ok().out
        assert "× frozen" in text and "× PEFT" in text


class TestFloat8:
    """--float8: which products round what they read; of a base that has a scale for each row."""

    SPEC = ("--arch", "llama-7b", "--target-modules", "q_proj", "--rank", "8", *NARROW, "--base", "fp8")
    GRAPH = ("--launch", "graph", "--tokens", "8192")

    @pytest.mark.parametrize(
        ("float8", "places"), [("both", ("Y", "dX")), ("forward", ("Y",)), ("none", ())], ids=lambda value: str(value)
    )
    def test_it_is_in_the_command_and_in_what_is_generated(
        self, run, tmp_path: Path, float8: str, places: tuple[str, ...]
    ) -> None:
        run(*self.SPEC, *self.GRAPH, "--float8", float8, "-o", tmp_path).ok()
        folder = tmp_path / "llama_7b_r8"
        manifest = json.loads((folder / "manifest.json").read_text())
        text = (folder / "linear_4096x4096_r8.py").read_text()
        assert manifest["workload"]["float8"] == float8
        option = f" --float8 {float8} "
        for command in (manifest["command"], text.partition('"""')[0]):
            assert (option in command) == (float8 != "both") and "--base fp8" in command
        assert set(re.findall(r"^ +(\w+) = _fused_gemm_8\(", text, re.M)) == {*places}
        assert ("_fused_gemm_8" in text) == bool(places) and ("_transpose(Q" in text) == ("dX" in places)
        # Run again as the manifest says, nothing is to be done; asked for other products, everything is.
        again = run(*self.SPEC, *self.GRAPH, "--float8", float8, "--check", "-o", tmp_path)
        other = run(*self.SPEC, *self.GRAPH, *(("--float8", "none") if places else ()), "--check", "-o", tmp_path)
        assert (again.code, other.code) == (0, 1)

    @pytest.mark.parametrize("more", [("--no-kernels",), ("--device", "a100"), ("--dtype", "fp32")], ids=" ".join)
    def test_what_has_none_is_generated_without(self, run, tmp_path: Path, more: tuple[str, ...]) -> None:
        adapter = ("--adapter-dtype", "fp32") if "fp32" in more else ()
        run(*self.SPEC, *self.GRAPH, *more, *adapter, "-o", tmp_path).ok()
        text = (tmp_path / "llama_7b_r8" / "linear_4096x4096_r8.py").read_text()
        assert "Quantized" in text and not re.search(r"_8\(|_quantize|_largest", text)

    @pytest.mark.parametrize("base", ["plain", "nf4", "int8", "fp8-block"])
    @pytest.mark.parametrize("command", [(), ("explain",)], ids=["generate", "explain"])
    def test_it_is_refused_beside_other_bases(self, run, base: str, command: tuple[str, ...]) -> None:
        spec = (*command, "--arch", "llama-9m", "--rank", "4", "--base", base)
        for float8 in ("forward", "none"):
            message = f"--float8: {float8} needs --base fp8: other codes are multiplied in --dtype"
            assert run(*spec, "--float8", float8).error() == message
        assert "'half' is not one of 'both', 'forward', 'none'" in run(*spec, "--float8", "half").error()

    def test_rounding_that_nobody_asked_for_is_told_of(self, run) -> None:
        spec = ("explain", *self.SPEC, *self.GRAPH)
        told = "note: activations and gradients are rounded to float8 where that is faster, an error of 2.7 % of each "
        assert run(*spec).err.startswith(told)
        for more in (("--float8", "both"), ("--device", "a100"), ("--no-kernels",)):
            run(*spec, *more).ok()

    def test_explain_tells_what_it_gains(self, run) -> None:
        texts = [
            json.loads(run("explain", *self.SPEC, *self.GRAPH, "--float8", float8, "--json").ok().out)
            for float8 in ("both", "none")
        ]
        assert all(text["base"] == "fp8" for text in texts)
        chosen = [json.dumps(text) for text in texts]
        assert "float8-one_pass/float8" in chosen[0] and "float8-one_pass" not in chosen[1]
