"""A learning rate schedule that restarts when blocks are closed or removed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["RestartingLR"]


class RestartingLR(LRScheduler):
    """Lowers the learning rate in steps, and restarts whenever more blocks are closed or removed.

    The paper requires this schedule on CIFAR and SVHN. The defaults are its CIFAR setting: 0.1 of the learning rate
    after 82 epochs, 0.01 after 123 and 0.002 after 300, counted from the start. After a restart, the same factors apply
    after 41, 61 and 150 epochs. Call :meth:`step` once an epoch with the number of blocks closed or removed so far.

    Args:
        optimizer: Optimizer. Its current learning rates are the maxima of the schedule.
        milestones: Epochs at which the next factor applies, before any restart.
        restart_milestones: Epochs after a restart at which the next factor applies.
        factors: Factors of the learning rate, one more than milestones.

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
            discarded: Number of blocks closed or removed so far. If it has increased, the schedule restarts.
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
