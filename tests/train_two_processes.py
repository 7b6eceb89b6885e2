"""Run by test_processes.py under torchrun. Each process writes its findings to a file of its rank."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_eps
import train_hf
from timm_eps import EpsilonPruner
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import removed_slots
from timm_eps.training.interruption import InterruptionError
from timm_eps.training.sync_batchnorm import synchronize_batchnorm


def digest(values: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def stopped(arguments: list[str], rank: int) -> str:
    """A run in which one process is told to stop at step 12. Returns the output of each process."""
    take_step = train_hf.take_step

    def and_be_told(run):
        take_step(run)
        if dist.get_rank() == rank and run.progress.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(train_hf, "take_step", and_be_told):
        try:
            train_hf.main(arguments)
        except InterruptionError as error:
            return str(error)
    return "not stopped"


def train(arguments: list[str], kill_rank: int | None = None) -> dict:
    """A run, and the state of this process at its end, before the main process measures and saves alone."""
    seen: dict = {"synchronised": []}
    train_it, end_epoch, step = train_hf.train, train_hf.end_epoch, EpsilonPruner.step

    def and_look(*args, **begun):
        run, results = train_it(*args, **begun)
        optimized = [p for group in run.optimizer.param_groups for p in group["params"]]
        own = list(run.model.parameters())
        seen.update(
            results=dict(results),
            removed=removed_slots(run.model),
            parameters=digest(dict(run.model.named_parameters())),
            buffers=digest(dict(run.model.named_buffers())),
            # The digest above includes buffers outside the state dict. The saved tensors are:
            state=digest(run.model.state_dict()),
            optimizer_fits={id(p) for p in optimized} == {id(p) for p in own},
            removed_in=[record["epoch"] for record in run.pruner.history if record["removed"]] if run.pruner else [],
        )
        return run, results

    def and_compare(run):
        end_epoch(run)
        seen["synchronised"].append(digest(dict(run.model.named_parameters())))

    def and_die(self):
        removed = step(self)
        if removed and dist.get_rank() == kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return removed

    with (
        mock.patch.object(train_hf, "train", and_look),
        mock.patch.object(train_hf, "end_epoch", and_compare),
        mock.patch.object(EpsilonPruner, "step", and_die if kill_rank is not None else step),
        mock.patch.object(train_hf.publishing, "check_reload", return_value="not tried"),
        mock.patch("timm_eps.hub.saving.draw_blocks", lambda *found: Path(found[3]).write_bytes(b"not drawn")),
        mock.patch.object(train_hf.publishing, "paired_seconds", return_value={"dense_": [1.0] * 3, "": [1.0] * 3}),
    ):
        train_hf.main(arguments)
    return seen


def refused(arguments: list[str]) -> str:
    try:
        train_hf.main(arguments)
    except ValueError as error:
        return str(error)
    return "not refused"


def decisions(rank: int) -> dict:
    """The first block is below ε in one process, the second in both; the third is shared before the decision."""
    model = timm_eps.EpsResNetForImageClassification(timm_eps.EpsResNetConfig(architecture="eps_resnet20"))
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    slots = list(gates(model))
    for slot, responses in zip(slots, [(0.5, 2.0), (0.5, 0.7), *[(3.0, 2.0)] * 7], strict=True):
        gates(model)[slot].response.fill_(responses[rank])
    pruner.share_responses()
    shared = [gate.response.item() for gate in gates(model).values()]
    removed = pruner.step()
    by_importance = EpsilonPruner(model, keep=7, criterion="importance")
    for gate in gates(model).values():
        gate.response.fill_(1.0)
        gate.importance.fill_((1.0, 4.0)[rank])
    gates(model)[slots[4]].importance.fill_((0.5, 2.5)[rank])
    for _ in range(2):  # sharing again changes nothing
        by_importance.share_responses()
    importances = [gate.importance.item() for gate in gates(model).values()]
    by_importance.step()
    due = [slot for slot, gate in gates(model).items() if gate.epsilon]
    return {"slots": slots, "shared": shared, "removed": removed, "importances": importances, "due": due}


def batch_norms(rank: int) -> dict:
    """Largest differences from one process on the joint batch, by layer and quantity."""
    found = {}
    layers = {
        "BatchNorm2d": nn.BatchNorm2d(5),
        "cumulative": nn.BatchNorm2d(5, momentum=None),
        "without affine": nn.BatchNorm2d(5, affine=False),
        "BatchNormAct2d": BatchNormAct2d(5),
        "without act": BatchNormAct2d(5, apply_act=False),
    }
    sizes = [3, 6]
    mine = slice(0, 3) if rank == 0 else slice(3, 9)
    for name, layer in layers.items():
        generator = torch.Generator().manual_seed(1)
        if layer.affine:
            nn.init.uniform_(layer.weight, generator=generator)
            nn.init.uniform_(layer.bias, generator=generator)
        joint, shared = copy.deepcopy(layer), nn.Sequential(layer)
        shared.register_parameter("other", nn.Parameter(torch.zeros(1)))  # the conversion reads its device
        assert synchronize_batchnorm(shared) is shared
        keys = ["0." + key for key in joint.state_dict()]
        largest: dict[str, float] = dict.fromkeys(("output", "input", "weight", "bias", "mean", "var"), 0.0)

        def note(what: str, one: torch.Tensor, other: torch.Tensor, largest=largest) -> None:
            largest[what] = max(largest[what], (one - other).abs().max().item())

        for _ in range(3):
            x = torch.randn(sum(sizes), 5, 4, 3, generator=generator) * 3 + 7
            towards = torch.randn(x.shape, generator=generator)
            whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
            joint.zero_grad()
            shared.zero_grad()
            expected, got = joint(whole), shared(part)
            expected.backward(towards)
            got.backward(towards[mine])
            note("output", got, expected[mine])
            note("input", part.grad, whole.grad[mine])
            if joint.affine:
                for what in ("weight", "bias"):
                    summed = getattr(layer, what).grad.clone()
                    dist.all_reduce(summed)
                    note(what, summed, getattr(joint, what).grad)
            note("mean", layer.running_mean, joint.running_mean)
            note("var", layer.running_var, joint.running_var)
        found[name] = {
            **largest,
            "tracked": layer.num_batches_tracked.item() == joint.num_batches_tracked.item() == 3,
            "keys": list(shared.state_dict()) == ["other", *keys],
            "evaluated": torch.equal(shared.eval()(part), _with_state_of(layer, joint).eval()(part)),
        }
    return found


def _with_state_of(layer: nn.Module, plain: nn.Module) -> nn.Module:
    plain.load_state_dict(layer.state_dict())
    return plain


def wrapped(rank: int) -> bool:
    """Whether DistributedDataParallel around the exchanged layers gives all processes the same gradients."""
    torch.manual_seed(0)
    model = synchronize_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    wrapper = DistributedDataParallel(model)
    wrapper(torch.randn(2 + rank, 3, 6, 6)).square().mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    others = [torch.empty_like(gradients) for _ in range(2)]
    dist.all_gather(others, gradients)
    return torch.equal(*others)


def main(out: Path) -> None:
    """A file holds the tasks: names of runs with arguments, or names of the functions here."""
    found = {}
    gc.freeze()  # each training collects garbage
    dist.init_process_group("gloo")
    todo = json.loads((out / "todo.json").read_text())
    end_training = Accelerator.end_training
    for name, arguments in todo.items():
        # The test closes the processes' connection, which the next run needs.
        Accelerator.end_training = end_training if name == list(todo)[-1] else lambda self: None
        if name.startswith("refused"):
            found[name] = refused(arguments)
        elif name == "stopped":
            found[name] = stopped(arguments, rank=1)
        elif name in ("decisions", "batch_norms", "wrapped"):
            found[name] = globals()[name](dist.get_rank())
        else:
            found[name] = train(arguments, kill_rank=1 if name == "killed" else None)
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
