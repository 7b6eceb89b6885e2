"""Importance of branches, the change of the loss if a branch were removed, and the ranks made from it."""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Iterable, Mapping

import torch

from .gate import EpsilonGate
from .surgery.branches import stage_of

__all__ = ["importance_ranks", "measure", "measured_importances", "note_step"]


def measure(gate: EpsilonGate, *, over_steps: bool) -> None:
    """Start to measure the importance of a gate's branch.

    Args:
        gate: The gate.
        over_steps: Whether :func:`note_step` is called before each step of the optimizer. The gradients of several
            backward passes then accumulate, like the gradients of parameters. Otherwise each backward pass is a step.
    """
    gate.measure_importance(not over_steps)
    if over_steps:
        gate.gain = torch.ones((), device=gate.threshold.device, requires_grad=True)


def note_step(gates: Iterable[EpsilonGate]) -> None:
    """Add the share of each gate in an optimizer step to its importance, and reset the gradient sums.

    The share is the squared first-order change of the loss without the branch, divided by the sum of these squares over
    all gates. All steps therefore have the same weight, for any scale of the loss (of a ``GradScaler``, or the number
    of micro-batches). Micro-batches count as one batch.

    A step with a gradient that is not finite is skipped, as a ``GradScaler`` does.
    """
    measured = [gate for gate in gates if gate.gain is not None and gate.gain.grad is not None]
    if not measured:
        return
    device = measured[0].threshold.device
    changes = torch.stack([gate.gain.grad.detach().to(device, torch.float32) for gate in measured])  # type: ignore
    size = torch.linalg.vector_norm(changes)
    shares = torch.where((size > 0) & size.isfinite(), (changes / size).square(), 0.0)
    for gate, share in zip(measured, shares, strict=True):
        if gate.importance.device != share.device:
            gate.importance = gate.importance.to(share.device)
        gate.importance += share
        gate.gain.grad = None  # type: ignore[union-attr]


def measured_importances(
    recorded: Mapping[str, float], responses: Mapping[str, float], streaks: Mapping[str, int]
) -> dict[str, float]:
    """The measured importances of an epoch.

    An open branch without a gradient was not measured (``backward()`` was not called). Diverged branches stay open.

    Args:
        recorded: Importances of the gates at the end of the epoch, by slot.
        responses: Responses of the epoch, by slot.
        streaks: Number of epochs that each remaining branch has been closed.
    """
    return {
        slot: importance
        for slot, importance in recorded.items()
        if slot in streaks
        and math.isfinite(responses[slot])
        and math.isfinite(importance)
        and (importance or streaks[slot] or not responses[slot])
    }


def importance_ranks(
    importances: Mapping[str, float], removed: Iterable[str], kept: int, staying: Collection[str] = ()
) -> dict[str, float]:
    """Rank of each branch. The lowest ranks close first; a branch with an infinite rank stays.

    Each stage keeps its share of the budget, filled with its most important branches, and the stages shrink in
    parallel. Importances of different stages are not comparable: ranking raw importance keeps the large late branches
    and frees few parameters; dividing by size keeps the small early ones instead.

    Args:
        importances: Importance of each remaining branch; infinity or NaN if it was not measured.
        removed: Slots of the removed branches.
        kept: Number of branches that stay in the end. If it is too small for one per stage, importance alone decides.
        staying: Slots of branches that must not close. They use places of their stage.
    """
    importances = {slot: math.inf if slot in staying else value for slot, value in importances.items()}
    counts = collections.Counter(stage_of(slot) for slot in (*importances, *removed))
    frozen = collections.Counter(map(stage_of, staying))
    least = {stage: max(1, frozen[stage]) for stage in counts}
    if kept < sum(least.values()):
        return importances
    ranks = dict.fromkeys(importances, math.inf)
    for stage, places in shares(counts, kept, least).items():
        there = [slot for slot in importances if stage_of(slot) == stage]
        measured = sorted((slot for slot in there if math.isfinite(importances[slot])), key=importances.__getitem__)
        excess = max(len(there) - places, 0)
        for position, slot in enumerate(measured[:excess]):
            ranks[slot] = (position - excess) / counts[stage]
    return ranks


def shares(counts: Mapping[str, int], kept: int, least: Mapping[str, int] | None = None) -> dict[str, int]:
    """Number of places for each stage, out of ``kept``, in proportion to its branches (D'Hondt method).

    Args:
        counts: Number of branches of each stage.
        kept: Number of places.
        least: Minimum number of places of each stage, by default one.
    """
    places = dict.fromkeys(counts, 1) if least is None else dict(least)
    for _ in range(kept - sum(places.values())):
        free = [stage for stage in counts if places[stage] < counts[stage]]
        places[max(free, key=lambda stage: counts[stage] / (places[stage] + 1))] += 1
    return places
