"""Results of a run: a table of parameters, multiply-adds and latency, and a picture of the removed blocks."""

from __future__ import annotations

import itertools
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .surgery.branches import evaluating, stage_of
from .surgery.tracing import meta_copy

__all__ = [
    "class_changes",
    "comparison_table",
    "count_macs",
    "count_parameters",
    "draw_blocks",
    "hardware",
    "paired_latency",
    "paired_seconds",
    "peak_memory",
    "reset_peak_memory",
    "spread_of_ratios",
    "timed",
]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products for one image (1, C, H, W).

    They are counted on a copy on the meta device, so the number is the same for every device: torch counts attention
    only on some devices.
    """
    has_memory = any(not parameter.is_meta for parameter in model.parameters())
    net = meta_copy(model) if has_memory else model
    with evaluating(net), FlopCounterMode(display=False) as counter:
        net(torch.empty_like(image, device="meta"))
    return counter.get_total_flops() // 2


def hardware(device: torch.device | str) -> str:
    """Name of the accelerator, or number of threads and, on Linux, the processor's model."""
    device = torch.device(device)
    if device.type == "cpu":
        described = Path("/proc/cpuinfo")
        lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return ", ".join([f"{torch.get_num_threads()} threads of {platform.machine()}", *models[:1]])
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def paired_latency(
    models: Mapping[str, nn.Module], batch: Tensor, repeats: int = 15, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of a forward pass. The arguments are those of :func:`paired_seconds`."""
    return {name: statistics.median(found) for name, found in paired_seconds(models, batch, repeats, warmup).items()}


def spread_of_ratios(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """Lower and upper quartile of the ratios of paired times."""
    ratios = [one / other for one, other in zip(some, others, strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4)
    return [lower, upper]


def paired_seconds(
    models: Mapping[str, nn.Module], batch: Tensor, repeats: int = 15, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of forward passes, measured in turn so that drift of the machine affects all models equally.

    The order is random in each turn, because each model affects the cache of the next one.

    Args:
        models: Models by name. They run in evaluation mode.
        batch: Images (B, C, H, W).
        repeats: Number of measurements of each model.
        warmup: Number of passes of each model that are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    synchronise: Callable[[], None] = torch.cuda.synchronize if batch.is_cuda else lambda: None
    order, draw = list(models), random.Random(0)
    for turn in range(warmup + repeats):
        draw.shuffle(order)
        for name in order:
            model = models[name]
            with evaluating(model):
                synchronise()
                start = time.perf_counter()
                model(batch)
                synchronise()
                stop = time.perf_counter()  # before the modes of all modules are restored, which takes time
            if turn >= warmup:
                seconds[name].append(stop - start)
    return seconds


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Peak bytes since the last reset: of the accelerator's allocator, or resident memory on Unix."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage starts with the memory of the parent process
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Restart :func:`peak_memory` from the current memory. It has an effect only on Linux and CUDA."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")  # of proc(5): "reset the peak resident set size"


def comparison_table(results: Mapping[str, Any]) -> str:
    """A Markdown table that compares the dense and the pruned network, from the values of ``all_results.json``."""

    def row(what: str, before: Any, after: Any, form: Callable[[Any], str], change: str = "") -> str:
        return f"| {what} | {form(before)} | {form(after)} | {change} |"

    def gone(key: str) -> str:
        before, after = results[f"dense_{key}"], results[key]
        return f"−{100 * (1 - after / before):.1f} %"

    def faster(key: str) -> str:
        times = f"{results[f'dense_{key}'] / results[key]:.2f}"
        if spread := results.get(key.replace("_seconds", "_speedup_quartiles")):
            times += f" ({spread[0]:.2f} to {spread[1]:.2f})"
        return f"{times}× faster"

    def percent(value: float | None) -> str:
        return "not trained" if value is None else f"{100 * value:.2f} %"

    if not is_pruned(results) and "dense_eval_accuracy" not in results:
        return _plain_table(results)
    blocks, kept = results["blocks_total"], results["blocks_kept"]
    dense_accuracy, accuracy = results.get("dense_eval_accuracy"), results["eval_accuracy"]
    difference = "" if dense_accuracy is None else f"{100 * (accuracy - dense_accuracy):+.2f} points".replace("-", "−")
    lines = [
        f"| {results['architecture']} | dense | pruned | |",
        "|---|---:|---:|---:|",
        row("residual branches", blocks, kept, str, f"−{blocks - kept}"),
        row("parameters", results["dense_params"], results["params"], "{:,}".format, gone("params")),
        row("multiply-adds per image", results["dense_macs"], results["macs"], "{:,}".format, gone("macs")),
    ]
    for key, what in timed(results):
        lines.append(row(what, results[f"dense_{key}"], results[key], _milliseconds, faster(key)))
    if "dense_train_seconds" in results:
        times = results["dense_train_seconds"], results["train_seconds"]
        lines.append(row("training time", *times, "{:.0f} s".format, f"{times[1] / times[0]:.2f}×"))
    lines.append(row("accuracy", dense_accuracy, accuracy, percent, difference))
    if "test_accuracy" in results:
        lines.append(row("accuracy, test split", results.get("dense_test_accuracy"), results["test_accuracy"], percent))
    return "\n".join(lines)


def is_pruned(results: Mapping[str, Any]) -> bool:
    """Whether a run removed a branch."""
    return results["blocks_kept"] < results["blocks_total"]


def outcome(results: Mapping[str, Any]) -> str:
    """A summary of a run in a few sentences, from the values of ``all_results.json``."""
    share = 100 * (1 - results["params"] / results["dense_params"])
    text = (
        f"{results['blocks_kept']} of {results['blocks_total']} residual branches remain; "
        f"{share:.1f} % of the parameters are removed. The pruned network classifies "
        f"{100 * results['eval_accuracy']:.2f} % of the {results['eval_images']} test images correctly."
    )
    if not is_pruned(results):
        text = (
            f"The network has all its {results['blocks_total']} residual branches and classifies "
            f"{100 * results['eval_accuracy']:.2f} % of the {results['eval_images']} test images correctly."
        )
    wanted = results.get("blocks_wanted")
    if wanted is not None and results["blocks_kept"] > wanted:
        text += (
            f" The budget was not reached: {wanted} branches were requested, {results['blocks_kept']} remain. "
            "Train for more epochs, or shorten --epsilon_warmup_epochs and --ramp_epochs."
        )
    return text


def class_changes(results: Mapping[str, Any], most: int = 3) -> str:
    """The classes with the largest loss of accuracy after pruning; empty if the accuracies are unknown.

    Args:
        results: Values of ``all_results.json``.
        most: Number of classes to name.
    """
    before, after = (results.get(f"{prefix}eval_accuracy_by_class") or {} for prefix in ("dense_", ""))
    changes = {name: 100 * (after[name] - value) for name, value in before.items() if name in after}
    worst = sorted((name for name in changes if changes[name] < 0), key=changes.__getitem__)[:most]
    if not changes:
        return ""
    if not worst:
        return "The accuracy fell for no class."
    named = ", ".join(f"{name} {changes[name]:+.1f}".replace("-", "−") for name in worst)
    return f"Largest changes of accuracy by class, in points: {named}."


def _plain_table(results: Mapping[str, Any]) -> str:
    """A Markdown table of an unpruned network."""
    rows = {
        "residual branches": str(results["blocks_total"]),
        "parameters": f"{results['params']:,}",
        "multiply-adds per image": f"{results['macs']:,}",
    }
    rows |= {what: _milliseconds(results[key]) for key, what in timed(results)}
    rows["accuracy"] = f"{100 * results['eval_accuracy']:.2f} %"
    if "test_accuracy" in results:
        rows["accuracy, test split"] = f"{100 * results['test_accuracy']:.2f} %"
    lines = [f"| {what} | {value} |" for what, value in rows.items()]
    return "\n".join([f"| {results['architecture']} | |", "|---|---:|", *lines])


def timed(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and labels of the measured latencies, sorted by runtime, then by batch size."""
    found = []
    for key in results:
        if parts := re.fullmatch(r"(onnx_)?latency_batch(\d+)_seconds", key):
            runtime = ", ONNX Runtime on CPUs" if parts[1] else ""
            found.append((bool(parts[1]), int(parts[2]), key, f"latency at batch {parts[2]}{runtime}"))
    return [(key, what) for _, _, key, what in sorted(found)]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def draw_blocks(
    slots: Sequence[str], removed: Sequence[str], history: Sequence[Mapping[str, Any]], path: str | Path, title: str
) -> None:
    """Draw the remaining blocks and, for each epoch, the responses and the closed and removed branches.

    The counterpart of the paper's figure 1 for one run. Without a history only the structure is drawn.

    Args:
        slots: All branches of the unpruned network, in order.
        removed: Removed branches.
        history: Records of :attr:`EpsilonPruner.history`.
        path: Path of the PNG file.
        title: First line of the picture.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    position = {slot: index for index, slot in enumerate(slots)}
    gone = set(removed)
    stages = [stage_of(slot) for slot in slots]
    borders = [index for index in range(1, len(slots)) if stages[index] != stages[index - 1]]

    figure = Figure(figsize=(11, 6.5 if history else 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    if history:
        strip, heat = figure.subplots(2, 1, height_ratios=(1, 9), sharex=True)
    else:
        strip = figure.subplots()
    kept_colour, gone_colour = "#1b4f72", "#e5e7e9"
    strip.bar(range(len(slots)), 1, width=0.9, color=[gone_colour if slot in gone else kept_colour for slot in slots])
    strip.set(yticks=[], ylim=(0, 1), xlim=(-0.5, len(slots) - 0.5))
    strip.set_ylabel("dark:\nstayed", rotation=0, ha="right", va="center")
    for spine in strip.spines.values():
        spine.set_visible(False)
    last = strip
    if history:
        response = np.full((len(history), len(slots)), np.nan)
        unmeasured = np.full(response.shape, np.nan)
        closed_at, removed_at = [], []
        measured = set().union(*(record["responses"] for record in history))
        there = {slot for slot in slots if slot in measured or slot not in gone}
        for row, record in enumerate(history):
            for slot, value in record["responses"].items():
                response[row, position[slot]] = value
            for slot in there - record["responses"].keys():
                unmeasured[row, position[slot]] = 1.0
            there -= set(record["removed"])
            closed_at += [(position[slot], row + 1) for slot in record["closed"]]
            removed_at += [(position[slot], row + 1) for slot in (*record["removed"], *record.get("held", ()))]
        positive = response[np.isfinite(response) & (response > 0)]
        low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
        extent = (-0.5, len(slots) - 0.5, len(history) + 0.5, 0.5)
        cells: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
        heat.imshow(unmeasured, cmap=ListedColormap(["white"]), **cells)
        colours = LogNorm(low, max(high, low * 1.01))
        image = heat.imshow(np.clip(response, low, None), cmap="viridis", norm=colours, **cells)
        heat.set_facecolor(gone_colour)
        if closed_at:
            heat.scatter(*zip(*closed_at, strict=True), marker="s", s=5, color="#e74c3c", label="closed in this epoch")
        if removed_at:
            heat.scatter(*zip(*removed_at, strict=True), marker="x", s=28, color="black", label="removed after it")
        heat.set_ylabel("epoch")
        if closed_at:
            figure.legend(loc="outside lower right", ncols=2, fontsize=9, frameon=False)
        figure.colorbar(
            image, ax=heat, label="response: largest |F| of the epoch (white: not measured)", pad=0.01, format="%g"
        )
        last = heat
    for border in borders:
        for axis in {strip, last}:
            axis.axvline(border - 0.5, color="black", linewidth=0.8)
    ends = [0, *borders, len(slots)]
    last.set_xticks([(a + b - 1) / 2 for a, b in itertools.pairwise(ends)])
    last.set_xticklabels([stages[a] for a in ends[:-1]])
    last.set_xlabel("residual branch, from the input to the output")
    figure.savefig(path, dpi=110, metadata={"Software": None})
