"""Measure the value and the cost of each residual branch, without training.

Closing a gate has the same effect as removing its branch, so the measured rise of the loss is exact. The report chooses
branches for a budget (:meth:`timm_eps.Analysis.choose`), and :func:`timm_eps.prune` removes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..gate import max_response
from ..report import hardware
from ..surgery.branches import gates
from ..surgery.removal import closed_slots, remove
from .evaluation import Batch, Loss, Score, evaluate, read_batches
from .live_network import LiveNetwork, batch_of
from .measure import BranchTimes, Size, branch_times, open_slots, pruned_copy, size_of
from .report import Analysis
from .suffix import scores_without_each
from .worth import Branch, Step

__all__ = ["analyze"]


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    loss: Loss = F.cross_entropy,
    rerank: int = 8,
    progress: bool = True,
) -> Analysis:
    """Measure the value and the cost of each residual branch. There is no training, and the model is not changed.

    First each branch is closed alone. Then branches are closed one after the other, in each step the one with the
    smallest rise of the loss, and the others are ranked again. Branches that are already closed count as removed.

    Args:
        model: A timm model with or without gates, or a transformers model of this package, with a classifier.
        batches: Pairs (images, labels), or dicts with ``pixel_values`` and ``labels``: images (B, C, H, W) normalised
            for the network, labels (B,) or class probabilities (B, classes). They are read once and kept in memory.
        batch_sizes: Batch sizes for the latency on the model's device; empty to measure none.
        loss: Function of logits (B, classes) and labels that returns the mean loss of a batch.
        rerank: Number of branches to try before each closing: those with the smallest rise of the loss when they were
            last tried. 1 keeps the first ranking. The number of branches tries all of them.
        progress: Whether to show a progress bar.

    Returns:
        The report. It keeps the model and the images for :meth:`timm_eps.Analysis.choose`.

    Raises:
        ValueError: The model has no open branch, no classifier, or is wrapped or compiled; the batches have another
            form; ``rerank`` or a batch size is not a positive whole number.

    Example::

        batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))]  # a validation loader
        report = timm_eps.analyze(model, batches)
        removed = timm_eps.prune(model, report.choose(target_macs=0.6))
    """
    for name, value in (("rerank", rerank), *(("batch_sizes", size) for size in batch_sizes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    live = LiveNetwork(model, [], loss)
    net = live.copy()
    net = pruned_copy(net, closed_slots(net))
    classes = getattr(net, "num_classes", 0)
    if not classes:
        raise ValueError(f"{type(net).__name__} has no classifier, which the loss of the analysis needs; add one.")
    if not (slots := open_slots(net)):
        raise ValueError(f"{type(net).__name__} has no open branch: all of them are closed or removed.")
    live.batches = read_batches(batches, classes)
    passes = 1 + len(slots) + sum(min(rerank, left) for left in range(1, len(slots)))
    with tqdm(total=passes * len(live.batches), desc="analyze", disable=not progress, leave=False) as bar:
        runs = _Runs(live, bar.update)
        dense, responses = runs.dense(net)
        times = {size: branch_times(net, batch_of(net, live.batches, size)) for size in batch_sizes}
        singles = runs.without_each(net, slots)
        curve = _curve(net, runs, dense, singles, rerank, times)
    whole = live.size_without([])
    branches = []
    for slot in slots:
        left = live.size_without([slot])
        saved = whole.parameters - left.parameters, whole.macs - left.macs
        own_times = {size: found.saved[slot] for size, found in times.items()}
        branches.append(Branch(slot, singles[slot].loss - dense.loss, responses[slot], *saved, own_times))
    architecture = (getattr(net, "pretrained_cfg", None) or {}).get("architecture") or type(net).__name__
    device = next(net.parameters()).device
    return Analysis(architecture, hardware(device), dense.images, live.image_shape, branches, curve, live)


class _Runs:
    """Scores of a network on the images of an analysis.

    Args:
        live: Network with the images and the loss.
        tick: Function that is called after each batch.
    """

    def __init__(self, live: LiveNetwork, tick: Callable[[], Any]) -> None:
        self.live, self.tick = live, tick

    def dense(self, net: nn.Module) -> tuple[Score, dict[str, float]]:
        """Score of the current network, and the largest response of each branch."""
        largest: dict[str, Tensor] = {}

        def note(slot: str, _: nn.Module, args: tuple) -> None:
            response = max_response(args[0])
            largest[slot] = response.maximum(largest[slot]) if slot in largest else response

        hooks = [gate.register_forward_pre_hook(partial(note, slot)) for slot, gate in gates(net).items()]
        try:
            found = evaluate(net, self._batches(), self.live.loss)
        finally:
            for hook in hooks:
                hook.remove()
        return found, {slot: float(largest.get(slot, math.nan)) for slot in gates(net)}

    def without_each(self, net: nn.Module, slots: Sequence[str]) -> dict[str, Score]:
        """Score of the network without each of these branches."""
        return scores_without_each(net, slots, self.live.batches, self.live.loss, self.tick)

    def _batches(self) -> Iterator[Batch]:
        for batch in self.live.batches:
            yield batch
            self.tick()


def _curve(
    net: nn.Module,
    runs: _Runs,
    dense: Score,
    singles: dict[str, Score],
    rerank: int,
    times: dict[int, BranchTimes],
) -> list[Step]:
    """Close branch after branch, until none remains.

    Each closed branch is removed from the network, so that the runs get faster.
    """
    net = pruned_copy(net, [])
    known = dict(singles)
    left = {size: found.dense for size, found in times.items()}
    steps = [_step([], dense, net, runs.live.image_shape, left)]
    while known:
        tried = sorted(known, key=lambda slot: _last_if_nan(known[slot]))[:rerank]
        if len(steps) > 1:  # the first time, each branch has just been tried
            known |= runs.without_each(net, tried)
        best = min(tried, key=lambda slot: _last_if_nan(known[slot]))
        gates(net)[best].closed = True
        remove(net, closed_slots(net))
        there = open_slots(net)
        found = known[best]
        closed = [best, *(slot for slot in known if slot != best and slot not in there)]  # including branches inside it
        known = {slot: value for slot, value in known.items() if slot not in closed}
        left = {
            size: max(value - sum(times[size].saved[slot] for slot in closed), times[size].none)
            for size, value in left.items()
        }
        steps.append(_step(closed, found, net, runs.live.image_shape, left))
    return steps


def _step(slots: list[str], found: Score, net: nn.Module, image_shape: Sequence[int], left: dict[int, float]) -> Step:
    size: Size = size_of(net, image_shape)
    return Step(slots, found.loss, found.accuracy, len(open_slots(net)), size.parameters, size.macs, left)


def _last_if_nan(found: Score) -> float:
    return math.inf if math.isnan(found.loss) else found.loss
