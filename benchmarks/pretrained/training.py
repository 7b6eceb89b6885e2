"""Train one network: on a GPU in bf16 with CUDA graphs, on the CPU in float32."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import timm_eps
from benchmarks.pretrained.cases import Recipe
from benchmarks.pretrained.images import Labelled, Reader, training_batches
from benchmarks.pretrained.structures import without_gates
from timm_eps.training.cuda_graphs import GraphedPasses

WARMUP = 0.05  # of the steps
EVALUATED = 1_000  # images at once


def autocast(device: torch.device) -> Any:
    """bf16 on a GPU. It saves no time on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def share_of_rate(step: int, steps: int) -> float:
    """Learning rate divided by its highest value: linear warm-up, then half a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: nn.Module,
    training: Labelled,
    read: Reader,
    recipe: Recipe,
    seed: int,
    distillation: timm_eps.Distillation | None = None,
    pruning: dict[str, Any] | None = None,
) -> float:
    """Train a network in place. Returns the training time in seconds.

    Args:
        model: A gated network on the images' device. Without ``pruning`` its gates are removed.
        training: Training images.
        read: Converts uint8 images to the network's input.
        recipe: Steps, batch size and rates.
        seed: Seed of the order and the augmentation.
        distillation: A teacher whose answers are a part of the loss.
        pruning: Arguments of ``EpsilonPruner``, which takes ``recipe.periods`` steps.
    """
    device = training.labels.device
    optimizer = torch.optim.SGD(
        timm_eps.param_groups(model, recipe.weight_decay), lr=recipe.learning_rate, momentum=0.9, nesterov=True
    )
    pruner = timm_eps.EpsilonPruner(model, optimizer, **pruning) if pruning else None
    if pruner is None:
        without_gates(model)
    scheduler = LambdaLR(optimizer, lambda step: share_of_rate(step, recipe.steps))

    def passes(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            x = read(images)
            logits = model(x)
            loss = F.cross_entropy(logits.float(), labels)
            if distillation is not None:
                loss = distillation.loss(logits, loss, x)
        loss.backward()
        return loss.detach()

    graphs = GraphedPasses(passes) if device.type == "cuda" else None
    period = max(1, recipe.steps // recipe.periods)
    model.train()
    start = time.perf_counter()
    batches = training_batches(training, recipe.batch_size, recipe.steps, seed)
    step = 0
    while step < recipe.steps:
        stop = min(step + period, recipe.steps)
        with graphs.queue(model) if graphs else nullcontext():
            for _ in range(step, stop):
                images, labels = next(batches)
                (graphs or passes)(images, labels)
                optimizer.step()
                scheduler.step()
        step = stop
        if pruner is not None:
            pruner.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def logits_of(model: nn.Module, labelled: Labelled, read: Reader) -> Tensor:
    """Logits (N, classes) of all images in evaluation mode, float32."""
    model.eval()
    with autocast(labelled.labels.device):
        return torch.cat([model(read(batch.images)).float() for batch in labelled.batches(EVALUATED)])


def accuracy(model: nn.Module, labelled: Labelled, read: Reader) -> float:
    """Share of correctly classified images."""
    return float((logits_of(model, labelled, read).argmax(1) == labelled.labels).float().mean())


def loss(model: nn.Module, labelled: Labelled, read: Reader) -> float:
    """Mean cross-entropy, in nats."""
    return float(F.cross_entropy(logits_of(model, labelled, read), labelled.labels))
