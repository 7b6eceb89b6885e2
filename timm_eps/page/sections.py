"""The sections of a page as plain values for its template. A section without data is None."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.report import Analysis
from ..analysis.worth import Branch, Step
from ..surgery.branches import stage_of
from . import drawings
from .drawings import Mark
from .numbers import count, megabytes, milliseconds, percent, short_count, signed
from .saved import RunResults, SavedNetwork
from .timings import Timing

__all__ = ["costs", "facts", "latency", "provenance", "size", "structure"]

_MOST_LABELS = 24


def facts(network: SavedNetwork, found: Mapping[str, Any], timings: Sequence[Timing]) -> list[dict[str, str]]:
    """The three facts at the head of a page.

    Args:
        network: The saved network.
        found: The section :func:`timm_eps.page.answer_sections.accuracy`, or an empty one.
        timings: Latencies.
    """
    dense, now = network.dense, network.now
    saved = 1 - now.parameters / dense.parameters
    stayed = f"{network.kept} of {len(network.slots)} residual branches stayed."
    listed = [
        fact("Smaller", percent(saved, 0), "fewer parameters",
             f"{short_count(now.parameters)} instead of {short_count(dense.parameters)}. {stayed}")
        if network.removed
        else fact("Size", short_count(now.parameters), "parameters", f"All {len(network.slots)} branches stayed.")
    ]  # fmt: skip
    timed = next((timing for timing in timings if timing.ratio), None)
    if timed is not None and timed.dense is not None and timed.ratio is not None and network.removed:
        images = "1 image" if timed.batch_size == 1 else f"{timed.batch_size} images"
        detail = f"{milliseconds(timed.now)} instead of {milliseconds(timed.dense)} for {images}, {timed.runtime}."
        low, high = timed.speedup or (timed.ratio, timed.ratio)
        if low < 1 < high:  # happens on a busy machine
            detail += f" The measurement is uncertain: the quartiles are {low:.2f} and {high:.2f}."
        name = "Faster" if low >= 1 else "Slower" if high <= 1 else "Speed"
        listed.append(fact(name, f"{timed.ratio:.2f}×", "as fast", detail))
    elif network.removed:
        left = percent(1 - now.macs / dense.macs, 0)
        listed.append(fact("Less to compute", left, "fewer multiply-adds", "No latency was measured."))
    else:
        listed.append(fact("To compute", short_count(now.macs), "multiply-adds", "For one image."))
    if found:
        listed.append(fact("Accuracy", found["now"], "of the images are right", found["short"]))
    return listed


def fact(name: str, figure: str, unit: str, detail: str) -> dict[str, str]:
    return {"name": name, "figure": figure, "unit": unit, "detail": detail}


def structure(network: SavedNetwork) -> dict[str, Any]:
    """Kept and removed branches, by stage."""
    return {
        "kept": network.kept,
        "total": len(network.slots),
        "several": any(len(block) > 1 for stage in network.stages for block in stage.blocks),
        "stages": [
            {
                "name": stage.name,
                "kept": stage.kept,
                "total": stage.total,
                "dense": short_count(stage.dense),
                "now": short_count(stage.now),
                "drawing": drawings.draw_blocks(
                    stage.blocks, f"{stage.name}: {stage.kept} of {stage.total} branches stayed"
                ),
            }
            for stage in network.stages
        ],
    }


def size(network: SavedNetwork) -> list[dict[str, str]]:
    """Rows of the table of sizes."""
    dense, now = network.dense, network.now

    def row(name: str, before: int, after: int) -> dict[str, str]:
        change = f"{signed(100 * (after / before - 1), 0)} %" if before else ""
        return {"name": name, "dense": count(before), "now": count(after), "change": change}

    rows = [
        row("Residual branches", len(network.slots), network.kept),
        row("Parameters", dense.parameters, now.parameters),
        row("Multiply-adds for one image", dense.macs, now.macs),
    ]
    return [*rows, {"name": "Size of the weights", "dense": "", "now": megabytes(network.bytes), "change": ""}]


def latency(timings: Sequence[Timing], is_pruned: bool) -> list[dict[str, Any]]:
    """Bars of the latency by runtime and batch size. The longest bar of a batch size is 100 % wide.

    Args:
        timings: Latencies.
        is_pruned: Whether a branch was removed. A dense network is not compared with itself.
    """
    if not is_pruned:
        timings = [Timing(timing.runtime, timing.batch_size, None, timing.now) for timing in timings]
    longest: dict[int, float] = {}
    for timing in timings:
        longest[timing.batch_size] = max(longest.get(timing.batch_size, 0.0), timing.dense or 0.0, timing.now)
    found: dict[int, list[dict[str, Any]]] = {}
    for timing in timings:
        bars = [("dense", timing.dense), ("now", timing.now)]
        spreads = dict(zip(("dense", "now"), timing.spread or (), strict=False))
        low, high = timing.speedup or (math.nan, math.nan)
        ratio = f"{timing.ratio:.2f}× as fast" if timing.ratio else ""
        if timing.ratio and timing.speedup:
            ratio += f" ({low:.2f} to {high:.2f})"
        found.setdefault(timing.batch_size, []).append(
            {
                "runtime": timing.runtime,
                "ratio": ratio,
                "bars": [
                    {
                        "name": name,
                        "text": milliseconds(value),
                        "spread": f"{milliseconds(spreads[name][0])} to {milliseconds(spreads[name][1])}"
                        if name in spreads
                        else "",
                        "width": round(100 * value / longest[timing.batch_size], 2),
                    }
                    for name, value in bars
                    if value is not None
                ],
            }
        )
    return [{"batch_size": batch_size, "rows": rows} for batch_size, rows in sorted(found.items())]


def costs(network: SavedNetwork, analysis: Analysis | None) -> dict[str, Any] | None:
    """Cost of each branch against the rise of the loss without it, and the curve."""
    if analysis is None:
        return None
    size = max(analysis.batch_sizes, default=None)
    what = "multiply-adds" if size is None else f"time at batch size {size}"
    dense = analysis.dense

    def share(record: Branch | Step) -> float:
        if size is None:
            return 100 * record.macs / dense.macs
        return 100 * record.milliseconds[size] / dense.milliseconds[size]

    known = [branch for branch in analysis.branches if math.isfinite(branch.rise) and math.isfinite(share(branch))]
    with_labels = len(known) <= _MOST_LABELS
    marks = [
        Mark(share(branch), branch.rise,
             f"{branch.slot}: {share(branch):.1f} % of the {what}, loss {signed(branch.rise, 4)} without it",
             "kept" if network.slots[branch.slot] else "removed", _number(branch.slot) if with_labels else "")
        for branch in known
    ]  # fmt: skip
    steps = [step for step in analysis.curve if math.isfinite(step.accuracy) and math.isfinite(share(step))]
    curve = [
        Mark(share(step), 100 * step.accuracy,
             f"{step.slots[0] if step.slots else 'dense'}: {share(step):.1f} % of the {what}, accuracy "
             f"{percent(step.accuracy)}, loss {step.loss:.4f}")
        for step in steps
    ]  # fmt: skip
    rows = [
        {"slot": branch.slot, "kept": network.slots[branch.slot], "share": f"{share(branch):.1f} %",
         "rise": signed(branch.rise, 4), "parameters": count(branch.parameters), "stage": stage_of(branch.slot)}
        for branch in analysis.branches
    ]  # fmt: skip
    return {
        "scatter": drawings.draw_scatter(marks, f"saved without the branch, % of the {what}", "rise of the loss",
                                         "What each branch costs and by how much the loss rises without it")
        if marks else None,
        "curve": drawings.draw_line(curve, f"what is left, % of the {what}", "accuracy, %",
                                    "Accuracy while one branch after the other closes")
        if len(curve) > 1 else None,
        "rows": rows, "images": count(analysis.images), "hardware": analysis.hardware if size else "", "what": what,
        "with_labels": with_labels, "is_dense": dense.branches == len(network.slots), "branches": dense.branches,
    }  # fmt: skip


def _number(slot: str) -> str:
    return ".".join(re.findall(r"\d+", slot)) or slot


def provenance(results: RunResults | None) -> dict[str, Any] | None:
    """Origin of the network, from the results of its run."""
    if results is None:
        return None
    values = results.values
    names = {"dataset": "Data set", "train_images": "Training images", "eval_images": "Evaluation images",
             "eval_split": "Evaluated on", "base_model": "Began with", "seed": "Seed", "hardware": "Hardware",
             "license": "Licence of the weights"}  # fmt: skip
    rows = {
        shown: count(values[name]) if name.endswith("_images") else str(values[name])
        for name, shown in names.items()
        if values.get(name) is not None
    }
    if versions := values.get("versions"):
        rows["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    arguments = {name: str(value)[:200] for name, value in sorted((values.get("arguments") or {}).items())}
    return {"rows": rows, "arguments": arguments} if rows or arguments else None
