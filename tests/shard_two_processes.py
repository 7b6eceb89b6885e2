"""Run by test_sharding.py under torchrun: each process writes what it found to a JSON file of its rank."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import timm_eps
from timm_eps.surgery.branches import gates, slots_by_block
from timm_eps.surgery.distributed import rewrap
from timm_eps.surgery.holding import held_slots
from timm_eps.surgery.removal import closed_slots, removed_slots
from timm_eps.surgery.sharding import is_sharded

EPOCHS, CLASSES = 5, 3
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(CLASSES, (16,), generator=torch.Generator().manual_seed(4))
BUDGET: dict[str, Any] = {"keep": 4, "warmup_epochs": 1, "ramp_epochs": 3, "patience": 2}


class Records(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def network(side: bool = False) -> Any:
    torch.manual_seed(0)
    config = timm_eps.EpsResNetConfig(
        architecture="eps_resnet20",
        num_labels=CLASSES,
        side_loss_weight=0.1 if side else 0.0,
        pretrained_cfg={"input_size": (3, 8, 8)},
    )
    return timm_eps.EpsResNetForImageClassification(config)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for path in slots_by_block(model.timm_model, gates(model)):
        fully_shard(model.timm_model.get_submodule(path), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(timm_eps.param_groups(model, 5e-2), lr=0.1, momentum=0.9)


def epoch(wrapped: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None) -> None:
    wrapped.train()
    rank = dist.get_rank()
    for images, labels in zip(IMAGES.split(8), LABELS.split(8), strict=True):
        half = slice(4 * rank, 4 * rank + 4)
        wrapped(images[half], labels=labels[half]).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def out_of_the_loss(model: nn.Module) -> list[str]:
    """The branches that count as removed after an epoch."""
    return sorted([*removed_slots(model), *held_slots(model)])


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in timm_eps.gathered(model).named_parameters()}


def course(sharded: bool, budget: dict[str, Any], epochs: int = EPOCHS) -> dict[str, Any]:
    """A training: per epoch what is settled, and what was due; and the model at the end."""
    model = network(side=True)
    pruner = timm_eps.EpsilonPruner(model, **budget)
    wrapped = shard(model) if sharded else DistributedDataParallel(model)
    pruner.optimizer = optimizer = sgd(model)
    found: dict[str, Any] = {"model": model, "pruner": pruner, "settled": [], "closed": [], "discarded": []}
    for _ in range(epochs):
        epoch(wrapped, optimizer)
        if pruner.step() and not sharded:
            rewrap(wrapped)
        found["settled"].append(out_of_the_loss(model))
        found["closed"].append(sorted(pruner.history[-1]["closed"]))
        found["discarded"].append(pruner.discarded)
    return found


def compared(budget: dict[str, Any]) -> dict[str, Any]:
    """A training under DDP, which removes branches, beside one under FSDP2, which holds them."""
    ddp, fsdp = course(False, budget), course(True, budget)
    small, whole = dict(ddp["model"].named_parameters()), parameters_of(fsdp["model"])
    return {
        "same": {key: ddp[key] == fsdp[key] for key in ("settled", "closed", "discarded")},
        "settled": fsdp["settled"],
        "removed live": removed_slots(fsdp["model"]),
        "weights": max((small[key] - whole[key]).abs().max().item() for key in small),
        "largest of held": max(value.abs().max().item() for key, value in whole.items() if key not in small),
        "model": fsdp["model"],
    }


def saving(model: nn.Module, out: Path) -> dict[str, Any]:
    """What is saved equals the live model; all loaders see it in test_sharding.py."""
    distribute_bn(model, 2, reduce=True)  # FSDP2 leaves the statistics of each process as they are
    model.eval()
    with torch.no_grad():
        live = model(IMAGES).logits
    timm_eps.save_pretrained(model, out / "saved")
    model.save_pretrained(out / "by transformers")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(out / "by state dict", state_dict=state, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    found = {}
    for name in ("saved", "by transformers", "by state dict"):
        loaded = timm.create_model(f"local-dir:{out / name}", pretrained=True).eval()
        with torch.no_grad():
            found[name] = torch.equal(loaded(IMAGES), live)
    with torch.no_grad():
        again = model(IMAGES).logits
    torch.save(live, out / f"logits_{dist.get_rank()}.pt")
    return {**found, "live is as before": torch.equal(again, live) and is_sharded(model)}


def said(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "not refused"


def refusals(model: nn.Module, out: Path) -> dict[str, str]:
    """What cannot be done with sharded parameters, and what is said."""
    found = {
        "remove_closed": said(timm_eps.remove_closed, model),
        "export_timm": said(timm_eps.export_timm, model, out / "export"),
        "analyze": said(timm_eps.analyze, model, [(IMAGES, LABELS)]),
    }
    mesh = init_device_mesh("cpu", (2,))
    stale = network()
    pruner = timm_eps.EpsilonPruner(stale, sgd(stale), **BUDGET)
    fully_shard(stale, mesh=mesh)
    found["optimizer before sharding"] = said(pruner.step)
    flat = network()
    pruner = timm_eps.EpsilonPruner(flat, **BUDGET)
    wrapper = FullyShardedDataParallel(flat, device_id=torch.device("cpu"))
    found["FSDP1 wrapper"] = said(timm_eps.gates, wrapper)
    found["FSDP1 inside"] = said(pruner.step)
    return found


def resumed(out: Path) -> dict[str, Any]:
    """A pruner made after sharding; and a training that stops and goes on, which must not differ from one that does
    not. With importance, clipped gradients, and a budget of parameters."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    budget = {"target_params": 0.5, "criterion": "importance", "warmup_epochs": 1, "ramp_epochs": 2, "patience": 1}

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, timm_eps.EpsilonPruner]:
        model = shard(network())
        optimizer = sgd(model)
        return model, optimizer, timm_eps.EpsilonPruner(model, optimizer, **budget)

    model, optimizer, pruner = begun()
    for index in range(5):
        epoch(model, optimizer, clip=1.0)
        pruner.step()
        if index == 2:
            held = held_slots(model)
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.save(state, checkpoint_id=out / "dcp")
            (out / f"pruner_{dist.get_rank()}.json").write_text(json.dumps(pruner.state_dict()))
            buffers = {name: value.clone() for name, value in model.named_buffers()}
    again, optimizer_again, pruner_again = begun()
    pruner_again.load_state_dict(json.loads((out / f"pruner_{dist.get_rank()}.json").read_text()))
    state = {
        "model": get_model_state_dict(again),
        "optimizer": get_optimizer_state_dict(again, optimizer_again),
    }
    dcp.load(state, checkpoint_id=out / "dcp")
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, optimizer_again, state["optimizer"])
    for name, value in again.named_buffers():  # each process has its own statistics
        value.copy_(buffers[name])
    held_again = held_slots(again)
    for _ in range(2):
        epoch(again, optimizer_again, clip=1.0)
        pruner_again.step()
    one, other = parameters_of(model), parameters_of(again)
    whole = timm_eps.gathered(model)
    dense = sum(value.numel() for value in one.values())
    timm_eps.remove_closed(whole)
    return {
        "held": held,
        "held again": held_again,
        "same weights": all(torch.equal(one[name], other[name]) for name in one),
        "same history": pruner.history == pruner_again.history,
        "share": sum(value.numel() for value in whole.parameters()) / dense,
        "closed": closed_slots(model),
    }


