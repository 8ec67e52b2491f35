"""Accelerated and injected models over several processes, against the same in one.

The tests call ``check`` in processes that they fork. By hand, also where neither the generator nor pytest is:

    torchrun --nproc-per-node 2 tests/integration/distributed_worker.py --backend nccl --package OUT/llama_r4 --json F

where OUT holds ``runlora_gen.generate(models.llama(), rank=models.RANK, output=OUT)``. With ``--checks experts`` it is
``models.qwen3_moe()``, and with ``target_parameters=models.STACKS``; with ``--checks mlps`` the first, made with
``**models.MLPS_PAY``, too; with ``--checks plans`` also with a ``memory_budget`` that leaves layers neither all nor
their input alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

if __package__:
    from .models import (
        RANK,
        STACKS,
        VOCABULARY,
        checkpointed,
        coded,
        filled,
        gradients,
        in_float8,
        llama,
        qwen3_moe,
        with_lora,
    )
else:  # torchrun
    from models import (
        RANK,
        STACKS,
        VOCABULARY,
        checkpointed,
        coded,
        filled,
        gradients,
        in_float8,
        llama,
        qwen3_moe,
        with_lora,
    )

#: What float32 sums in another order differ by, of the largest value.
NEAR = 1e-4
ROWS, LENGTH = 4, 9
Finding = dict[str, float | int | str]


class Setting:
    """Where a check runs, and on what."""

    def __init__(self, package: Any, device: str, folder: Path) -> None:
        self.package = package
        self.device = device
        self.folder = folder
        self.mesh: DeviceMesh = init_device_mesh(device, (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator).to(device)

    def base(self) -> Any:
        """A frozen model, whose linears are those of the package: quantized if that is for such."""
        base = self.package.shapes.BASE
        if base.startswith("fp8"):
            return in_float8(llama(), base).to(self.device)
        return (coded(llama()) if base == "4 bits" else llama()).to(self.device)

    def peft(self) -> Any:
        """A PeftModel, its layers as PEFT has them."""
        return with_lora(self.base()).to(self.device)

    def accelerated(self) -> Any:
        model = self.peft()
        self.package.accelerate(model, strict=True)
        return model

    def injected(self) -> Any:
        """With the adapters that ``peft`` has."""
        model = self.base()
        self.package.inject_lora(model, RANK, 8)
        model.load_state_dict({plain(name): p for name, p in self.peft().named_parameters() if "lora_" in name}, False)
        return model

    def ours(self) -> Iterator[tuple[str, Any]]:
        yield "PEFT", self.accelerated()
        yield "injected", self.injected()

    def wanted(self) -> dict[str, Tensor]:
        """The gradients of PEFT's own layers in one process."""
        return {plain(name): gradient for name, gradient in gradients(self.peft(), self.tokens).items()}


