"""Criteria that rank the branches. With a budget, the branches of the lowest rank close first.

A criterion is a callable. It gets the results of an epoch (:class:`Seen`) and returns a rank for each branch. A branch
with an infinite rank, or without a rank, stays open. Your own criterion is a function or a small class::

    class LargestFirst:
        \"\"\"Closes the branches with the most parameters first.\"\"\"

        def __call__(self, seen):
            return {slot: -len(list(seen.model.get_submodule(slot.rpartition(".")[0]).parameters()))
                    for slot in seen.responses}

    pruner = EpsilonPruner(model, optimizer, keep=0.5, criterion=LargestFirst())
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import nn

from .analysis.evaluation import Batch, Loss, evaluate, read_batches
from .analysis.measure import gated_copy
from .analysis.suffix import scores_without_each
from .importance import importance_ranks
from .surgery.branches import gates, stage_of
from .surgery.removal import closed_slots, natural_order

__all__ = [
    "CRITERIA", "ORDERS", "Criterion", "Importance", "Last", "LeaveOneOut", "Response", "Seen", "StageEnds",
    "criterion_from", "ranked_by", "stage_ends_first",
]  # fmt: skip


class Seen(NamedTuple):
    """Input of a criterion.

    Attributes:
        model: The timm model, with gates.
        responses: Response of each branch that may close, in the finished epoch; infinite if the branch did not run.
        importances: Importance of each of these branches; infinite if it was not measured.
        removed: Slots of the removed branches.
        staying: Slots of branches that must not close.
        kept: Number of branches that stay in the end; None under a budget of parameters, multiply-adds or latency.
    """

    model: nn.Module
    responses: Mapping[str, float]
    importances: Mapping[str, float]
    removed: list[str]
    staying: set[str]
    kept: int | None


class Criterion(Protocol):
    """Ranks branches. Set the class attribute ``measures_importance = True`` to let the gates measure importances."""

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        """The rank of each branch by slot; the lowest closes first."""
        ...


class Response:
    """The paper's criterion: the branches with the smallest response close first. All of them get the same ε."""

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        return seen.responses


class Importance:
    """Branches whose removal would change the loss least close first, separately for each stage.

    The change is measured to first order (:meth:`timm_eps.EpsilonGate.measure_importance`). Importances of different
    stages are not comparable, so the stages shrink in parallel. With ``keep`` each stage keeps its share.
    """

    measures_importance = True

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        if seen.kept is not None:
            return importance_ranks(seen.importances, seen.removed, seen.kept, seen.staying)
        counts = Counter(map(stage_of, (*seen.importances, *seen.removed)))
        taken = Counter(map(stage_of, seen.removed))
        ranks = dict.fromkeys(seen.importances, math.inf)
        for slot in sorted(seen.importances, key=seen.importances.__getitem__):
            if math.isfinite(seen.importances[slot]) and slot not in seen.staying:
                stage = stage_of(slot)
                taken[stage] += 1
                ranks[slot] = taken[stage] / counts[stage]
        return ranks


def last_first(slots: Iterable[str], removed: Iterable[str] = ()) -> dict[str, float]:
    """Ranks that close the last branches of a network first. The removed branches change nothing."""
    return {slot: -index for index, slot in enumerate(sorted(slots, key=natural_order))}


def stage_ends_first(slots: Iterable[str], removed: Iterable[str] = ()) -> dict[str, float]:
    """Ranks that close the last branches of each stage first, so that all stages lose the same share of their branches.

    Among equal shares, later stages come first.

    Args:
        slots: Slots of the branches to rank.
        removed: Slots of the removed branches, which had their places in the stages too.
    """
    there = list(slots)
    stages: dict[str, list[str]] = {}
    for slot in sorted({*there, *removed}, key=natural_order):
        stages.setdefault(stage_of(slot), []).append(slot)
    shares = {
        slot: ((len(own) - place) / len(own), -number)
        for number, own in enumerate(stages.values())
        for place, slot in enumerate(own)
    }
    return {slot: rank for rank, slot in enumerate(sorted(there, key=shares.__getitem__))}


class StageEnds:
    """The last branches of each stage close first. All stages shrink in parallel, and keep their first branches.

    This needs no images. The first branches of a stage adapt the features to its resolution and width. The later ones
    refine them (Greff et al., "Highway and Residual Networks Learn Unrolled Iterative Estimation", ICLR 2017).
    """

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        return stage_ends_first(seen.responses, seen.removed)


class Last:
    """The last branches of the network close first.

    A simple baseline. A network with long stages loses whole stages by it.
    """

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        return last_first(seen.responses)


class LeaveOneOut:
    """Branches whose removal increases the loss least close first. The loss is measured exactly, on your images.

    Whenever branches must close after an epoch, the network is evaluated on the images once for each branch.

    Args:
        batches: Images and labels, as for :func:`timm_eps.analyze`; a few hundred training images are enough.
        loss: Function of logits (B, classes) and labels that returns the mean loss of a batch.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss = F.cross_entropy) -> None:
        self.batches, self.loss = batches, loss
        self._read: list[Batch] = []

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        net = gated_copy(seen.model)
        self._read = self._read or read_batches(self.batches, getattr(net, "num_classes", 0))
        dense = evaluate(net, self._read, self.loss).loss
        closed = closed_slots(net)
        there = [slot for slot in seen.responses if slot not in closed]
        scores = scores_without_each(net, there, self._read, self.loss) if there else {}
        rises = {slot: found.loss - dense for slot, found in scores.items()}
        # Closed branches are not opened again, because the others have adapted to them.
        least = min((rise for rise in rises.values() if math.isfinite(rise)), default=0.0) - 1
        return rises | {slot: least for slot in closed if slot in gates(net)}


# Orders of removal that follow from the structure alone: functions of the slots and of the removed slots.
ORDERS = {"stage_ends": stage_ends_first, "last": last_first}
CRITERIA: dict[str, type[Response | Importance | StageEnds | Last]] = {
    "response": Response,
    "importance": Importance,
    "stage_ends": StageEnds,
    "last": Last,
}


def criterion_from(criterion: str | Criterion) -> Criterion:
    """The criterion with a given name, or the criterion that is given.

    Raises:
        ValueError: The name is unknown, or the object cannot be called.
    """
    if isinstance(criterion, str) and criterion in CRITERIA:
        return CRITERIA[criterion]()
    if isinstance(criterion, type) or not callable(criterion):
        hint = f"; make one: {criterion.__name__}()" if isinstance(criterion, type) else ""
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {str(criterion)[:80]!r}, or an object that ranks "
            f"branches (timm_eps.criteria){hint}."
        )
    return criterion


def ranked_by(criterion: Criterion, seen: Seen) -> dict[str, float]:
    """The ranks of all branches that may close; infinite without a finite rank or response.

    Raises:
        ValueError: The criterion does not return a dict of numbers by slot.
    """
    ranks = criterion(seen)
    name = type(criterion).__name__
    if not isinstance(ranks, Mapping):
        raise ValueError(f"{name} must return a rank for each slot, as a dict, got {type(ranks).__name__}.")
    if strangers := [slot for slot in ranks if slot not in seen.responses]:
        raise ValueError(f"{name} ranks {str(strangers[0])[:80]!r}, which is not a branch that may close.")
    found = dict.fromkeys(seen.responses, math.inf)
    for slot, rank in ranks.items():
        value = float(rank)
        # Branches that diverged or did not run stay as they are, for any rank.
        if math.isfinite(seen.responses[slot]) and slot not in seen.staying and not math.isnan(value):
            found[slot] = value
    return found