def gathering(model: nn.Module) -> dict[str, Any]:
    """A whole copy trains by itself; the first process alone gets one where that is asked for."""
    whole, plain = timm_eps.gathered(model), network()
    whole.train()(IMAGES, labels=LABELS).loss.backward()
    return {
        "classes": [type(part).__name__ for part in whole.modules()] == [type(part).__name__ for part in
                                                                        network(side=True).modules()],
        "side": whole.side_head is not None and next(whole.side_head.parameters()).grad is not None,
        "plain": timm_eps.gathered(plain) is plain,
        "on main": timm_eps.gathered(model, on_main=True) is not None,
        "slots": list(gates(whole)) == list(gates(model)),
    }  # fmt: skip


def inside() -> dict[str, Any]:
    """A network in an outer module, which alone is sharded: an evaluation leaves it with whole parameters."""
    outer = nn.Sequential(network().timm_model)
    body = outer[0]
    pruner = timm_eps.EpsilonPruner(body, epsilon=1e9, patience=1)
    fully_shard(outer, mesh=init_device_mesh("cpu", (2,)))
    pruner.optimizer = sgd(body)
    outer(IMAGES).square().mean().backward()
    pruner.optimizer.step()
    outer.eval()
    with torch.no_grad():
        live = outer(IMAGES)
        pruner.step()
        held = outer(IMAGES)
        return {
            "removed": removed_slots(body),
            "held": len(held_slots(body)),
            "equal": torch.equal(timm_eps.gathered(body)(IMAGES), held),
            "changed": not torch.equal(live, held),
            "taught": torch.equal(timm_eps.Distillation.of_itself(body).answer(IMAGES), held),
        }


