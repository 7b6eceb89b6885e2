"""One run of one method. ``jobs.py`` starts it in a separate process, so that the peak memory belongs to this run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.jobs import conditions
from benchmarks.methods import METHODS, Bench, measured
from timm_eps import report
from timm_eps.training.publishing import hardware


def main() -> None:
    task = json.loads(sys.argv[1])
    directory = Path(task["directory"])
    bench = Bench(task["flags"], directory, {method: Path(place) for method, place in task["earlier"].items()})
    device = bench.accelerator.device
    report.reset_peak_memory(device)  # reading the images may have taken more memory than training
    before = report.peak_memory(device)
    model = METHODS[task["method"]].make(bench)
    result = {"train_bytes": report.peak_memory(device) - before, **measured(bench, model), **conditions()}
    result["hardware"] = hardware(bench.accelerator)
    whole = directory / "result.json.part"
    whole.write_text(json.dumps(result, indent=1))
    whole.rename(directory / "result.json")


if __name__ == "__main__":
    main()