def plain(name: str) -> str:
    """The name of an injected layer's parameter, from that of PEFT's, also in DDP."""
    return name.removeprefix("module.").removeprefix("base_model.model.").replace(".default.weight", "")


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def found_in(model: nn.Module, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """What ``of`` gives of each trained parameter, gathered."""
    found = {plain(name): of(p) for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(tensor).detach().clone() for name, tensor in found.items() if tensor is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, in parts of the largest value of the same tensor."""
    assert wanted and found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:3]
    pairs = [(found[name].double().cpu(), wanted[name].double().cpu()) for name in wanted]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = NEAR) -> float:
    off = distance(found, wanted)
    assert off <= limit, f"off by {off:.1e} of the largest value, above {limit:.1e}"
    return off


def blocks_of(model: Any) -> Any:
    inner = getattr(model, "base_model", model)
    inner = getattr(inner, "model", inner)
    return getattr(inner, "model", inner).layers


def sharded(model: Any, mesh: DeviceMesh, *, each: bool = False, **options: Any) -> Any:
    """Its blocks, or each of the attention's linears before; and all that is left."""
    for block in blocks_of(model):
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj) if each else ():
            fully_shard(linear, mesh=mesh, **options)
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


# Checks: each returns what it measured, and raises where that is not as it must be


def ddp(setting: Setting) -> Finding:
    """Gradients of the batch from its parts, with and without activation checkpointing."""
    wanted, found = setting.wanted(), Finding()
    rank, world = dist.get_rank(), dist.get_world_size()
    part = setting.tokens.chunk(world)[rank]
    for kind, model in setting.ours():
        for name, ready in (("", model), (" checkpointed", checkpointed(model.train(), use_reentrant=False))):
            parallel = nn.parallel.DistributedDataParallel(ready)
            found[f"{kind}{name}"] = near({plain(n): g for n, g in gradients(parallel, part).items()}, wanted)
    return found


def biases(setting: Setting) -> Finding:
    """Gradients of adapters with biases, over linears with one and without: DDP's, and those of shards."""

    def base() -> Any:
        return llama(attention_bias=True).to(setting.device)

    def peft() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lora_bias=True")  # can't be merged into linears without one
            return with_lora(base(), lora_bias=True).to(setting.device)

    def biased_plain(name: str) -> str:
        return plain(name.replace("lora_B.default.bias", "lora_bias"))

    def ours() -> Iterator[tuple[str, Any]]:
        accelerated, injected = peft(), base()
        setting.package.accelerate(accelerated, strict=True)
        yield "PEFT", accelerated
        setting.package.inject_lora(injected, RANK, 8, lora_bias=True)
        adapters = {biased_plain(name): p for name, p in peft().named_parameters() if "lora_" in name}
        injected.load_state_dict(adapters, False)
        yield "injected", injected

    wanted = {biased_plain(name): gradient for name, gradient in gradients(peft(), setting.tokens).items()}
    found, part = Finding(), setting.tokens.chunk(dist.get_world_size())[dist.get_rank()]
    for kind, model in ours():
        parallel = nn.parallel.DistributedDataParallel(model)
        found[kind] = near({biased_plain(n): g for n, g in gradients(parallel, part).items()}, wanted)
    for kind, model in ours():
        shards = gradients(sharded(model, setting.mesh), setting.tokens)
        found[f"{kind}, sharded"] = near({biased_plain(n): whole(g) for n, g in shards.items()}, wanted)
    return found


def fsdp(setting: Setting) -> Finding:
    """Gradients, and parameters after two steps of AdamW; sharded again after the forward or not, and offloaded."""
    wanted, found = setting.wanted(), Finding()
    trained = two_steps(setting, setting.peft())
    cases = {
        "resharded": {"reshard_after_forward": True},
        "not resharded": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=setting.device != "cpu")},
    }
    for case, options in cases.items():
        for kind, model in setting.ours():
            model = sharded(model, setting.mesh, **options)
            off = near({plain(n): whole(g) for n, g in gradients(model, setting.tokens).items()}, wanted)
            found[f"{kind}, {case}"] = max(off, near(two_steps(setting, model), trained, 1e-3))
    return found


def fsdp_alone(setting: Setting) -> Finding:
    """Gradients against those in one process, where PEFT's own layers can't run."""
    found: Finding = {}
    whole_ones, sharded_ones = dict(setting.ours()), dict(setting.ours())
    for kind, model in whole_ones.items():
        wanted = {plain(name): gradient for name, gradient in gradients(model, setting.tokens).items()}
        model = sharded(sharded_ones[kind], setting.mesh)
        found[kind] = near({plain(n): whole(g) for n, g in gradients(model, setting.tokens).items()}, wanted)
    return found


def two_steps(setting: Setting, model: Any) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(setting.tokens, labels=setting.tokens).loss.backward()
        optimizer.step()
    return found_in(model, lambda parameter: parameter)


def groups(setting: Setting) -> Finding:
    """Where the package has modules of groups: the same, and how often they were run, by DDP and by FSDP2."""
    wanted, found, run = setting.wanted(), Finding(), 0
    grouped = getattr(setting.package, "groups", None)
    compute = getattr(grouped, "compute", None)

    def counted(*given: Any) -> Any:
        nonlocal run
        run += 1
        return compute(*given)

    if grouped is not None:
        grouped.compute = counted
    for kind, model in setting.ours():
        run = 0
        part = setting.tokens.chunk(dist.get_world_size())[dist.get_rank()]
        parallel = nn.parallel.DistributedDataParallel(model)
        near({plain(n): g for n, g in gradients(parallel, part).items()}, wanted)
        found[f"{kind}, DDP"], run = run, 0
        parallel = sharded(checkpointed(model.train(), use_reentrant=False), setting.mesh)
        near({plain(n): whole(g) for n, g in gradients(parallel, setting.tokens).items()}, wanted)
        found[f"{kind}, FSDP2 checkpointed"], run = run, 0
        model = sharded(next(each for name, each in setting.ours() if name == kind), setting.mesh, each=True)
        near({plain(n): whole(g) for n, g in gradients(model, setting.tokens).items()}, wanted)
        found[f"{kind}, FSDP2 of each linear"] = run
    if grouped is not None:
        grouped.compute = compute
    return found


