"""Runs of methods: each in a separate process, several in parallel, each only once.

A JSON file stores the results of each run with the run's settings, so a stopped benchmark resumes. The networks stay in
``outputs/``. If another run needs the missing networks of a finished run, that run is repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparisons import COMPARISONS, ROOT
from benchmarks.methods import METHODS
from timm_eps.training.publishing import versions

# By default glibc returns the memory of large activations to the system after each layer and requests it again. This
# takes up to a quarter of the time of a large batch and varies between processes, so it is turned off here.
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


@dataclass(frozen=True)
class Job:
    """One run: a method with further arguments of train_hf.py, a seed and a fold.

    ``data`` is the name of its comparison.
    """

    data: str
    method: str
    seed: int
    fold: int = 0
    flags: tuple[str, ...] = ()

    @property
    def needs(self) -> list[Job]:
        """The runs whose networks this run starts from."""
        return [Job(self.data, method, self.seed, self.fold) for method in METHODS[self.method].needs]

    @property
    def alone(self) -> bool:
        """Whether no other job may run in parallel."""
        return METHODS[self.method].alone

    @property
    def name(self) -> str:
        flags = "_".join(flag.lstrip("-").replace("/", "-") for flag in self.flags)
        return "-".join(filter(None, [self.data, self.method, flags, f"seed{self.seed}", f"fold{self.fold}"]))


class Store:
    """Results by job, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[Job, dict[str, Any]] = {}
        for record in json.loads(path.read_text()) if path.exists() else []:
            job = record["job"]
            self.results[Job(**{**job, "flags": tuple(job["flags"])})] = record["result"]

    def add(self, job: Job, result: dict[str, Any]) -> None:
        self.results[job] = result
        ordered = sorted(self.results.items(), key=lambda item: item[0].name)
        records = (json.dumps({"job": asdict(job), "result": found}, sort_keys=True) for job, found in ordered)
        self.path.write_text("[\n" + ",\n".join(records) + "\n]\n")


class Runner:
    """Runs jobs and, before them, the jobs that they need.

    Args:
        store: Store of the results. A job with a result is not run again.
        directory: Directory for the files of the runs.
        at_once: Number of processes.
        threads: CPU threads per process. A job that measures speed runs alone, with the threads of all processes.
    """

    def __init__(self, store: Store, directory: Path, at_once: int, threads: int) -> None:
        self.store, self.directory, self.at_once, self.threads = store, directory, at_once, threads
        self.pool = ThreadPoolExecutor(at_once)
        self.started: dict[Job, Future[None]] = {}

    def run(self, jobs: Iterable[Job]) -> None:
        """Run the jobs without a result. Raises RuntimeError with the log of the first failure."""
        self.make_networks(job for job in jobs if job not in self.store.results)

    def make_networks(self, jobs: Iterable[Job]) -> None:
        """Run the jobs whose networks are missing."""
        jobs = list(jobs)
        # In this order, dependencies come first, so a job only waits for jobs that are running or done, and never
        # blocks the last process.
        ordered, level = jobs, jobs
        while level := [need for job in level for need in job.needs]:
            ordered = [*level, *ordered]
        ordered = list(dict.fromkeys(ordered))
        together = [job for job in ordered if not job.alone]
        for job in together:
            self.start(job)
        for job in together:
            self.finish(job)
        for job in ordered:
            if job.alone:
                self.start(job)
                self.finish(job)

    def start(self, job: Job) -> None:
        if job not in self.started:
            self.started[job] = self.pool.submit(self.carry_out, job)

    def finish(self, job: Job) -> None:
        self.started[job].result()
        if job not in self.store.results:
            self.store.add(job, json.loads((self.place(job) / "result.json").read_text()))

    def place(self, job: Job) -> Path:
        return self.directory / job.name

    def carry_out(self, job: Job) -> None:
        place = self.place(job)
        if (place / "result.json").exists():
            return
        for need in job.needs:
            self.started[need].result()
        place.mkdir(parents=True, exist_ok=True)
        compared = COMPARISONS[job.data]
        task = {
            "method": job.method,
            "flags": [*compared.flags, *job.flags, *self.varying(job)],
            "directory": str(place),
            "earlier": {need.method: str(self.place(need)) for need in job.needs},
        }
        settings = {"OMP_NUM_THREADS": self.threads_of(job), "ACCELERATE_MIXED_PRECISION": compared.mixed_precision}
        settings |= KEEPS_MEMORY if job.alone else {}
        with (place / "log.txt").open("w") as log:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.worker", json.dumps(task)],
                cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log, check=False,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{job.name} failed:\n{(place / 'log.txt').read_text()[-2000:]}")
        result = json.loads((place / "result.json").read_text())
        print(f"{job.name}: {100 * result['accuracy']:.2f} %, {result['train_seconds']:.0f} s", flush=True)

    def threads_of(self, job: Job) -> str:
        return str(self.threads * (self.at_once if job.alone else 1))

    def varying(self, job: Job) -> list[str]:
        flags = ["--seed", str(job.seed), "--num_threads", self.threads_of(job)]
        flags += ["--cuda_graphs"] if torch.cuda.is_available() else []
        return [*flags, "--fold", str(job.fold)] if job.data == "digits" else flags


def conditions() -> dict[str, Any]:
    """Facts besides the job that affect a result."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    # Files written by the benchmarks do not count as changes of the commit.
    written = [f":!benchmarks/{name}" for name in ("results.json", "RESULTS.md", "*.png")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return {"commit": f"{commit}-dirty" if changed else commit, "versions": versions()}
