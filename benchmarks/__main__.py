"""Compare ε-ResNet with its alternatives.

    python -m benchmarks --quick              # repeat the small tables, three seeds, compared with the stored figures
    python -m benchmarks                      # all missing results: hours on two cores; resumes
    python -m benchmarks --only table --data glyphs --methods dense budget --at_once 1 --threads 2

benchmarks/results.json holds the figures. RESULTS.md, curves.png and blocks_*.png are made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import curves, fashion, glyphs, latency, plan, results
from benchmarks.comparisons import COMPARISONS, FEW, ROOT
from benchmarks.jobs import KEEPS_MEMORY, Job, Runner, Store
from benchmarks.methods import METHODS
from benchmarks.pretrained import prepare, tables
from benchmarks.pretrained.run import read_records
from timm_eps.training.launching import available_cores

HERE = Path(__file__).parent
PARTS = ("table", "latency", "sweeps")


def measure_latency(store: Store, job: Job, threads: int) -> None:
    """Latencies of the networks from the runs of a seed and fold. Missing networks have no latency."""
    runs = {
        one.method: store.results[one] for one in plan.table(job.data, [(job.seed, job.fold)]) if one in store.results
    }
    if job in store.results or not {"dense", "budget"} <= runs.keys():
        return
    compared = COMPARISONS[job.data]
    recipe = compared.recipe()
    task = latency.task_for(runs, recipe.model.name, compared.classes, compared.sides, threads)
    command = [sys.executable, "-m", latency.__name__, task]
    environment = {**os.environ, **KEEPS_MEMORY}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    store.add(job, json.loads(done.stdout))


def write_page(store: Store) -> None:
    (HERE / "RESULTS.md").write_text(results.page(store), encoding="utf-8")
    if results.found(store, plan.table("digits")):
        curves.draw_curves(store, HERE / "curves.png")
    for data in COMPARISONS:
        if results.pruned_runs(store, data):
            curves.draw_blocks(store, data, HERE / results.BLOCKS.format(data))


def prepare_images(data: str) -> None:
    """Write the images of a comparison, if they are not there."""
    for module in (glyphs, fashion):
        name = module.__name__.rpartition(".")[2]
        if data.startswith(name) and not (ROOT / f"outputs/{name}/data").exists():
            subprocess.run([sys.executable, "-m", module.__name__, "--output", f"outputs/{name}"], cwd=ROOT, check=True)


def run_again(args: argparse.Namespace) -> None:
    """The small table from new runs, next to the stored results."""
    start = time.monotonic()
    directory = ROOT / "outputs" / "benchmarks-quick"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    fresh = Store(directory / "results.json")
    jobs = [job for job in plan.small_table() if job.method in args.methods]
    Runner(fresh, directory, args.at_once, args.threads).run(jobs)
    print("\n".join(["", *results.methods_table(fresh, "digits", FEW), ""]))
    print(results.compared(fresh, Store(HERE / "results.json"), jobs))
    run_pretrained_again(args, directory)
    print(f"\n{(time.monotonic() - start) / 60:.0f} minutes, {args.at_once} processes of {args.threads} threads.")


def run_pretrained_again(args: argparse.Namespace, directory: Path) -> None:
    """The small comparison on pretrained weights, if the weights and the images are available."""
    if not (prepare.DIRECTORY / prepare.IMAGES).exists():
        print("\nWithout the pretrained network: python -m benchmarks.pretrained.prepare says what it needs.")
        return
    records = directory / "pretrained.jsonl"
    command = [sys.executable, "-m", "benchmarks.pretrained", "--quick", "--seeds", "0", "1", "--output", str(records)]
    command += ["--work", str(directory / "pretrained"), "--at_once", str(args.at_once), "--threads", str(args.threads)]
    subprocess.run(command, cwd=ROOT, check=True)
    fresh, stored = read_records(records), json.loads((HERE / "pretrained.json").read_text())
    print(f"\n{tables.compared(tables.by_job(fresh), tables.by_job(stored))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--data", choices=list(COMPARISONS), nargs="+", default=list(COMPARISONS))
    parser.add_argument("--methods", choices=list(METHODS), nargs="+", default=list(METHODS), help="rows of the table")
    parser.add_argument("--at_once", type=int, default=available_cores(), help="processes that train")
    parser.add_argument("--threads", type=int, default=1, help="of each of them")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.quick:
        run_again(args)
        return
    store = Store(HERE / "results.json")
    directory = ROOT / "outputs" / "benchmarks"
    directory.mkdir(parents=True, exist_ok=True)
    runner = Runner(store, directory, args.at_once, args.threads)
    for data in args.data:
        prepare_images(data)
        if "table" in args.only:
            for pair in COMPARISONS[data].pairs:
                runner.run(job for job in plan.table(data, [pair]) if job.method in args.methods)
                write_page(store)
        if "sweeps" in args.only:
            runner.run(plan.swept(data))
            write_page(store)
        if "latency" in args.only:
            for job in plan.latency_jobs(data):
                measure_latency(store, job, args.at_once * args.threads)
            write_page(store)


if __name__ == "__main__":
    main()
