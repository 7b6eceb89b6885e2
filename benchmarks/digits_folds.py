"""The default run and the same recipe with the gates off, over two seeds and the five stratified folds of the digits.

    python -m benchmarks.digits_folds                     # writes benchmarks/digits_folds.json and .md
    python -m benchmarks.digits_folds --seeds 0 --folds 0 1 -- --keep 0.2

With each seed every image is tested once. The pruned and the dense run of a fold run one after the other in one
process. Arguments after ``--`` go to train_hf.py. A stored run with the same arguments and versions is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.results import mean_and_spread
from timm_eps.training.arguments import parse_arguments, used_arguments
from timm_eps.training.publishing import versions

ROOT = Path(__file__).parent.parent
TIME = "training time"
COLUMNS = {
    # heading: (value of one run, form, unit)
    "accuracy, gates off": (lambda run: 100 * run["dense_eval_accuracy"], "{:.2f}", " %"),
    "accuracy, pruned": (lambda run: 100 * run["eval_accuracy"], "{:.2f}", " %"),
    "blocks left": (lambda run: run["blocks_kept"], "{:.1f}", ""),
    "parameters gone": (lambda run: 100 * (1 - run["params"] / run["dense_params"]), "{:.1f}", " %"),
    TIME: (lambda run: run["train_seconds"] / run["dense_train_seconds"], "{:.2f}", "×"),
    "swing, last 10 epochs": (lambda run: 100 * swing(run["eval_accuracy_by_epoch"][-10:]), "{:.2f}", " points"),
}


def swing(values: list[float]) -> float:
    return max(values) - min(values)


def row(name: str, runs: list[dict]) -> str:
    """Mean and standard deviation of each column over some runs. Times are medians, against outliers."""
    cells = []
    for heading, (value, form, unit) in COLUMNS.items():
        values = [value(run) for run in runs]
        shown = form.format(statistics.median(values)) if heading == TIME else mean_and_spread(values, form)
        cells.append(f"{shown}{unit}")
    return f"| {name} | {' | '.join(cells)} |"


def tables(runs: list[dict]) -> str:
    """Markdown tables by seed, over all runs, and run by run."""
    seeds = sorted({run["seed"] for run in runs})
    head = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    summary = [row(f"seed {seed}", [run for run in runs if run["seed"] == seed]) for seed in seeds]
    if len(seeds) > 1:
        summary.append(row(f"all {len(runs)} runs", runs))
    single = [row(f"seed {run['seed']}, fold {run['arguments']['fold']}", [run]) for run in runs]
    return "\n".join([*head, *summary, "", "Run by run:", "", *head, *single])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", default=str(Path(__file__).with_suffix("")), help="path without an ending")
    parser.add_argument("arguments", nargs="*", help="further arguments of train_hf.py, after --")
    args = parser.parse_args()
    store = Path(f"{args.output}.json")
    stored = json.loads(store.read_text()) if store.exists() else []
    runs = []
    for seed, fold in itertools.product(args.seeds, args.folds):
        given = ["--fold", str(fold), "--seed", str(seed), "--compare_dense", *args.arguments]
        wanted = used_arguments(parse_arguments(given))
        same = [run for run in stored if run["arguments"] == wanted and run["versions"] == versions()]
        if not same:
            output = ROOT / "outputs" / f"digits-seed{seed}-fold{fold}"
            command = [sys.executable, str(ROOT / "train_hf.py"), *given, "--output_dir", str(output)]
            subprocess.run(command, check=True)
            same = [json.loads((output / "all_results.json").read_text())]
        runs += same[:1]
        others = [run for run in stored if run not in runs]
        store.write_text(json.dumps(runs + others, indent=1, sort_keys=True) + "\n")
    first = runs[0]
    used = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    text = (
        f"`{first['architecture']}` on {first['dataset']}, {len(args.folds)} stratified folds, {first['hardware']}; "
        f"{used}. Mean ± standard deviation; training time is the median of that of the pruned run over that of "
        f"the dense one after it.\n\n{tables(runs)}\n"
    )
    Path(f"{args.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
