"""The default run and the same recipe with the gates off, over the five stratified folds of the digits.

    python benchmarks/digits_folds.py                     # writes benchmarks/digits_folds.json and .md
    python benchmarks/digits_folds.py --folds 0 1 -- --keep 0.2

Every image is tested once. Within a fold the pruned and the dense run follow each other in one process. Arguments
after ``--`` go to train_hf.py. A fold whose result is stored under the same arguments and versions is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_hf  # noqa: E402


def spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {form.format(deviation)}"


def table(runs: list[dict]) -> str:
    """Markdown of all folds, with mean and standard deviation in the last row."""
    lines = [
        "| fold | accuracy, gates off | accuracy, pruned | blocks left | parameters gone | training time | "
        "largest swing, last 10 epochs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    columns: list[list[float]] = []
    for run in runs:
        last = run["eval_accuracy_by_epoch"][-10:]
        values = [
            100 * run["dense_eval_accuracy"],
            100 * run["eval_accuracy"],
            run["blocks_kept"],
            100 * (1 - run["params"] / run["dense_params"]),
            run["train_seconds"] / run["dense_train_seconds"],
            100 * (max(last) - min(last)),
        ]
        columns.append(values)
        accuracy, pruned, blocks, gone, seconds, swing = values
        lines.append(
            f"| {run['arguments']['fold']} | {accuracy:.2f} % | {pruned:.2f} % | {blocks} of {run['blocks_total']} "
            f"| {gone:.1f} % | {seconds:.2f}× | {swing:.2f} points |"
        )
    forms = ["{:.2f}", "{:.2f}", "{:.1f}", "{:.1f}", "{:.2f}", "{:.2f}"]
    units = [" %", " %", "", " %", "×", " points"]
    means = [
        spread(list(column), form) + unit
        for column, form, unit in zip(zip(*columns, strict=True), forms, units, strict=True)
    ]
    return "\n".join([*lines, f"| mean ± sd | {' | '.join(means)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(Path(__file__).with_suffix("")), help="path without an ending")
    parser.add_argument("arguments", nargs="*", help="further arguments of train_hf.py, after --")
    args = parser.parse_args()
    store = Path(f"{args.output}.json")
    stored = json.loads(store.read_text()) if store.exists() else []
    runs = []
    for fold in args.folds:
        given = ["--fold", str(fold), "--seed", str(args.seed), "--compare_dense", *args.arguments]
        wanted = train_hf.used_arguments(train_hf.parse_arguments(given))
        same = [run for run in stored if run["arguments"] == wanted and run["versions"] == train_hf.versions()]
        if not same:
            same = [train_hf.main([*given, "--output_dir", str(ROOT / "outputs" / f"digits-fold{fold}")])]
        runs += same[:1]
        store.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
    first = runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    header = (
        f"`{first['architecture']}` on {first['dataset']}, seed {args.seed}, {first['hardware']}; {versions}.\n"
        f"Training time is that of the pruned run over that of the dense run, within one process.\n"
    )
    text = f"{header}\n{table(runs)}\n"
    Path(f"{args.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
