"""What ε is in each epoch, and the learning rate that begins anew when blocks were discarded.

An ε schedule maps (epoch, responses of the epoch before) to a threshold for each branch. Both hold ε = 0 while the
network warms up: a branch that starts near zero would otherwise be shut before it has learnt anything, and stay shut.
"""

from __future__ import annotations

import bisect
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .gate import check_epsilon

__all__ = ["BudgetEpsilon", "ConstantEpsilon", "RestartingLR"]


class ConstantEpsilon:
    """The paper's schedule: 0 during warm-up, then one ε for all blocks and epochs.

    Args:
        epsilon: Threshold in activation units.
        warmup_epochs: Number of epochs with ε = 0 first.

    Raises:
        ValueError: ε is negative, NaN or infinite, or the warm-up is negative.
    """

    def __init__(self, epsilon: float, warmup_epochs: int = 0) -> None:
        self.epsilon = check_epsilon(epsilon)
        self.warmup_epochs = _check_epochs("warmup_epochs", warmup_epochs)

    def __call__(self, epoch: int, responses: Mapping[str, float], total: int) -> dict[str, float]:
        """ε of each branch for ``epoch`` (counted from 0)."""
        return dict.fromkeys(responses, self.epsilon if epoch >= self.warmup_epochs else 0.0)


class BudgetEpsilon:
    """ε that follows the responses so that a given share of the branches is left at the end of a ramp.

    After warm-up the number of branches to close rises along a cubic ramp (Zhu and Gupta, "To prune, or not to
    prune", arXiv 1710.01878, equation 1): fast at first, slowly towards the end. In each epoch ε is set so that this
    many branches responded less than ε in the epoch before, the removed ones counted in.

    Only these branches get ε, the others zero. A response is the largest of an epoch, and that of a single batch can be
    far smaller: under one ε for all, branches that are to stay would be shut on most batches meanwhile.

    Args:
        keep: Fraction (float, 0 < keep < 1) or number (int, at least 1) of branches to keep.
        warmup_epochs: Number of epochs with ε = 0 first.
        ramp_epochs: Number of epochs from the first closed branch to the full budget.

    Raises:
        ValueError: ``keep`` is neither a fraction nor a positive number, or an epoch count is negative.
    """

    def __init__(self, keep: float | int, warmup_epochs: int = 0, ramp_epochs: int = 0) -> None:
        whole = isinstance(keep, numbers.Integral) and not isinstance(keep, bool)
        if not (keep >= 1 if whole else isinstance(keep, numbers.Real) and 0.0 < keep < 1.0):
            raise ValueError(
                f"keep must be a fraction of the branches between 0 and 1 or a number of at least 1, got {keep!r}."
            )
        self.keep = int(keep) if whole else float(keep)  # numpy's numbers, too
        self.warmup_epochs = _check_epochs("warmup_epochs", warmup_epochs)
        self.ramp_epochs = _check_epochs("ramp_epochs", ramp_epochs)

    def kept(self, total: int) -> int:
        """How many of ``total`` branches stay in the end."""
        return min(self.keep, total) if isinstance(self.keep, int) else max(1, round(self.keep * total))

    def to_close(self, epoch: int, total: int) -> int:
        """How many of ``total`` branches are to be closed or gone in ``epoch``."""
        return round((total - self.kept(total)) * self.progress(epoch))

    def progress(self, epoch: int) -> float:
        """How far the ramp is in ``epoch``: from 0, before it, to 1, at its end."""
        done = (epoch - self.warmup_epochs + 1) / max(1, self.ramp_epochs)
        return 1.0 - (1.0 - min(max(done, 0.0), 1.0)) ** 3

    def __call__(self, epoch: int, responses: Mapping[str, float], total: int) -> dict[str, float]:
        """ε of each branch for ``epoch`` (counted from 0).

        Args:
            epoch: The epoch that begins.
            responses: Response of each branch that is still there, in the epoch before; infinity if it did not run.
            total: Number of branches that the model was built with.
        """
        due, others = self.divide(epoch, responses, total)
        if not due:
            return dict.fromkeys(responses, 0.0)
        largest = responses[due[-1]]
        # Halfway to the next response, so that neither rounding nor a small change lets a branch slip over.
        epsilon = (largest + responses[others[0]]) / 2 if others else largest * 1.01
        return {slot: epsilon if slot in due else 0.0 for slot in responses}

    def divide(self, epoch: int, ranks: Mapping[str, float], total: int) -> tuple[list[str], list[str]]:
        """The branches that are to be closed in ``epoch``, those of the lowest rank, and the others, in order.

        One whose rank has no end or is not a number cannot be closed, and is in neither list.
        """
        close = max(self.to_close(epoch, total) - (total - len(ranks)), 0)
        ordered = sorted((slot for slot, value in ranks.items() if math.isfinite(value)), key=ranks.__getitem__)
        return ordered[:close], ordered[close:]


