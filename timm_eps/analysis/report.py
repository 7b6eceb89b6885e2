"""The report of an analysis: a table, a picture, a file, and the choice of branches for a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..budget import Budget, TargetLatency, budget_from
from .choosing import choose
from .live_network import LiveNetwork
from .picture import draw_analysis
from .worth import Branch, Step

__all__ = ["Analysis", "finite_values"]

_FORMAT = "timm_eps.Analysis/1"


@dataclass(frozen=True)
class Analysis:
    """The report of :func:`timm_eps.analyze`.

    Example::

        report = timm_eps.analyze(model, batches)
        print(report)                                   # a table
        report.plot("branches.png")                     # needs matplotlib
        report.save("branches.json")                    # without the network and the images
        report = timm_eps.Analysis.load("branches.json")
        slots = report.choose(target_macs=0.5)
        removed = timm_eps.prune(model, slots)

    Attributes:
        architecture: Name of the network in timm, or its class.
        hardware: Hardware of the time measurements.
        images: Number of images.
        image_shape: (C, H, W) of an image.
        branches: Value and cost of each branch alone, in the order of the network.
        curve: Dense network, then the remaining network after each closing, beginning with the smallest rise.
        live: Network and images of the report; None if it was read from a file.
    """

    architecture: str
    hardware: str
    images: int
    image_shape: tuple[int, ...]
    branches: list[Branch]
    curve: list[Step]
    live: LiveNetwork | None = field(default=None, repr=False, compare=False)

    @property
    def dense(self) -> Step:
        """The analyzed network before any closing."""
        return self.curve[0]

    @property
    def batch_sizes(self) -> list[int]:
        """Batch sizes of the time measurements."""
        return list(self.dense.milliseconds)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def choose(
        self,
        *,
        target_latency: float | None = None,
        target_macs: float | None = None,
        target_params: float | None = None,
        keep: float | None = None,
        budget: Budget | None = None,
        batch_size: int | None = None,
    ) -> list[str]:
        """Choose the branches to remove for a budget, so that the loss rises least.

        Give exactly one budget. A float of at most 1 is a fraction of the dense network. An int, or a float above 1,
        is absolute: milliseconds of a forward pass, multiply-adds per image, parameters, or branches.

        Three choices are compared by their loss on the images of the analysis: the choice of the curve, and those with
        the smallest sum of rises, for each branch alone or at its step of the curve. Parameters and multiply-adds are
        counted on the remaining structure and never exceed the target. Latency is measured on the pruned network. The
        choice is corrected and measured again until it is within 5 %, or as close as the branches allow. A report that
        was read from a file has no network, so its choice follows the curve, with the numbers in the file.

        Args:
            target_latency: Time of a forward pass at ``batch_size``.
            target_macs: Multiply-adds of convolutions and matrix products for one image.
            target_params: Parameters of the whole network.
            keep: Number or fraction of branches; at least one stays.
            budget: Instead of these, a :class:`timm_eps.Budget`, built-in or your own.
            batch_size: Batch size of ``target_latency``, one of the measured ones; by default the largest.

        Returns:
            Slot paths, in the order of the network, for :func:`timm_eps.prune`.

        Raises:
            ValueError: Not exactly one budget is given, it is out of range, or the network exceeds it even without any
                branch; the batch size was not measured; the branches of the model have changed.
        """
        targets = {"target_latency": target_latency, "target_macs": target_macs, "target_params": target_params}
        if budget is None:
            budget = budget_from(**targets, keep=keep)
        elif any(value is not None for value in (*targets.values(), keep)):
            raise ValueError(f"Give exactly one budget: {budget!r} and another one were given.")
        elif batch_size is None and isinstance(budget, TargetLatency):
            batch_size = budget.batch_size
        size = self._batch_size(batch_size, isinstance(budget, TargetLatency))
        return choose(self.branches, self.curve, budget, size, self.live)

    def _batch_size(self, batch_size: int | None, is_needed: bool) -> int:
        if not is_needed:
            if batch_size is not None:
                raise ValueError(f"batch_size={batch_size!r} needs target_latency.")
            return 0
        if not self.batch_sizes or batch_size not in (None, *self.batch_sizes):
            raise ValueError(
                f"batch_size={batch_size!r} was not measured, only {self.batch_sizes}; analyze again with "
                f"batch_sizes=({batch_size or 32!r},)."
            )
        return batch_size or max(self.batch_sizes)

    def plot(self, path: str | Path) -> None:
        """Draw the savings of each branch against the rise of the loss, and the curve. Needs matplotlib.

        Args:
            path: Path of the PNG file.
        """
        draw_analysis(self.branches, self.curve, f"{self.architecture}, {self.images:,} images", path)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold, without the network and the images.

        Numbers that are not finite become None.
        """
        content: dict[str, Any] = {
            "format": _FORMAT,
            "architecture": self.architecture,
            "hardware": self.hardware,
            "images": self.images,
            "image_shape": self.image_shape,
            "branches": [asdict(branch) for branch in self.branches],
            "curve": [asdict(step) for step in self.curve],
        }
        finite: dict[str, Any] = finite_values(content)
        return finite

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Read a file of :meth:`save`.

        Raises:
            ValueError: The file has other content. The message names the field.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a report of timm_eps.analyze: {error}.") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a report of timm_eps.analyze: its format is not {_FORMAT!r}.")
        read = _Reader(str(path))
        return cls(
            read.field(content, "architecture", str),
            read.field(content, "hardware", str),
            read.field(content, "images", int),
            tuple(read.whole_numbers(content, "image_shape", 3)),
            [read.branch(entry, f"branches[{i}]") for i, entry in enumerate(read.field(content, "branches", list))],
            [read.step(entry, f"curve[{i}]") for i, entry in enumerate(read.field(content, "curve", list, at_least=1))],
        )


