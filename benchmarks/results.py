"""Write RESULTS.md: tables of ``results.json``. The page has no other source."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.comparisons import COMPARISONS, FEW
from benchmarks.jobs import Job, Store
from benchmarks.latency import NATIVE, REPARAMETERIZED, REST, WAYS, WHOLE
from benchmarks.methods import METHODS
from benchmarks.plan import SWEEPS, depths, latency_jobs, sweep, table

OURS = "budget"
BLOCKS = "blocks_{}.png"
Values = list[float]


def mean_and_spread(values: Values, form: str = "{:.2f}") -> str:
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


def found(store: Store, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    return [store.results[job] for job in jobs if job in store.results]


def pruned_runs(store: Store, data: str) -> list[dict[str, Any]]:
    """Runs of the table's budget method."""
    return found(store, by_method(table(data))[OURS])


def by_method(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.method, []).append(job)
    return groups


def difference(store: Store, jobs: list[Job], others: list[Job]) -> Values:
    """Lead of the other runs in accuracy, in percentage points, run by run."""
    pairs = zip(jobs, others, strict=True)
    return [
        100 * (store.results[other]["accuracy"] - store.results[job]["accuracy"])
        for job, other in pairs
        if job in store.results and other in store.results
    ]


def verdict(values: Values) -> str:
    """Whether ε-ResNet is ahead: by more than twice the standard error of the mean difference, or not significantly.

    With few runs the standard error is unreliable, so no verdict is given.
    """
    if len(values) < 2:
        return ""
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    if len(values) < 10:
        return f"{mean:+.2f} ± {error:.2f}, too few runs"
    judged = "ahead" if mean > 2 * error else "**behind**" if mean < -2 * error else "not significant"
    return f"{mean:+.2f} ± {error:.2f}, {judged}"


def latencies(store: Store, data: str, name: str) -> dict[str, Values]:
    """Latency relative to the dense network by method, one value per measured seed and fold."""
    ratios: dict[str, Values] = {}
    for result in found(store, latency_jobs(data)):
        for method, seconds in result[name].items():
            ratios.setdefault(method, []).append(seconds / result[name]["dense"])
    return ratios


def ratio(values: Values) -> str:
    return f"{mean_and_spread(values)}×" if values else ""