def mlps(setting: Setting) -> Finding:
    """Of a package that has one for MLPs as a whole: gradients, and how often they were run, by DDP and by FSDP2."""
    wanted, found, run = setting.wanted(), Finding(), 0
    whole_ones = setting.package.mlps
    compute = whole_ones.compute

    def counted(*given: Any) -> Any:
        nonlocal run
        run += 1
        return compute(*given)

    def shards_of(kind: str, part: str = "") -> Any:
        """Of each block; first of its MLP, or of one of its linears, by itself."""
        model = next(each for name, each in setting.ours() if name == kind)
        for block in blocks_of(model) if part else ():
            fully_shard(block.get_submodule(part), mesh=setting.mesh)
        return sharded(model, setting.mesh)

    whole_ones.compute = counted
    part = setting.tokens.chunk(dist.get_world_size())[dist.get_rank()]
    for kind, model in setting.ours():
        run = 0
        parallel = nn.parallel.DistributedDataParallel(model)
        near({plain(n): g for n, g in gradients(parallel, part).items()}, wanted)
        found[f"{kind}, DDP"] = run
        for case, shards in {
            "FSDP2": shards_of(kind),
            "FSDP2 of each MLP": shards_of(kind, "mlp"),
            "FSDP2 of each down_proj": shards_of(kind, "mlp.down_proj"),
            "FSDP2 checkpointed": sharded(checkpointed(model.train(), use_reentrant=False), setting.mesh),
        }.items():
            run = 0
            near({plain(n): whole(g) for n, g in gradients(shards, setting.tokens).items()}, wanted)
            found[f"{kind}, {case}"] = run
    whole_ones.compute = compute
    return found


def plans(setting: Setting) -> Finding:
    """Of a package with a plan: gradients in 16 bits, and how often norms made again what they had given."""
    norms, found, run = setting.package.norms, Finding(), 0
    made_again = norms._made_again

    def counted(*given: Any) -> Any:
        nonlocal run
        run += 1
        return made_again(*given)

    def planned() -> Any:
        model = with_lora(llama(torch.bfloat16), autocast_adapter_dtype=False).train().to(setting.device)
        setting.package.accelerate(model, strict=True)
        return model

    norms._made_again = counted
    wanted = {plain(n): g for n, g in gradients(planned(), setting.tokens).items()}
    part = setting.tokens.chunk(dist.get_world_size())[dist.get_rank()]
    for case, model, batch in (
        ("DDP", nn.parallel.DistributedDataParallel(planned()), part),
        ("FSDP2", sharded(planned(), setting.mesh), setting.tokens),
    ):
        run = 0
        near({plain(n): whole(g) for n, g in gradients(model, batch).items()}, wanted, 0.05)
        found[case] = run
    norms._made_again = made_again
    return found


def peft_on_experts(setting: Setting) -> Any:
    model = qwen3_moe().to(setting.device)
    return with_lora(model, target_modules=[], target_parameters=STACKS).to(setting.device)


def experts(setting: Setting) -> Finding:
    """Gradients of adapters on stacks of experts: by DDP, by FSDP2 of blocks, and of what is called for the experts."""

    def accelerated() -> Any:
        model = peft_on_experts(setting)
        setting.package.accelerate(model, strict=True)
        return model

    def injected() -> Any:
        model = qwen3_moe().to(setting.device)
        setting.package.inject_lora(model, RANK, 8, target_parameters=STACKS)
        return filled(model)

    found, part = Finding(), setting.tokens.chunk(dist.get_world_size())[dist.get_rank()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "experts with LoRA run PEFT's own code")
        warnings.filterwarnings("error", ".*returned a view tensor")
        for kind, made in (("PEFT", accelerated), ("injected", injected)):
            alone = peft_on_experts(setting) if made is accelerated else injected()
            wanted = {plain(name): gradient for name, gradient in gradients(alone, setting.tokens).items()}
            parallel = nn.parallel.DistributedDataParallel(made())
            found[f"{kind}, DDP"] = near({plain(n): g for n, g in gradients(parallel, part).items()}, wanted)
            itself = made()
            for block in blocks_of(itself):
                fully_shard(block.mlp.experts, mesh=setting.mesh)
            for case, model in {
                "FSDP2": made(),
                "FSDP2 checkpointed": checkpointed(made().train(), use_reentrant=False),
                "FSDP2 of experts": itself,
            }.items():
                shards = gradients(sharded(model, setting.mesh), setting.tokens)
                found[f"{kind}, {case}"] = near({plain(n): whole(g) for n, g in shards.items()}, wanted)
    return found


