"""The comparison's records in one file, and tables of them. The tables have no other source."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr, t

from benchmarks.pretrained.cases import CASES
from benchmarks.pretrained.methods import METHODS, Job
from benchmarks.pretrained.plan import KEEPS_ALL
from benchmarks.pretrained.run import job_of
from benchmarks.results import mean_and_spread

SIMPLE = ("last", "even", "random", "stage_ends")
Records = dict[Job, dict[str, Any]]


def by_job(records: Iterable[dict[str, Any]]) -> Records:
    """The last successful record of each job."""
    return {job_of(record): record for record in records if "error" not in record}


def store(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Add records to a file, one per line, sorted. A new record replaces an old one of the same job."""
    known = by_job(json.loads(path.read_text()) if path.exists() else [])
    ordered = sorted(
        (known | by_job(records)).items(), key=lambda item: [str(getattr(item[0], name)) for name in _SORTED_BY]
    )
    path.write_text("[\n" + ",\n".join(json.dumps(record, sort_keys=True) for _, record in ordered) + "\n]\n")


_SORTED_BY = ("case", "images", "keep", "method", "distilled", "seed")


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences by Student's t, in their units. Empty for fewer than three."""
    if len(differences) < 3:
        return ""
    mean = statistics.mean(differences)
    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]".replace("-", "−")


def paired(these: dict[int, float], others: dict[int, float]) -> list[float]:
    """Differences in percentage points, seed by seed."""
    return [100 * (these[seed] - others[seed]) for seed in sorted(these.keys() & others.keys())]


def accuracies(records: Records, case: str, images: int, keep: int, method: str, distilled: bool) -> dict[int, float]:
    """Accuracy by seed."""
    return {
        job.seed: record["accuracy"]
        for job, record in records.items()
        if (job.case, job.images, job.keep, job.method, job.distilled) == (case, images, keep, method, distilled)
        and "accuracy" in record
    }


def best_simple(records: Records, case: str, images: int, keep: int) -> tuple[str, dict[int, float]]:
    """Name and accuracies of the distilled simple cut with the highest mean."""
    found = {method: accuracies(records, case, images, keep, method, True) for method in SIMPLE}
    found = {method: values for method, values in found.items() if values}
    if not found:
        return "", {}
    best = max(found, key=lambda method: statistics.mean(found[method].values()))
    return METHODS[best].name, found[best]


def latency_ratios(measured: Iterable[dict[str, Any]], case: str, images: int, keep: int) -> dict[str, dict[str, str]]:
    """Latency relative to the dense network's, by way and batch size, then by method: the mean over the seeds."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for one in measured:
        if (one["case"], one["images"], one["keep"]) == (case, images, keep):
            column = ratios.setdefault(f"{one['way']} at {one['batch']}", {})
            for method, seconds in one["seconds"].items():
                column.setdefault(method, []).append(seconds / one["seconds"]["dense"])
    return {
        name: {method: f"{statistics.mean(values):.2f}" for method, values in column.items()}
        for name, column in ratios.items()
    }


def table(
    records: Records, case: str, images: int, keep: int, latencies: Mapping[str, Mapping[str, str]] | None = None
) -> list[str]:
    """A Markdown table of one case, number of training images and budget.

    Args:
        records: Records by job.
        case: Name in ``CASES``.
        images: Number of training images.
        keep: Number of branches that stay.
        latencies: Further columns, as returned by :func:`latency_ratios`.
    """
    latencies = latencies or {}
    dense, taught = (accuracies(records, case, images, 0, "dense", distilled) for distilled in (False, True))
    simple_name, simple = best_simple(records, case, images, keep)
    columns = [
        *("", "distilled", "seeds", "accuracy, %", "to dense, points", "to distilled dense"),
        f"to the best simple cut{f' ({simple_name})' if simple_name else ''}",
        *("parameters, M", "multiply-adds, M", "training time", "loads"),
        *(f"{name}, of dense" for name in latencies),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for method, distilled in ((method, distilled) for method in METHODS for distilled in (False, True)):
        kept = 0 if method in KEEPS_ALL else keep
        values = accuracies(records, case, images, kept, method, distilled)
        if not values:
            continue
        runs = [records[Job(case, method, images, kept, seed, distilled)] for seed in values]
        cells = [
            METHODS[method].name,
            "yes" if distilled else "",
            str(len(runs)),
            mean_and_spread([100 * value for value in values.values()], "{:.2f}"),
            "" if values == dense else interval(paired(values, dense)),
            "" if values == taught else interval(paired(values, taught)),
            "" if values == simple else interval(paired(values, simple)),
            _mean(runs, "params"),
            _mean(runs, "macs"),
            training_time(records, runs),
            "" if "ratio" in runs[0] else "yes",
            *(column.get(method, "") for column in latencies.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def training_time(records: Records, runs: Sequence[dict[str, Any]]) -> str:
    """Training time relative to one training of the dense network: the mean over the seeds.

    Methods that need the fine-tuned dense network, as a teacher or for its losses, pay for its training too. The simple
    cuts need its losses only for the predictions of this comparison.
    """
    ratios = []
    for run in runs:
        dense = records.get(Job(run["case"], "dense", run["images"], 0, run["seed"]))
        needs_losses = METHODS[run["method"]].after_dense and not run["method"].startswith(SIMPLE)
        if dense is not None:
            before = dense["seconds"] if run["distilled"] or needs_losses else 0.0
            ratios.append((before + run["seconds"]) / dense["seconds"])
    return f"{statistics.mean(ratios):.2f}" if ratios else ""


def compared(fresh: Records, stored: Records) -> str:
    """Accuracy of new and stored trainings. Marks differences larger than the stored trainings' spread."""
    lines = ["| | distilled | stored, % | now, % | |", "|---|---|---:|---:|---|"]
    rows = {
        (job.case, job.images, job.keep, job.method, job.distilled): None for job in fresh if "accuracy" in fresh[job]
    }
    for row in rows:
        before, now = ([100 * value for value in accuracies(records, *row).values()] for records in (stored, fresh))
        outcome = "nothing stored"
        if before:
            spread = statistics.stdev(before) if len(before) > 1 else 0.0
            differs = abs(statistics.mean(now) - statistics.mean(before)) > spread
            outcome = "**differs**" if differs else "within the spread"
        shown = (mean_and_spread(values, "{:.2f}") if values else "" for values in (before, now))
        lines.append(f"| {' | '.join([METHODS[row[3]].name, 'yes' if row[4] else '', *shown, outcome])} |")
    return "\n".join(lines)