def methods_table(store: Store, data: str, pairs: list[tuple[int, int]] | None = None) -> list[str]:
    groups = by_method(table(data, pairs))
    compared = COMPARISONS[data]
    side = compared.sides[0]
    columns = {
        OURS: "lead of ε by budget, points",
        compared.early: "lead of the early budget with the dense network's compute, points",
    }
    ahead = {ours: heading for ours, heading in columns.items() if found(store, groups[ours])}
    at_one, at_many = latencies(store, data, "seconds at 1"), latencies(store, data, f"seconds at 128, {side}x{side}")
    lines = [
        f"| | runs | epochs | accuracy, % | {''.join(f'{heading} | ' for heading in ahead.values())}blocks "
        "| parameters, thousands | multiply-adds, millions | latency at 1 | at 128 | training | memory, MiB "
        "| file, KiB | in timm | in transformers |",
        f"|---|{'---:|' * (11 + len(ahead))}---|---|",
    ]
    for method, jobs in groups.items():
        runs = found(store, jobs)
        if not runs:
            continue

        def column(value: Callable[[dict], float], form: str = "{:.2f}", runs: list[dict] = runs) -> str:
            return mean_and_spread([value(run) for run in runs], form)

        times = [
            store.results[job]["train_seconds"] / store.results[dense]["train_seconds"]
            for job, dense in zip(jobs, groups["dense"], strict=True)
            if {job, dense} <= store.results.keys()
            and store.results[job]["hardware"] == store.results[dense]["hardware"]
        ]
        loads = ["yes" if all(run["saved"][name] for run in runs) else "**no**" for name in ("timm", "transformers")]
        criterion = f"criterion {compared.recipe().pruning.criterion}" if method == OURS else ""
        told = f"`{' '.join(jobs[0].flags)}`" if jobs[0].flags else criterion
        cells = [
            METHODS[method].name + (f", {told}" if told else ""),
            f"{len(runs)}",
            f"{statistics.mean(run['epochs'] for run in runs):.0f}",
            column(lambda run: 100 * run["accuracy"]),
            *("" if method == ours else verdict(difference(store, jobs, groups[ours])) for ours in ahead),
            column(lambda run: run["blocks"], "{:.1f}"),
            column(lambda run: run["params"] / 1e3, "{:.0f}"),
            column(lambda run: run["macs"] / 1e6, "{:.2f}"),
            ratio(at_one.get(method, [])),
            ratio(at_many.get(method, [])),
            f"{statistics.median(times):.2f}×" if times else "",
            f"{statistics.median(run['train_bytes'] for run in runs) / 2**20:.0f}",
            f"{statistics.median(run['saved']['bytes'] for run in runs) / 2**10:.0f}",
            *loads,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed_table(store: Store, data: str) -> list[str]:
    """Speed-up and reduction of the multiply-adds, for every measured way to run the networks."""
    results = found(store, latency_jobs(data))
    sizes = [f"{side}x{side}" for side in COMPARISONS[data].sides]
    ways = WAYS["cpu"] | WAYS["cuda"]
    measured = [(size, 128, name, f"seconds at 128, {size}{name}") for size in sizes for name in ways]
    lines = [
        "| | batch | native over pruned, as loaded | native over pruned, reparameterized | speed-up, as loaded "
        "| speed-up, reparameterized | reduction of the blocks' multiply-adds | share | share, blocks alone |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def quotient(runs: list[dict[str, float]], above: str, below: str) -> Values:
        """Ratio of two networks' figures, over the runs with both. Not every runtime measures all networks."""
        return [seconds[above] / seconds[below] for seconds in runs if {above, below} <= seconds.keys()]

    for size, batch, name, key in [*measured, (sizes[0], 1, "", "seconds at 1")]:
        known = [result for result in results if key in result]
        if not known:
            continue
        seconds = [result[key] for result in known]
        blocks = [{net: each[net] - each[REST] for net in (WHOLE, REPARAMETERIZED)} for each in seconds]
        macs = [result[f"block macs, {size}"] for result in known]
        promised = quotient(macs, "dense", OURS)
        faster = quotient(seconds, WHOLE, REPARAMETERIZED)
        shares = [
            mean_and_spread([a / b for a, b in zip(values, promised, strict=True)])
            for values in (faster, quotient(blocks, WHOLE, REPARAMETERIZED))
        ]
        cells = [
            f"{size}{name}",
            str(batch),
            mean_and_spread(quotient(seconds, NATIVE, OURS), "{:.3f}"),
            mean_and_spread(quotient(seconds, NATIVE, REPARAMETERIZED), "{:.3f}"),
            ratio(quotient(seconds, "dense", OURS)),
            ratio(faster),
            ratio(promised),
            *shares,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sweep_table(store: Store, name: str) -> list[str]:
    lines = [f"| {name} | accuracy, % | blocks | parameters removed, % |", "|---|---:|---:|---:|"]
    dense = {job.seed: job for job in by_method(table("digits", FEW))["dense"]}
    for value, jobs in sweep(SWEEPS[name]).items():
        known = [job for job in jobs if job in store.results]
        runs = found(store, known)
        whole = [store.results[dense[job.seed]]["params"] for job in known if dense[job.seed] in store.results]
        gone = [100 * (1 - run["params"] / total) for run, total in zip(runs, whole, strict=False)]
        if runs:
            lines.append(
                f"| {value} | {mean_and_spread([100 * run['accuracy'] for run in runs])} "
                f"| {mean_and_spread([run['blocks'] for run in runs], '{:.1f}')} | {mean_and_spread(gone, '{:.1f}')} |"
            )
    return lines


def depth_table(store: Store) -> list[str]:
    """Accuracy by depth on the glyphs, and accuracy of a small network with a long training."""
    lines = ["| dense network | epochs | runs | accuracy, % | parameters, thousands |", "|---|---:|---:|---:|---:|"]
    for name, jobs in depths().items():
        if runs := found(store, jobs):
            accuracy = mean_and_spread([100 * run["accuracy"] for run in runs])
            lines.append(f"| {name} | {runs[0]['epochs']} | {len(runs)} | {accuracy} | {runs[0]['params'] / 1e3:.0f} |")
    return lines


def page(store: Store) -> str:
    """The text of RESULTS.md."""
    results = [result for job, result in store.results.items() if job.method != "latency"]
    if not results:
        return "# Results from scratch\n\nNothing was run yet.\n"
    lines = [
        "# Results from scratch",
        "",
        "Written by `python -m benchmarks`. Do not edit. The last section lists hardware, versions and commits.",
        "",
        "Values are mean ± standard deviation over the runs. All methods train with the same recipe. If a method "
        "starts from a trained dense network, its epochs and training time include those of that network. A lead is "
        "the mean difference in accuracy ± its standard error, over pairs of runs with the same seed and fold. With "
        "fewer than ten pairs the table says *too few runs*. Latencies are relative to the dense network. All networks "
        "are timed in turn, in one process that keeps its memory. Training time is relative to the dense network on "
        "the same hardware, as a median. Several trainings ran at once: one on each of two cores, up to 15 on a GPU. "
        "The memory column shows how much training adds to the process; on a GPU, how much GPU memory it takes.",
    ]
    for data, compared in COMPARISONS.items():
        if not found(store, table(data)):
            continue
        lines += ["", f"## {compared.title}", "", compared.length_of_epochs(), "", *methods_table(store, data)]
        if pruned_runs(store, data):
            lines += ["", f"![Share of runs in which each block stayed]({BLOCKS.format(data)})"]
        if found(store, latency_jobs(data)):
            lines += [
                "",
                "The next table compares the speed of the pruned network (ε by budget) and of the dense network. Both "
                "are timed as loaded, or both after timm's `reparameterize_model`. Compiled networks and ONNX Runtime "
                "use the latter. A native network is built with the remaining blocks alone. The share is the speed-up "
                "divided by the reduction of the blocks' multiply-adds. For the share of the blocks alone, the time of "
                "a network without blocks is subtracted.",
                "",
                *speed_table(store, data),
            ]
        if data == "glyphs":
            lines += ["", *depth_table(store)]
    swept = [name for name in SWEEPS if any(found(store, jobs) for jobs in sweep(SWEEPS[name]).values())]
    if swept:
        lines += ["", "## What the settings do", "", "The digits; three seeds, each with its own fold.", ""]
        lines += ["![Accuracy over the number of remaining blocks](curves.png)"]
    for name in swept:
        lines += ["", *sweep_table(store, name)]
    return "\n".join([*lines, "", *provenance(results)]) + "\n"


def provenance(runs: list[dict[str, Any]]) -> list[str]:
    """Hardware, versions and commits of the runs."""
    hardware = collections.Counter(run["hardware"].replace("1 threads", "1 thread") for run in runs)
    versions = sorted({f"{name} {version}" for run in runs for name, version in run["versions"].items()})
    return [
        "## Hardware, versions and commits",
        "",
        "| hardware | runs |",
        "|---|---:|",
        *(f"| {name} | {count} |" for name, count in sorted(hardware.items())),
        "",
        f"Versions: {', '.join(versions)}.",
        "",
        "Commits, where `-dirty` means with uncommitted changes: "
        f"{', '.join(sorted({run['commit'] for run in runs}))}.",
    ]


def compared(fresh: Store, stored: Store, jobs: list[Job]) -> str:
    """Each figure of new runs beside the stored one. Marks differences larger than the stored runs' spread."""
    figures: dict[str, tuple[Callable[[dict], float], str]] = {
        "accuracy, %": (lambda run: 100 * run["accuracy"], "{:.2f}"),
        "blocks": (lambda run: run["blocks"], "{:.1f}"),
        "parameters, thousands": (lambda run: run["params"] / 1e3, "{:.0f}"),
        "multiply-adds, millions": (lambda run: run["macs"] / 1e6, "{:.2f}"),
    }
    lines = ["| | | stored | now | |", "|---|---|---:|---:|---|"]
    outcomes = collections.Counter()
    for method, group in by_method(jobs).items():
        for name, (value, form) in figures.items():
            before, now = ([value(run) for run in found(store, group)] for store in (stored, fresh))
            if not now:
                continue
            outcome = "nothing stored"
            if before:
                spread = statistics.stdev(before) if len(before) > 1 else 0.0
                differs = abs(statistics.mean(now) - statistics.mean(before)) > spread
                outcome = "**differs**" if differs else "within the spread"
            outcomes[outcome] += 1
            cells = METHODS[method].name, name, mean_and_spread(before, form), mean_and_spread(now, form), outcome
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", ", ".join(f"{outcome}: {count} figures" for outcome, count in outcomes.items())])