def experts_in_wrappers(setting: Setting) -> Finding:
    """The module in PEFT's wrappers sharded by itself: left, and PEFT, which reads it before it is gathered, fails."""
    model = peft_on_experts(setting)
    setting.package.accelerate(model, strict=True)
    for block in blocks_of(model):
        fully_shard(block.mlp.experts.get_base_layer(), mesh=setting.mesh)
    model = sharded(model, setting.mesh)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            model(setting.tokens)
        except RuntimeError as error:
            assert "got mixed torch.Tensor and DTensor" in str(error), error
        else:
            raise AssertionError("PEFT's code ran on shards")
    reason = "experts with LoRA run PEFT's own code: there are hooks on its parts"
    assert [str(warning.message) for warning in seen] == [reason], seen
    return {"left": 1}


def fsdp_mixed_precision(setting: Setting) -> Finding:
    """With bf16 parameters and float32 sums of gradients: at most twice PEFT's error under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wanted, errors = setting.wanted(), {}
    for kind, model in (("plain PEFT", setting.peft()), *setting.ours()):
        model = sharded(model, setting.mesh, mp_policy=policy)
        found = {plain(name): whole(g) for name, g in gradients(model, setting.tokens).items()}
        errors[kind] = sum(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
        errors[kind] /= len(wanted)
    assert 1e-4 < errors["plain PEFT"] < 0.1, errors
    assert max(errors.values()) <= 2 * errors["plain PEFT"], errors
    return {**errors}


def fsdp_adapter_files(setting: Setting) -> Finding:
    """An adapter that is saved from shards is the one of the whole model."""
    from safetensors.torch import load_file

    model = sharded(setting.injected(), setting.mesh)
    setting.package.save_adapter(model, setting.folder / "sharded")
    dist.barrier()
    alone = {
        f"base_model.model.{name}.weight": p for name, p in setting.injected().named_parameters() if p.requires_grad
    }
    found = load_file(setting.folder / "sharded" / "adapter_model.safetensors")
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name].cpu()) for name in alone)
    try:
        setting.package.merge(model)
    except ValueError as error:
        assert "weights are sharded" in str(error)
    else:
        raise AssertionError("shards were merged")
    return {"tensors": len(found)}


def save_distributed(setting: Setting) -> Finding:
    """Save the shards of a model that has been trained for two steps, and what they are as a whole."""
    for kind, model in setting.ours():
        trained = two_steps(setting, sharded(model, setting.mesh))
        checkpoint.save(get_model_state_dict(model), checkpoint_id=setting.folder / kind)
        if dist.get_rank() == 0:
            torch.save(trained, setting.folder / f"{kind}.pt")
    return {"ranks": dist.get_world_size()}


def load_distributed(setting: Setting) -> Finding:
    """Load those shards, on another number of ranks."""
    for kind, model in setting.ours():
        model = sharded(model, setting.mesh)
        state = get_model_state_dict(model)
        checkpoint.load(state, checkpoint_id=setting.folder / kind)
        set_model_state_dict(model, state)
        wanted = torch.load(setting.folder / f"{kind}.pt", map_location=setting.device)
        found = found_in(model, lambda parameter: parameter)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    return {"ranks": dist.get_world_size()}


def tensor_parallel_peft(setting: Setting) -> Finding:
    """Column- and row-wise linears of PEFT's layers: they are left to PEFT with a warning, and equal."""
    wanted, model = setting.wanted(), setting.peft()
    columns = {"base_layer": ColwiseParallel(), "lora_B.default": ColwiseParallel()}
    rows = {"base_layer": RowwiseParallel(), "lora_A.default": RowwiseParallel()}
    for block in blocks_of(model):
        parallelize_module(block.mlp.up_proj, setting.mesh, columns)
        parallelize_module(block.mlp.gate_proj, setting.mesh, columns)
        parallelize_module(block.mlp.down_proj, setting.mesh, rows)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = setting.package.accelerate(model)
    assert sum("PEFT's own code runs in: 6 left" in str(warning.message) for warning in seen) == 1, seen
    assert len(report.left) == 6 and len(report.accelerated) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {plain(name): whole(g) for name, g in gradients(model, setting.tokens).items()}
    return {"off": near(found, wanted), "left": len(report.left)}


