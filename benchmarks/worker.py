"""One run of one method, in this process alone, so that its peak of memory is its own: ``jobs.py`` starts it."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

import train_hf
from benchmarks.jobs import conditions
from benchmarks.methods import METHODS, Bench, measured


def peak_bytes() -> int:
    """The most memory that this process had so far, on the accelerator where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    task = json.loads(sys.argv[1])
    directory = Path(task["directory"])
    bench = Bench(task["flags"], directory, {method: Path(place) for method, place in task["earlier"].items()})
    before = peak_bytes()
    model = METHODS[task["method"]].make(bench)
    result = {"train_bytes": peak_bytes() - before, **measured(bench, model), **conditions()}
    result["hardware"] = train_hf.hardware(bench.accelerator)
    whole = directory / "result.json.part"
    whole.write_text(json.dumps(result, indent=1))
    whole.rename(directory / "result.json")


if __name__ == "__main__":
    main()
