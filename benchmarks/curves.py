"""Pictures of the sweeps: accuracy against blocks, and which blocks stay."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import timm
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.comparisons import COMPARISONS, FEW
from benchmarks.jobs import Store
from benchmarks.plan import SWEEPS, sweep, table
from benchmarks.results import by_method, found, pruned_runs
from timm_eps.surgery.branches import gates


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture, in inches, with one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw_curves(store: Store, path: Path) -> None:
    """Accuracy against the share of remaining blocks, over ε and over the budget; the dense network as a band."""
    figure, axis = canvas(7, 4.5)
    for name, label, marker in (("keep", "by budget", "o"), ("epsilon", "ε fixed", "s")):
        points = []
        for value, jobs in sweep(SWEEPS[name]).items():
            runs = found(store, jobs)
            if runs:
                accuracies = [100 * run["accuracy"] for run in runs]
                middle = statistics.mean(accuracies)
                range_ = middle - min(accuracies), max(accuracies) - middle
                points.append((statistics.mean(run["blocks"] for run in runs), middle, *range_))
                axis.annotate(value, points[-1][:2], textcoords="offset points", xytext=(5, -11), fontsize=8)
        if points:
            blocks, middles, below, above = zip(*sorted(points), strict=True)
            axis.errorbar(blocks, middles, [below, above], marker=marker, capsize=3, label=label)
    dense = [100 * run["accuracy"] for run in found(store, by_method(table("digits", FEW))["dense"])]
    if dense:
        axis.axhspan(min(dense), max(dense), color="grey", alpha=0.2, label="dense, all 54 blocks")
    axis.set(xlabel="residual blocks left", ylabel="accuracy, %", ylim=(max(90, axis.get_ylim()[0]), 100.1))
    axis.set_title("eps_resnet110 on the digits; range of three seeds", fontsize=11)
    axis.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_blocks(store: Store, data: str, path: Path) -> None:
    """How often each block remains, over seeds and folds, by budget."""
    args = COMPARISONS[data].recipe()
    slots = list(gates(timm.create_model(args.model.name)))
    runs = pruned_runs(store, data)
    stayed = np.array([[slot not in run["removed"] for slot in slots] for run in runs], dtype=float)
    figure, axis = canvas(9, 2.8)
    axis.bar(range(len(slots)), stayed.mean(0), width=0.9, color="#1b4f72")
    third = len(slots) // 3
    for border in (third, 2 * third):
        axis.axvline(border - 0.5, color="black", linewidth=0.8)
    axis.set(xlim=(-0.5, len(slots) - 0.5), ylim=(0, 1), ylabel="share of runs", xlabel="residual block")
    parts = [f"stage {n}: {stayed[:, n * third : (n + 1) * third].sum(1).mean():.1f} stay" for n in range(3)]
    images = Path(args.data.dataset_name or data).name
    heading = f"{args.model.name} on the {images}, {len(runs)} runs: which blocks stay"
    axis.set_title(f"{heading}; {', '.join(parts)}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
