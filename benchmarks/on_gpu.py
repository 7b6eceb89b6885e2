"""Everything that needs a GPU, in about twenty minutes. A run that was stopped continues with what is missing.

    python -m benchmarks.pretrained.prepare                       # once: images and weights
    python -m benchmarks.on_gpu                                   # on a machine with one NVIDIA GPU
    python -m benchmarks.on_gpu --only training_speed gate_cost
    python -m benchmarks.on_gpu --dry_run                         # a few steps of each part, on any machine

Each part writes a log below outputs/on_gpu, and done.json says which parts are finished. A part that exceeds its time
is stopped. ``fashion`` and ``pretrained`` keep their finished trainings, and continue in the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparisons import COMPARISONS, ROOT
from benchmarks.jobs import Store
from benchmarks.latency import task_for
from benchmarks.plan import table
from benchmarks.pretrained.prepare import DIRECTORY, IMAGES

DRY_SECONDS = 900.0
TIMED = "digits"  # the comparison whose structures are timed


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        name: Name of its log.
        seconds: Time after which it is stopped.
        command: Words after ``python``.
        dry: The same for a dry run: a small network, a few steps.
        needs_images: Whether it needs the files of ``benchmarks.pretrained.prepare``.
    """

    name: str
    seconds: float
    command: list[str]
    dry: list[str]
    needs_images: bool = False


def timed_runs() -> dict[str, dict[str, Any]]:
    """The stored results of the first seed of a comparison, by method."""
    store = Store(ROOT / "benchmarks/results.json")
    runs = {job.method: store.results.get(job, {}) for job in table(TIMED, COMPARISONS[TIMED].pairs[:1])}
    return {method: runs[method] for method in ("dense", "budget", "torch_pruning_to_size")}


def parts() -> list[Part]:
    """All measurements, the most important ones first."""
    small = ["--architecture", "eps_resnet20"]
    removed = ["stages.0.blocks.1.drop_path"]
    sizes = {"dense": {"params": 269_722, "removed": []}, "budget": {"params": 265_050, "removed": removed}}
    plan = ["lite0:distilled:6000", "lite1:siblings:6000", "lite2:main:6000", "lite0:matter:6000:5"]
    trained = {"num_train_epochs": 2, "steps_per_epoch": 2, "num_warmup_steps": 0, "max_eval_samples": 64}
    trained |= {"epsilon_warmup_epochs": 0, "ramp_epochs": 1}
    flags = [word for name, value in trained.items() for word in (f"--{name}", str(value))]
    return [
        Part(
            "training_speed", 180,
            ["-m", "benchmarks.training_speed", "--rounds", "5", "--", "--mixed_precision", "bf16", "--channels_last"],
            ["-m", "benchmarks.training_speed", "--rounds", "1", "--steps", "2", "--", *small],
        ),
        Part(
            "gate_cost", 60,
            ["-m", "benchmarks.gate_cost", "--device", "cuda", "--pairs", "30"],
            ["-m", "benchmarks.gate_cost", "--pairs", "1", "--batch_size", "4", *small],
        ),
        Part(
            "latency", 180,
            ["-m", "benchmarks.latency", task_for(timed_runs(), "eps_resnet110", 10, (8, 32), threads=2)],
            ["-m", "benchmarks.latency", task_for(sizes, "eps_resnet20", 10, (8,), threads=2, repeats=1)],
        ),
        Part(
            "tests", 120,
            ["-m", "pytest", "-q", "-n", "0", "-m", "cuda"],
            ["-m", "pytest", "-q", "-n", "0", "-m", "cuda", "--collect-only", "tests/test_cuda.py"],
        ),
        Part(
            "fashion", 360,
            ["-m", "benchmarks", "--only", "table", "--data", "fashion110", "--at_once", "12"],
            ["train_hf.py", "--config", "benchmarks/fashion110.json", *small, *flags,
             "--output_dir", "outputs/on_gpu/fashion"],
            needs_images=True,
        ),
        Part(
            "pretrained", 300,
            ["-m", "benchmarks.pretrained", "--plan", *plan, "--seeds", "0", "1", "2", "3", "4", "--at_once", "14",
             "--budget_seconds", "280"],
            ["-m", "benchmarks.pretrained", "--plan", "smoke:main:48", "--seeds", "0", "--at_once", "1", "--work",
             "outputs/on_gpu/pretrained", "--output", "outputs/on_gpu/pretrained.jsonl"],
            needs_images=True,
        ),
    ]  # fmt: skip


def carry_out(command: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run a part, in a process group of its own, so that a stop ends its processes, too. Returns what happened."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        if code is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return {"exit_code": code, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    known = {part.name: part for part in parts()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("there is no NVIDIA GPU; --dry_run runs a few steps of each part without one")
    directory = ROOT / "outputs/on_gpu" / ("dry" if args.dry_run else "")
    directory.mkdir(parents=True, exist_ok=True)
    state = directory / "done.json"
    done = {} if args.dry_run or not state.exists() else json.loads(state.read_text())
    if not (DIRECTORY / IMAGES).exists() and any(known[name].needs_images for name in args.only):
        parser.error(f"{DIRECTORY / IMAGES} does not exist; run python -m benchmarks.pretrained.prepare first")
    for name in args.only:
        part = known[name]
        command, seconds = (part.dry, DRY_SECONDS) if args.dry_run else (part.command, part.seconds)
        if done.get(name, {}).get("exit_code") == 0:
            print(f"{name}: done before")
            continue
        log = directory / f"{name}.log"
        done[name] = carry_out(command, seconds, log)
        state.write_text(json.dumps(done, indent=1) + "\n")
        code = done[name]["exit_code"]
        outcome = {0: "done", None: "out of time; the next run continues"}.get(code, f"failed with {code}")
        print(f"{name}: {outcome}, {done[name]['seconds']:.0f} s, {log.relative_to(ROOT)}", flush=True)
    return int(any(done[name]["exit_code"] != 0 for name in args.only))


if __name__ == "__main__":
    sys.exit(main())
