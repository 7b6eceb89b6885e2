"""How much of a network may stay: a number of branches, or its parameters, multiply-adds or latency.

A budget is a fraction of the dense network or an absolute number. A float of at most 1 is a fraction. An int, or a
float above 1, is an absolute number: branches, parameters, multiply-adds per image, or milliseconds per batch.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from .report import count_macs, count_parameters

__all__ = [
    "BUDGETS",
    "Budget",
    "Keep",
    "TargetLatency",
    "TargetMacs",
    "TargetParams",
    "budget_from",
    "check_reachable",
]


class Budget:
    """A limit on the size of a network, in one unit. Four are built in; your own subclass implements ``count``.

    Example::

        class Bytes(timm_eps.Budget):
            argument, unit = "bytes", "bytes"

            def count(self, network, image_shape):
                return sum(value.numel() * value.element_size() for value in network.state_dict().values())

        schedule = timm_eps.CostEpsilon(Bytes(0.5), warmup_epochs=1, ramp_epochs=2)
        pruner = timm_eps.EpsilonPruner(model, optimizer, schedule=schedule)
        slots = timm_eps.analyze(model, batches, batch_sizes=(), progress=False).choose(budget=Bytes(0.5))

    Args:
        value: Fraction of the dense network (float, 0 < value <= 1), or an absolute number (int, or float above 1).

    Attributes:
        argument: Name of the budget as an argument.
        unit: Unit of an absolute number.

    Raises:
        ValueError: ``value`` is not a positive number.
    """

    argument: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, value: float) -> None:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise ValueError(
                f"{self.argument} must be a fraction of the dense network (a float above 0, at most 1.0) or a number "
                f"of {self.unit} (an int, or a float above 1), got {str(value)[:80]}."
            )
        self.value = int(value) if isinstance(value, numbers.Integral) else float(value)

    @property
    def is_fraction(self) -> bool:
        """Whether ``value`` is a fraction of the dense network."""
        return isinstance(self.value, float) and self.value <= 1

    def goal(self, dense: float) -> float:
        """The limit in ``unit`` for a dense network of size ``dense``."""
        return self.value * dense if self.is_fraction else self.value

    def count(self, network: nn.Module, image_shape: Sequence[int]) -> float:
        """Size of a network, in ``unit``. It must decrease with each removed branch.

        Args:
            network: Pruned timm model on the meta device, which has shapes but no values.
            image_shape: Shape (C, H, W) of the model's configured images.
        """
        raise ValueError(f"{self!r} cannot be counted: {type(self).__name__} has no method count.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


class Keep(Budget):
    """A number of residual branches; at least one stays."""

    argument = "keep"
    unit = "branches"

    def count(self, network: nn.Module, image_shape: Sequence[int]) -> float:
        raise ValueError(f"{self!r} counts branches: use keep=, or BudgetEpsilon.")

    def goal(self, dense: float) -> float:
        return min(max(1, round(self.value * dense) if self.is_fraction else self.value), dense)


class TargetParams(Budget):
    """Parameters of the whole network."""

    argument = "target_params"
    unit = "parameters"

    def count(self, network: nn.Module, image_shape: Sequence[int]) -> float:
        return count_parameters(network)


class TargetMacs(Budget):
    """Multiply-adds of convolutions and matrix products for one image."""

    argument = "target_macs"
    unit = "multiply-adds"

    def count(self, network: nn.Module, image_shape: Sequence[int]) -> float:
        dtype = next(network.parameters()).dtype
        return count_macs(network, torch.empty((1, *image_shape), device="meta", dtype=dtype))


class TargetLatency(Budget):
    """Time of a forward pass on the model's device.

    Args:
        value: Fraction of the dense network's time (float, 0 < value <= 1), or milliseconds (int, or float above 1).
        batch_size: Number of images in the pass.
    """

    argument = "target_latency"
    unit = "milliseconds"

    def __init__(self, value: float, batch_size: int = 32) -> None:
        super().__init__(value)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        self.batch_size = batch_size


BUDGETS: dict[str, type[Budget]] = {kind.argument: kind for kind in (Keep, TargetParams, TargetMacs, TargetLatency)}


def budget_from(**values: float | Budget | None) -> Budget:
    """Return the one budget that is given.

    Args:
        values: Any of ``keep``, ``target_params``, ``target_macs`` and ``target_latency``, as a number or as a budget
            of that name.

    Raises:
        ValueError: No budget or several are given, or the value is out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        found = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
        raise ValueError(f"Give exactly one of {', '.join(values)}, got {found}.")
    [(name, value)] = given.items()
    return value if isinstance(value, BUDGETS[name]) else BUDGETS[name](value)  # type: ignore[arg-type]


def check_reachable(budget: Budget, dense: float, least: float, count: int) -> None:
    """Raise ValueError if a network exceeds a budget even without any of its branches.

    Args:
        budget: The budget.
        dense: Size of the dense network, in the unit of the budget.
        least: Size of the network without any branch.
        count: Number of branches of the dense network.
    """
    if budget.goal(dense) < least:
        digits = 2 if isinstance(budget, TargetLatency) else 0
        raise ValueError(
            f"{budget.argument}={budget.value} cannot be reached by removing branches: without any of its {count} "
            f"branches the network still has {least:,.{digits}f} of {dense:,.{digits}f} {budget.unit}, "
            f"{least / dense:.3f} of the dense network. Ask for more than that."
        )
