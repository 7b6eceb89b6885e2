"""Run by test_trainer.py under torchrun. Each process writes its findings to a JSON file of its rank."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trainer import SGD, assert_optimizer_fits, fresh_model, logged, make_trainer, pruning_callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_eps
from timm_eps import EpsilonPruner
from timm_eps.surgery.branches import gates
from timm_eps.surgery.distributed import wrap_again
from timm_eps.surgery.removal import removed_slots

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(3, (16,), generator=torch.Generator().manual_seed(4))


def digest(model: nn.Module) -> str:
    """Digest of the parameters. After the last batch each process has other BatchNorm statistics."""
    return hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in model.parameters())).hexdigest()


def trainer(out: Path) -> dict:
    def run(checkpoint: str | None, save_strategy: str) -> dict:
        it = make_trainer(out / save_strategy, save_strategy=save_strategy, save_steps=1, **SGD)
        it.train(resume_from_checkpoint=checkpoint)
        assert it.args.world_size == 2
        assert pruning_callback(it)._wrapper is it.model_wrapped
        assert_optimizer_fits(it)
        return {
            "removed": removed_slots(it.model),
            "weights": digest(it.model),
            "history": pruning_callback(it).pruner.history,
            "losses": [entry[1] for entry in logged(it)],
        }

    whole = run(None, "epoch")
    steps = len(whole["losses"]) // len(whole["history"])
    first = next(record["epoch"] for record in whole["history"] if record["removed"])
    again = run(None, "steps")
    within = {step: run(f"{out}/steps/checkpoint-{step}", "steps") for step in (1, steps * (first + 1) + 1)}
    return {
        **whole,
        "resumed": {"epoch": run(f"{out}/epoch/checkpoint-{steps * (first + 1)}", "epoch"), "anew": again, **within},
    }


def decisions(rank: int) -> dict:
    model = fresh_model()
    pruner = EpsilonPruner(model, epsilon=1.0, patience=1)
    slots = list(gates(model))
    by_hand = [(0.5, 2.0), (0.5, 0.7), (0.5, math.nan), (-1.0, 0.5)]
    for slot, responses in zip(slots, [*by_hand, *[(2.0, 2.0)] * 5], strict=True):
        gates(model)[slot].response.fill_(responses[rank])
    return {"slots": slots, "removed": pruner.step(), "closed": pruner.history[-1]["closed"]}


def responses(rank: int) -> dict:
    model = fresh_model()
    pruner = EpsilonPruner(model, epsilon=0.0)
    wrapper = DistributedDataParallel(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()  # in training mode, the size of the inputs would make no difference
    alone = copy.deepcopy(model)
    norms[0].num_batches_tracked.fill_(rank)
    for batch in IMAGES.view(2, 8, 3, 8, 8) * (1 + 9 * rank):
        alone(batch, labels=LABELS[:8])
        wrapper(batch, labels=LABELS[:8]).loss.backward()
    own, expected = ([gate.response.item() for gate in gates(which).values()] for which in (model, alone))
    pruner.step()
    return {
        "own": own,
        "expected": expected,
        "decided_on": list(pruner.history[-1]["responses"].values()),
        "broadcast": norms[0].num_batches_tracked.item() == 0,
    }


def buffers_follow(wrapper: DistributedDataParallel) -> bool:
    """Whether the first process sends its buffers to the others. torch has renamed the option."""
    names = ("forward_sync_buffers", "broadcast_buffers")
    return bool(next(getattr(wrapper, name) for name in names if hasattr(wrapper, name)))


def gradients(rank: int) -> dict:
    model = fresh_model()
    optimizer = torch.optim.SGD(timm_eps.param_groups(model, 5e-3), lr=0.1, momentum=0.9)
    pruner = EpsilonPruner(model, optimizer, epsilon=1.0, patience=1)
    wrapper = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    halves = list(zip(IMAGES.view(2, 8, 3, 8, 8), LABELS.view(2, 8), strict=True))

    def gradients_of(net: nn.Module, half: int) -> torch.Tensor:
        net.zero_grad()
        images, labels = halves[half]
        net(images, labels=labels).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    gradients_of(wrapper, rank)
    optimizer.step()
    for index, gate in enumerate(gates(model).values()):
        gate.response.fill_(0.5 if index in (1, 5) else 2.0)
    removed = pruner.step()
    wrap_again(wrapper)
    for gate in gates(model).values():
        gate.epsilon = 0.0
    alone = [gradients_of(copy.deepcopy(model), half) for half in range(2)]
    before = digest(model)
    found = gradients_of(wrapper, rank)
    for _ in range(3):
        optimizer.step()
        gradients_of(wrapper, rank)
    return {
        "removed": removed,
        "between_halves": (alone[0] - alone[1]).abs().max().item(),
        "from_mean": (found - (alone[0] + alone[1]) / 2).abs().max().item(),
        "before": before,
        "after": digest(model),
        "options_kept": wrapper.gradient_as_bucket_view and not buffers_follow(wrapper) and wrapper.training,
    }


def main(out: Path) -> None:
    found = {"trainer": trainer(out / "run")}
    rank = dist.get_rank()
    found |= {"decisions": decisions(rank), "responses": responses(rank), "gradients": gradients(rank)}
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