def tensor_parallel_injected(setting: Setting) -> Finding:
    """Injected layers whose parameters are DTensors, by columns and by rows; and a base that is sharded is refused."""
    styles = {
        "up_proj": {"weight": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)},
        "down_proj": {"weight": Shard(1), "lora_A": Shard(1), "lora_B": Replicate()},
    }
    found = Finding()
    for name, placements in styles.items():
        alone, layer = (getattr(blocks_of(setting.injected())[0].mlp, name) for _ in range(2))
        for part, placement in placements.items():
            parameter = getattr(layer, part)
            shards = distribute_tensor(parameter.detach(), setting.mesh, [placement])
            setattr(layer, part, nn.Parameter(shards, requires_grad=parameter.requires_grad))
        x = torch.randn(ROWS, LENGTH, layer.in_features).to(setting.device)
        dist.broadcast(x, 0)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = alone(inputs[0])
        split = Shard(-1) if name == "down_proj" else Replicate()
        given = DTensor.from_local(inputs[1], setting.mesh, [Replicate()]).redistribute(placements=[split])
        output = layer(given).full_tensor()
        gradient = wanted.detach().square()
        wanted.backward(gradient)
        output.backward(gradient)
        tensors = {"Y": (output, wanted), "dX": (inputs[1].grad, inputs[0].grad)}
        tensors |= {part: (getattr(layer, part).grad, getattr(alone, part).grad) for part in ("lora_A", "lora_B")}
        pairs = {part: tuple(whole(tensor).detach() for tensor in pair) for part, pair in tensors.items()}
        found[name] = near(*({part: pair[i] for part, pair in pairs.items()} for i in range(2)))
    model = llama().to(setting.device)
    parallelize_module(blocks_of(model)[0].mlp.up_proj, setting.mesh, ColwiseParallel())
    try:
        setting.package.inject_lora(model, RANK, 8)
    except ValueError as error:
        assert "layers.0.mlp.up_proj is sharded: inject before that" in str(error), error
    else:
        raise AssertionError("an adapter was put into a sharded linear")
    return found


#: Of a package for mixtures of experts, of one that has a module for MLPs, and of one that has a plan.
OF_EXPERTS, OF_MLPS, OF_PLANS = ("experts", "experts_in_wrappers"), ("mlps",), ("plans",)
CHECKS = {
    check.__name__: check
    for check in (
        ddp,
        biases,
        fsdp,
        fsdp_alone,
        groups,
        mlps,
        plans,
        experts,
        experts_in_wrappers,
        fsdp_mixed_precision,
        fsdp_adapter_files,
        tensor_parallel_peft,
        tensor_parallel_injected,
        save_distributed,
        load_distributed,
    )
}


def check(package: Path, names: list[str], device: str, folder: Path) -> dict[str, Finding]:
    """Run checks in a process group that is there already; what each of them measured."""
    sys.path.insert(0, str(package.parent))
    setting = Setting(importlib.import_module(package.name), device, folder)
    found = {}
    for name in names:
        torch.manual_seed(0)
        found[name] = CHECKS[name](setting)
        dist.barrier()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, required=True, help="a generated package for models.llama()")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument(
        "--checks", choices=("linears", "experts", "mlps", "plans"), default="linears", help="what the package is for"
    )
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    device = "cuda" if options.backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    # gloo serves tensors that are offloaded to the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    shared: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    others = [name for name in CHECKS if name not in (*OF_EXPERTS, *OF_MLPS, *OF_PLANS)]
    of_kinds = {"experts": list(OF_EXPERTS), "mlps": list(OF_MLPS), "plans": list(OF_PLANS)}
    names = {"linears": others, **of_kinds}[options.checks]
    found = check(options.package.resolve(), names, device, Path(str(shared[0])))
    if dist.get_rank() == 0:
        versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "peft")}
        where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        result = {"device": where, "ranks": dist.get_world_size(), "backend": options.backend, **versions}
        text = json.dumps({**result, "checks": found}, indent=2) + "\n"
        print(text, end="")
        if options.json:
            options.json.write_text(text, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