def _lines(report: Analysis) -> Iterator[str]:
    dense, sizes = report.dense, report.batch_sizes
    times = "".join(f", {dense.milliseconds[size]:.2f} ms at batch {size}" for size in sizes)
    yield f"{report.architecture}: {report.images:,} images of {'x'.join(map(str, report.image_shape))}"
    yield f"dense: {dense.parameters:,} parameters, {dense.macs:,} multiply-adds{times}"
    if times:
        yield f"times on {report.hardware}"
    yield ""
    width = max(len("without one branch"), *(len(branch.slot) for branch in report.branches)) + 1
    columns = "".join(f"{f'ms at {size}':>11}" for size in sizes)
    yield f"{'without one branch':<{width}}{'loss':>9}{'response':>10}{'parameters':>13}{'multiply-adds':>15}{columns}"
    for branch in report.branches:
        row = f"{branch.slot:<{width}}{branch.rise:>+9.4f}{branch.response:>10.3g}{-branch.parameters:>13,}"
        row += f"{-branch.macs:>15,}" + "".join(f"{-branch.milliseconds[size]:>11.2f}" for size in sizes)
        yield row
    yield ""
    yield f"{'closed in turn':<{width}}{'loss':>9}{'accuracy':>10}{'parameters':>13}{'multiply-adds':>15}{columns}"
    for step in report.curve:
        name = step.slots[0] if step.slots else "(dense)"
        row = f"{name:<{width}}{step.loss:>9.4f}{100 * step.accuracy:>8.2f} %"
        row += f"{100 * step.parameters / dense.parameters:>11.1f} %{100 * step.macs / dense.macs:>13.1f} %"
        yield row + "".join(f"{step.milliseconds[size]:>11.2f}" for size in sizes)


def finite_values(tree: Any) -> Any:
    """Nested dicts and lists with None for each number that is not finite, which JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: finite_values(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_values(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


class _Reader:
    """Reads the fields of a report. Errors name the wrong field."""

    def __init__(self, path: str) -> None:
        self.path = path

    def field(self, entry: Any, name: str, kind: type, where: str = "", at_least: int = 0) -> Any:
        """A field of a type; a number, or the length of a list, is at least ``at_least``."""
        value: Any = entry.get(name) if isinstance(entry, dict) else None
        is_right = isinstance(value, kind) and not isinstance(value, bool)
        if not is_right or (kind in (int, list) and (len(value) if kind is list else value) < at_least):
            raise ValueError(
                f"{self.path}: {where + name!r} must be of type {kind.__name__}, at least {at_least} in number, "
                f"got {str(value)[:80]!r}."
            )
        return value

    def number(self, entry: Any, name: str, where: str) -> float:
        """A number. null means a number that was not finite."""
        value = entry.get(name, "nothing") if isinstance(entry, dict) else "nothing"
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self.path}: {where + name!r} must be a number or null, got {str(value)[:80]!r}.")
        return float(value)

    def whole_numbers(self, content: Any, name: str, count: int) -> list[int]:
        values = self.field(content, name, list)
        if len(values) != count or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f"{self.path}: {name!r} must be {count} whole numbers, got {str(values)[:80]!r}.")
        return values

    def times(self, entry: Any, where: str) -> dict[int, float]:
        found = self.field(entry, "milliseconds", dict, where)
        if strangers := [size for size in found if not size.isdecimal()]:
            raise ValueError(f"{self.path}: {where}milliseconds has the batch size {strangers[0][:80]!r}.")
        return {int(size): self.number(found, size, f"{where}milliseconds.") for size in found}

    def branch(self, entry: Any, name: str) -> Branch:
        where = f"{name}."
        return Branch(
            self.field(entry, "slot", str, where),
            self.number(entry, "rise", where),
            self.number(entry, "response", where),
            self.field(entry, "parameters", int, where),
            self.field(entry, "macs", int, where),
            self.times(entry, where),
        )

    def step(self, entry: Any, name: str) -> Step:
        where = f"{name}."
        slots = self.field(entry, "slots", list, where)
        if not all(isinstance(slot, str) for slot in slots):
            raise ValueError(f"{self.path}: {where + 'slots'!r} must contain slot paths, got {str(slots)[:80]!r}.")
        return Step(
            slots,
            self.number(entry, "loss", where),
            self.number(entry, "accuracy", where),
            self.field(entry, "branches", int, where),
            self.field(entry, "parameters", int, where),
            self.field(entry, "macs", int, where),
            self.times(entry, where),
        )
