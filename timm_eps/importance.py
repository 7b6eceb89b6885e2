"""How much the loss would change without a branch, and what a budget by importance ranks the branches by."""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Iterable, Mapping

import torch

from .gate import EpsilonGate
from .surgery.branches import stage_of

__all__ = ["importance_ranks", "measured_importances", "note_step", "sum_gradients"]


def sum_gradients(gates: Iterable[EpsilonGate]) -> None:
    """Begin to measure importance over the steps of an optimizer: :func:`note_step` is called before each of them.

    A gate on its own takes each backward pass for a step (:meth:`EpsilonGate.measure_importance`). Here the gradients
    of several passes add up, as those of parameters do.
    """
    for gate in gates:
        gate.gain = torch.ones((), device=gate.threshold.device, requires_grad=True)


def note_step(gates: Iterable[EpsilonGate]) -> None:
    """Add to the importance of each gate its share in an optimizer's step, and begin to sum anew.

    The share is the square of what the loss would change, to first order, without the branch, divided by the sum of
    these squares over all gates. So a step counts as much as another, whatever its loss was multiplied by (a
    ``GradScaler``'s scale, a number of micro-batches), and micro-batches count as the one batch that they make up.

    A step of which a gradient is not finite is left out: it is one that a ``GradScaler`` skips, or comes after it.
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
    """The importances of an epoch that were measured.

    What is open and responds but got no gradient was not: nobody called backward. And what diverged stays open, as it
    does by its response.

    Args:
        recorded: What the gates had at its end, by slot.
        responses: The responses of the epoch, by slot.
        streaks: For how many epochs each branch that is there has been closed.
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
    """Rank of each branch: the lowest go first, and one whose rank is infinite stays.

    Each stage keeps its share of the budget, those of its branches that are the most important, and the stages shrink
    side by side. Importances of different stages do not compare: over nothing the large branches of late stages stay
    and hardly a parameter goes, over the size the small ones of the first stage do.

    Args:
        importances: Of each branch that is there, as the gates have it; infinity or no number if it was not measured.
        removed: Slots of the branches that are gone.
        kept: How many branches stay in the end. Where that is not one for each stage, importance alone decides.
        staying: Slots of branches that are not to go. They count as those that their stage keeps.
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
    """How many of ``kept`` places each stage has, in proportion to its branches (D'Hondt).

    Args:
        counts: Number of branches of each stage.
        kept: Number of places.
        least: Places that each stage has in any case, by default one.
    """
    places = dict.fromkeys(counts, 1) if least is None else dict(least)
    for _ in range(kept - sum(places.values())):
        free = [stage for stage in counts if places[stage] < counts[stage]]
        places[max(free, key=lambda stage: counts[stage] / (places[stage] + 1))] += 1
    return places
