"""Run jobs in several processes on one device, within a time limit. Each finished job writes one line of JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretrained.cases import CASES
from benchmarks.pretrained.methods import TIMING_CORES, Job, carry_out, enough_cores
from timm_eps import report

_ATTEMPTS = 2


def prepare_process(threads: int) -> None:
    """Settings of a training process. It avoids the cores reserved for latency, if there are enough cores."""
    torch.set_num_threads(threads)
    if enough_cores():
        os.sched_setaffinity(0, os.sched_getaffinity(0) - TIMING_CORES)


def work_on(job: Job, data: Path, work: Path, held_out: bool) -> dict[str, Any]:
    """The record of a job, or the error of a failed job."""
    begin = time.time()
    try:
        record = carry_out(job, data, work, held_out)
    except Exception as error:  # the other jobs go on
        record = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-3000:]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = report.hardware(device)
    return {**asdict(job), **record, "wall_seconds": round(time.time() - begin, 1), "hardware": hardware}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an empty list if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def job_of(record: dict[str, Any]) -> Job:
    return Job(**{name: record[name] for name in Job.__dataclass_fields__})


def run(
    jobs: Sequence[Job], data: Path, work: Path, output: Path, *, at_once: int, threads: int, budget_seconds: float,
    held_out: bool = False, conditions: dict[str, Any] | None = None,
) -> list[Job]:  # fmt: skip
    """Run the jobs without a record, in order, within the time limit.

    Args:
        jobs: Jobs, each after its needs.
        data: Directory of the prepared images and weights.
        work: Directory for files that jobs share.
        output: File of JSON lines. A finished job adds a line at once.
        at_once: Number of processes.
        threads: CPU threads per process.
        budget_seconds: Time limit. A job starts only if the longest job of its kind so far would end in time.
        held_out: Whether to test on unused training images.
        conditions: Further fields of every record.

    Returns:
        The unfinished jobs.
    """
    begin = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    done = {job_of(record) for record in read_records(output) if "error" not in record}
    # A dense network whose file is missing is trained again when another job needs it.
    pending = [job for job in jobs if job not in done or not _left(job, work)]
    available, failed = {job for job in jobs if job not in pending}, set()
    attempts: dict[Job, int] = {}
    longest: dict[str, float] = {}
    running: dict[Future[dict[str, Any]], Job] = {}
    pool = _pool(at_once, threads)
    while pending or running:
        elapsed = time.monotonic() - begin
        for job in list(pending):
            if len(running) >= at_once:
                break
            if not all(need in available for need in job.needs()):
                continue
            if not enough_cores() and running and any(one.method == "speed" for one in (job, *running.values())):
                break  # latency is measured with nothing beside it
            if elapsed + longest.get(_kind(job), 0.0) > budget_seconds:
                continue
            pending.remove(job)
            running[pool.submit(work_on, job, data, work, held_out)] = job
        if not running:
            break
        timeout = min(max(0.1, budget_seconds - elapsed), 86_400)  # a lock cannot wait forever
        finished, _ = wait(running, timeout=timeout, return_when=FIRST_COMPLETED)
        if not finished:
            break
        for future in finished:
            job = running.pop(future)
            try:
                record = future.result()
            except BrokenProcessPool as error:
                again = [job, *running.values()]
                running.clear()
                for one in again:
                    attempts[one] = attempts.get(one, 0) + 1
                pending = [one for one in again if attempts[one] < _ATTEMPTS] + pending
                print(f"A process ended ({error}); {len(again)} jobs begin anew.", flush=True)
                pool = _pool(at_once, threads)
                break
            with output.open("a") as lines:
                lines.write(json.dumps({**record, **(conditions or {})}) + "\n")
            (failed if "error" in record else available).add(job)
            longest[_kind(job)] = max(longest.get(_kind(job), 0.0), record["wall_seconds"])
            print(_line(record, time.monotonic() - begin), flush=True)
    for process in multiprocessing.active_children() if running else []:
        process.terminate()
    pool.shutdown(wait=not running, cancel_futures=True)
    return [*pending, *running.values(), *failed]


def _pool(at_once: int, threads: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(at_once, context, initializer=prepare_process, initargs=(threads,))


def _left(job: Job, work: Path) -> bool:
    """Whether the files that a finished job left for others still exist."""
    if job.method == "pretraining":
        return (work / f"{CASES[job.case].weights}.safetensors").exists()
    if job.method == "dense" and not job.distilled:
        return (work / f"{job.place}-analysis.json").exists()
    return job.method != "speed" or (work / f"{job.place}-speed{job.keep}.json").exists()


def _kind(job: Job) -> str:
    return f"{job.case}-{job.images}-{job.method}"


def _line(record: dict[str, Any], elapsed: float) -> str:
    name = "-".join(str(record[key]) for key in ("case", "images", "keep", "method", "seed"))
    what = record.get("error") or (f"{100 * record['accuracy']:.2f} %" if "accuracy" in record else record.get("ratio"))
    distilled = " distilled" if record["distilled"] else ""
    return f"{elapsed:6.0f} s  {name}{distilled}: {what}  {record['wall_seconds']:.0f} s"