def _mean(runs: Sequence[dict[str, Any]], key: str) -> str:
    return f"{statistics.mean(run[key] for run in runs) / 1e6:.2f}"


def correlation(records: Records, case: str, images: int, keep: int) -> str:
    """Rank correlation, within seeds, of the predicted rise of the loss with the accuracy after training."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for job, record in records.items():
        fits = (job.case, job.images, job.keep, job.distilled) == (case, images, keep, True)
        if fits and "predicted_rise" in record:
            pairs.setdefault(job.seed, []).append((record["predicted_rise"], record["accuracy"]))
    found = [float(spearmanr(*zip(*values, strict=True)).statistic) for values in pairs.values() if len(values) > 3]
    if not found:
        return ""
    total = sum(len(values) for values in pairs.values() if len(values) > 3)
    mean = f"{statistics.mean(found):+.2f}".replace("-", "−")
    what = "Rank correlation of the predicted rise of the loss with the accuracy after distilled training, within seeds"
    return f"{what}: {mean} on average over {len(found)} seeds, {total} structures in all."


def against_channels(records: Records, case: str, images: int, keep: int) -> str:
    """The differences in accuracy between removing blocks and removing channels."""
    theirs = accuracies(records, case, images, keep, "channels_to_latency", True)
    found = []
    for method in (*SIMPLE, "leave_one_out"):
        ours = accuracies(records, case, images, keep, method, True)
        found += [f"{METHODS[method].name} {line}"] if (line := interval(paired(ours, theirs))) else []
    return f"Minus Torch-Pruning of the same speed, all distilled, in points: {'; '.join(found)}." if found else ""


LEGEND = """\
- *Distilled*: the dense network, fine-tuned on the same images, is the teacher.
- Differences are in points, with 95 % intervals of paired differences over the seeds.
- *As fast*: as fast as the leave-one-out network in eager mode, on two CPU cores.
- *Training time* is relative to one training of the dense network. It includes that training if the method needs it,
  as a teacher or for its losses. Several trainings shared the device, so small differences say nothing.
- *Loads*: timm and `AutoModel` build and load the saved network.
"""


def page(stored: Iterable[dict[str, Any]], measured: Sequence[dict[str, Any]] = ()) -> str:
    """All tables, and the conditions of the measurements.

    Args:
        stored: Records of trainings.
        measured: Records of latencies, as written by ``latency.py``.
    """
    records = by_job(stored)
    lines = [LEGEND]
    for case, about in CASES.items():
        counts = sorted({job.images for job in records if job.case == case and job.images})
        for images in counts:
            of_case = [job for job in records if (job.case, job.images) == (case, images)]
            keeps = sorted({job.keep for job in of_case if job.keep and job.method != "speed"}) or [about.keeps[0]]
            for keep in keeps:
                steps = about.recipes[images].steps
                lines += [f"### {about.title}; {images:,} images, {keep} branches stay", ""]
                latencies = latency_ratios(measured, case, images, keep)
                lines += [*table(records, case, images, keep, latencies), ""]
                for sentence in (against_channels, correlation):
                    lines += [line, ""] if (line := sentence(records, case, images, keep)) else []
            hardware = sorted({records[job]["hardware"] for job in of_case})
            lines += [
                f"{steps:,} steps of {about.recipes[images].batch_size} images each. Speed was compared at batch "
                f"{about.timed_batch}. Hardware: {'; '.join(hardware)}.",
                "",
            ]
    return "\n".join(lines)
