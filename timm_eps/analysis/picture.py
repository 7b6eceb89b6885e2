"""The picture of an analysis."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from ..surgery.branches import stage_of
from .worth import Branch, Step

__all__ = ["draw_analysis"]


def draw_analysis(branches: Sequence[Branch], curve: Sequence[Step], title: str, path: str | Path) -> None:
    """Draw the savings against the rise of the loss for each branch, and the curve of closings.

    Costs are times at the largest batch size, or multiply-adds if no times were measured.

    Args:
        branches: Value and cost of each branch alone.
        curve: Remaining network after each closing.
        title: First line of the picture.
        path: Path of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = max(curve[0].milliseconds, default=None)
    whole = "multiply-adds" if size is None else f"time at batch size {size}"

    def share(record: Branch | Step) -> float:
        if size is None:
            return 100 * record.macs / curve[0].macs
        return 100 * record.milliseconds[size] / curve[0].milliseconds[size]

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    single, turns = figure.subplots(1, 2)

    known = [branch for branch in branches if math.isfinite(branch.rise)]
    for stage in dict.fromkeys(stage_of(branch.slot) for branch in known):
        own = [branch for branch in known if stage_of(branch.slot) == stage]
        single.scatter([share(branch) for branch in own], [branch.rise for branch in own], s=28, label=stage)
    if len(known) <= 24:
        for branch in known:
            label = ".".join(re.findall(r"\d+", branch.slot)) or branch.slot
            single.annotate(label, (share(branch), branch.rise), (4, 3), textcoords="offset points", fontsize=9)
    if any(branch.rise > 0 for branch in known):
        smallest = min(abs(branch.rise) for branch in known if branch.rise)
        single.set_yscale("symlog", linthresh=max(smallest, 1e-4))
    single.margins(x=0.12)
    single.axhline(0, color="#95a5a6", linewidth=0.8)
    single.set(xlabel=f"saved without the branch, % of the {whole}", ylabel="rise of the loss without it")
    if known:
        single.legend(fontsize=9, frameon=False)

    left = [share(step) for step in curve]
    turns.plot(left, [step.loss for step in curve], marker="o", markersize=3, color="#1b4f72")
    turns.set(xlabel=f"remaining, % of the {whole}", ylabel="loss, one more branch closed at each point")
    turns.yaxis.label.set_color("#1b4f72")
    turns.invert_xaxis()
    accuracy = turns.twinx()
    accuracy.plot(left, [100 * step.accuracy for step in curve], marker="s", markersize=3, color="#c0392b")
    accuracy.set_ylabel("accuracy, %", color="#c0392b")
    figure.savefig(path, dpi=150, metadata={"Software": None})