def _check_epochs(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of epochs, at least 0, got {value!r}.")
    return value


class RestartingLR(LRScheduler):
    """Lowers the learning rate in steps, and restarts whenever more blocks are closed or removed.

    The paper calls this schedule required on CIFAR and SVHN. The defaults are its CIFAR setting: 0.1 of the learning
    rate after 82 epochs, 0.01 after 123, 0.002 after 300, counted from the start; and after 41, 61 and 150 epochs,
    counted from the last restart. Call :meth:`step` once an epoch with the number of blocks closed or removed so far.

    Args:
        optimizer: Optimizer whose current learning rates are the highest ones.
        milestones: Epochs at which the next factor applies, before any restart.
        restart_milestones: The same, in epochs after a restart.
        factors: One more than milestones; multiplies the learning rate.

    Raises:
        ValueError: The milestones do not increase, or their number does not fit the factors.

    Source: section 4.1 of the paper and the authors' cifar10 script.

    Example::

        optimizer = torch.optim.SGD(timm_eps.param_groups(model, weight_decay=2e-4), lr=0.1, momentum=0.9)
        pruner = timm_eps.EpsilonPruner(model, optimizer, epsilon=2.5, warmup_epochs=150)
        scheduler = timm_eps.RestartingLR(optimizer)
        for epoch in range(3):
            train_one_epoch(model, optimizer)
            pruner.step()
            scheduler.step(pruner.discarded)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int] = (82, 123, 300),
        restart_milestones: Sequence[int] = (41, 61, 150),
        factors: Sequence[float] = (1.0, 0.1, 0.01, 0.002),
        last_epoch: int = -1,
    ) -> None:
        for name, epochs in (("milestones", milestones), ("restart_milestones", restart_milestones)):
            if len(epochs) != len(factors) - 1 or list(epochs) != sorted(set(epochs)):
                raise ValueError(
                    f"{name} must be {len(factors) - 1} increasing epochs for {len(factors)} factors, got {epochs!r}."
                )
        self.milestones = list(milestones)
        self.restart_milestones = list(restart_milestones)
        self.factors = list(factors)
        self.discarded = 0
        self.restart_epoch: int | None = None
        super().__init__(optimizer, last_epoch)

    def step(self, discarded: int | None = None) -> None:  # type: ignore[override]
        """Advance one epoch.

        Args:
            discarded: Number of blocks that are closed or removed by now. If it grew, the schedule restarts.
        """
        if discarded is not None:
            if discarded > self.discarded:
                self.restart_epoch = self.last_epoch + 1
            self.discarded = discarded
        super().step()

    def get_lr(self) -> list[Any]:
        if self.restart_epoch is None:
            passed = bisect.bisect_right(self.milestones, self.last_epoch)
        else:
            passed = bisect.bisect_right(self.restart_milestones, self.last_epoch - self.restart_epoch)
        return [base * self.factors[passed] for base in self.base_lrs]
