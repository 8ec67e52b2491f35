"""A small Llama and a small mixture of experts with random weights, and adapters for them.

Imports nothing of this repository, so that it runs where only a generated package is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

RANK = 4
#: A workload for which an MLP of these sizes is computed as a whole: of many small launches, one is most of the price.
MLPS_PAY: dict[str, Any] = {"device": "a100", "launch": "graph", "dtype": "bf16"}
#: Rows and columns that have one scale where float8 has blocks.
BLOCK = (16, 32)
VOCABULARY = 50
#: Of the mixture of experts: how many, features of tokens and within, and how many a token has.
EXPERTS, HIDDEN, INNER, TOP_K = 4, 16, 24, 2
#: Its stacks, as PEFT takes them.
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = transformers.LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **options})
    return transformers.LlamaForCausalLM(config).to(dtype)


#: What all mixtures of experts here have, by the fields that most families call so.
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
}


def _mixture(family: str, dtype: torch.dtype, **options: Any) -> Any:
    """A family's language model of these sizes, and of its own; the same weights each time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **options})
    return larger(getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)).to(dtype)


def qwen3_moe(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return _mixture("Qwen3Moe", dtype, **{"moe_intermediate_size": INNER, "num_experts": EXPERTS, **options})


def mixtral(dtype: torch.dtype = torch.float32) -> Any:
    return _mixture("Mixtral", dtype, num_local_experts=EXPERTS)


def gpt_oss(dtype: torch.dtype = torch.float32) -> Any:
    return _mixture("GptOss", dtype, num_local_experts=EXPERTS)


def nemotron_h(dtype: torch.dtype = torch.float32) -> Any:
    options = {"moe_intermediate_size": INNER, "moe_shared_expert_intermediate_size": INNER}
    return _mixture("NemotronH", dtype, n_routed_experts=EXPERTS, layers_block_type=["moe", "attention"], **options)


def llama4(dtype: torch.dtype = torch.float32) -> Any:
    """Its experts are given rows."""
    return _mixture("Llama4Text", dtype, num_local_experts=EXPERTS, intermediate_size_mlp=INNER)


def larger(model: nn.Module) -> nn.Module:
    """Weights that matter: those of experts are near zero at first."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.3)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others know no float64
    return model


def coded(model: Any, storage: torch.dtype = torch.float32) -> Any:
    """The same on NF4 codes of bitsandbytes, their scales quantized too, in a dtype that FSDP shards with others."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            options = {"quant_type": "nf4", "quant_storage": storage}
            made: Any = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, **options
            )
            # Blocks that end where rows do: of others bitsandbytes reads wrong scales on some CPUs.
            made.weight = Params4bit(linear.weight.data, requires_grad=False, module=made, blocksize=32, **options)
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, made.to("cpu"))
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return model


def float8(linear: nn.Linear, base: str, **options: Any) -> Any:
    """A linear of Transformers with a plain one's weight in float8_e4m3fn."""
    weight = linear.weight.data.float()
    rows, columns = {"fp8-block": BLOCK, "fp8": tuple(weight.shape), "fbgemm": (1, weight.shape[1])}[base]
    blocks = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
    made: Any
    if base == "fbgemm":
        from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

        made = FbgemmFp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight_scale = nn.Parameter(scale)
    else:
        from transformers.integrations.finegrained_fp8 import FP8Linear

        size = BLOCK if base == "fp8-block" else None
        made = FP8Linear(linear.in_features, linear.out_features, size, has_bias=linear.bias is not None, **options)
        made.weight_scale_inv = nn.Parameter(scale if size else scale.view(()))
    made.weight, made.bias = nn.Parameter(codes), linear.bias
    return made


def in_float8(model: Any, base: str) -> Any:
    """The same with such linears."""
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, float8(linear, base))
    return model.requires_grad_(False)


def filled(model: nn.Module) -> Any:
    """Adapters that change the output: lora_B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def with_lora(model: Any = None, **options: Any) -> Any:
    """A PeftModel with adapters in all linears."""
    wide = options.pop("autocast_adapter_dtype", True)
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return filled(peft.get_peft_model(llama() if model is None else model, config, autocast_adapter_dtype=wide))


def checkpointed(model: Any, **options: Any) -> Any:
    """With activation checkpointing, whatever this version of Transformers calls that."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)
    return model


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Of a language model's loss, by the names of the parameters."""
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seeded(model: nn.Module, tokens: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """The same from a seed on, from which masks are drawn."""
    torch.manual_seed(seed)
    return gradients(model, tokens)


def outcome(model: Any, tokens: Tensor, seed: int = 3) -> Tensor:
    """The logits, likewise."""
    torch.manual_seed(seed)
    logits: Tensor = model(tokens).logits.detach()
    return logits


def bitwise(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Gradients are the same to the bit."""
    assert wanted and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def masks_drawn(modules: Iterable[Any], monkeypatch: Any) -> list[tuple[Tensor, float]]:
    """The masks that generated modules draw from now on, with the rates at which they do."""
    masks: list[tuple[Tensor, float]] = []
    for module in modules:

        def dropped(X: Tensor, dropout: float, draw: Any = module._dropped) -> tuple[Tensor, Tensor]:
            left, mask = draw(X, dropout)
            masks.append((mask.clone(), dropout))
            return left, mask

        monkeypatch.setattr(module, "_dropped", dropped)
    return masks


def computes_what_peft_would(package: Any, model: Any, base: Any, tokens: Tensor, folder: str, stacks: int) -> None:
    """Injected experts, saved and loaded by PEFT onto a base like theirs: outputs, and all gradients of factors."""
    package.save_adapter(model, folder)
    other = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(model, tokens), gradients(other, tokens)
    assert len(ours) == len(theirs) == 2 * stacks
    found = {name: module.stack for name, module in package.adapters.lora_layers(model).items()}
    for name, in_file in package.inject_experts.peft_names(found).items():
        parent, _, child = name.rpartition(".")
        for part in ("lora_A", "lora_B"):
            gradient = package.inject_experts.packed(part, ours[f"{parent}.lora.{child}.{part}"])
            wanted = theirs[f"base_model.model.{in_file}.{part}.default.weight"]
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def loads_peft_s(package: Any, model: Any, build: Callable[[], Any], tokens: Tensor, folder: str) -> None:
    """Adapters of experts that PEFT saved: into a model without any, into one with others, and back by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads patterns for parameters, and says that it does not
        model.save_pretrained(folder)
    wanted, other = model(tokens).logits, build()
    package.load_adapter(other, folder)
    torch.testing.assert_close(other(tokens).logits, wanted)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    package.load_adapter(other, folder)
    torch.testing.assert_close(other(tokens).logits, wanted)
    package.save_adapter(other, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(again(tokens).logits, wanted)