def criterion() -> list[str]:
    """Which branches a measured criterion closes first, with whole copies of the network."""
    order = timm_eps.LeaveOneOut([(IMAGES, LABELS)], loss=F.cross_entropy)
    fresh = shard(network())
    pruner = timm_eps.EpsilonPruner(fresh, sgd(fresh), keep=6, criterion=order, ramp_epochs=1, patience=1)
    for _ in range(3):
        epoch(fresh, pruner.optimizer)
        pruner.step()
    return closed_slots(fresh)


def script(out: Path) -> dict[str, Any]:
    """train_hf.py with FSDP2, as on GPUs: Accelerate does not shard on CPUs unless it is told that it does."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    import train_hf

    short = [
        *("--architecture", "eps_resnet20", "--num_threads", "1", "--max_eval_samples", "45", "--keep", "3"),
        *("--per_device_eval_batch_size", "7", "--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1"),
        *("--num_train_epochs", "4", "--max_train_samples", "124", "--per_device_train_batch_size", "8"),
    ]
    found: dict[str, Any] = {}

    def run(name: str, *arguments: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            results = train_hf.main([*short, *arguments, "--output_dir", str(out / name)])
            found[name] = {key: results[key] for key in ("eval_accuracy_by_epoch", "train_loss_by_epoch")}
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()

    train_hf.publishing.paired_seconds = lambda *_: {"dense_": [1.0] * 3, "": [1.0] * 3}
    Accelerator.end_training = lambda self: None  # it would close the connection that the next run needs
    run("ddp")
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    run("on a CPU")
    with sharding_on_cpus():
        run("fsdp", "--checkpointing_steps", "5")
        run("resumed", "--resume_from_checkpoint", str(out / "fsdp/checkpoint-20"))
        run("dense first", "--teacher", "self", "--num_train_epochs", "2", "--mixed_precision", "bf16")
        for option in ("--model_ema", "--channels_last", "--compile"):
            run(option, option)
        os.environ["FSDP_VERSION"] = "1"
        run("fsdp1")
    return found


@contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Let Accelerate run its code for FSDP2 on CPUs, where it ignores the plugin otherwise."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def shards(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", shards):
        yield


class Images(torch.utils.data.Dataset):
    """The images as Trainer reads them."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


def trainer(out: Path) -> dict[str, Any]:
    """Trainer with FSDP2 to the end, and from a checkpoint of either form to the end."""
    found = {}
    with sharding_on_cpus():
        for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            for resume in (None, str(out / form / "checkpoint-6")):
                callback = timm_eps.EpsilonCallback(keep=4, warmup_epochs=1, ramp_epochs=2, patience=1)
                arguments = TrainingArguments(
                    str(out / form),
                    num_train_epochs=4, per_device_train_batch_size=4, weight_decay=0.5, learning_rate=0.02,
                    report_to=[], save_strategy="epoch", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
                    fsdp=True, fsdp_config={"state_dict_type": form},
                )  # fmt: skip
                it = Trainer(network(), arguments, train_dataset=Images(), callbacks=[callback])
                it.train(resume_from_checkpoint=resume)
                weights = b"".join(value.numpy().tobytes() for value in parameters_of(it.model).values())
                distribute_bn(it.model, 2, reduce=True)
                it.model.eval()
                with torch.no_grad():
                    live = it.model(IMAGES).logits
                it.save_model(out / form / "by trainer")
                timm_eps.save_pretrained(it.model, out / form / "saved")
                dist.barrier()
                saved = [path for path in (out / form / "by trainer", out / form / "saved") if path.exists()]
                loaded = [timm.create_model(f"local-dir:{path}", pretrained=True).eval() for path in saved]
                with torch.no_grad():
                    equal = [torch.equal(each(IMAGES), live) for each in loaded]
                found[f"{form}, {'resumed' if resume else 'whole'}"] = {
                    "held": held_slots(it.model), "weights": hashlib.sha256(weights).hexdigest(), "equal": equal,
                }  # fmt: skip
    os.environ.pop("ACCELERATE_USE_FSDP")
    return found


PARTS = {"trainer": trainer, "resumed": resumed, "criterion": lambda out: criterion(), "script": script}


def main(out: Path, *names: str) -> None:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: PARTS[name](out) for name in names}
    if not names:
        records = Records()
        logging.getLogger("timm_eps").addHandler(records)
        found = compared(BUDGET)
        model = found.pop("model")
        found |= {"warnings": list(records.messages), "gathering": gathering(model), "saving": saving(model, out)}
        found |= {"inside": inside(), "refusals": refusals(model, out)}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
