"""Compare ε-ResNet on pretrained weights with other methods for fine-tuning.

    python -m benchmarks.pretrained.prepare                       # once; prints the packages to install
    python -m benchmarks.pretrained --quick                       # fewer pixels, steps and seeds, for two cores
    python -m benchmarks.pretrained --plan lite0:distilled:6000 lite0:labels:6000 --seeds 0 1 2 3 4
    python -m benchmarks.pretrained --tables                      # write the tables of the stored records

On a GPU, run a dozen processes at once (--at_once) and let NVIDIA's MPS share the GPU: nvidia-cuda-mps-control -d.
A part of the plan is CASE:GROUP:IMAGES[:KEEP[:SEEDS]]; ``cases.py`` has the cases, ``plan.py`` the groups. Records go
to outputs/pretrained/records.jsonl. ``--store`` copies them into benchmarks/pretrained.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.pretrained import plan, run, tables
from benchmarks.pretrained.prepare import DIRECTORY

HERE = Path(__file__).parent.parent
STORED, LATENCIES, PAGE = HERE / "pretrained.json", HERE / "pretrained_latency.json", HERE / "PRETRAINED.md"
QUICK = ["quick:criteria:600"]  # the rows that are stored


def parsed(part: str, seeds: list[int]) -> list[run.Job]:
    """The jobs of a part of the plan."""
    case, group, images, *rest = part.split(":")
    keep = int(rest[0]) if rest and rest[0] else None
    return plan.jobs(case, group, int(images), range(int(rest[1])) if len(rest) > 1 else seeds, keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", nargs="+", default=[], metavar="CASE:GROUP:IMAGES[:KEEP[:SEEDS]]")
    parser.add_argument("--quick", action="store_true", help="the small comparison, three seeds, on two cores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at_once", type=int, default=2, help="processes that train at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each of them")
    parser.add_argument("--budget_seconds", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--data", type=Path, default=DIRECTORY, help="where prepare.py wrote images and weights")
    parser.add_argument(
        "--work", type=Path, default=DIRECTORY / "work", help="where jobs leave networks for each other"
    )
    parser.add_argument("--output", type=Path, default=DIRECTORY / "records.jsonl")
    parser.add_argument("--held_out", action="store_true", help="test on training images instead, to choose settings")
    parser.add_argument("--commit", help="recorded as the code's commit, where git is not at hand")
    parser.add_argument("--store", type=Path, nargs="+", help="add files of records to benchmarks/pretrained.json")
    parser.add_argument("--tables", action="store_true", help="write benchmarks/PRETRAINED.md")
    args = parser.parse_args()
    if args.store:
        tables.store([record for path in args.store for record in run.read_records(path)], STORED)
    if args.tables:
        latencies = json.loads(LATENCIES.read_text()) if LATENCIES.exists() else []
        PAGE.write_text(tables.page(json.loads(STORED.read_text()), latencies), encoding="utf-8")
    parts = QUICK if args.quick else args.plan
    jobs = plan.with_needs([job for part in parts for job in parsed(part, args.seeds)])
    if not jobs:
        return
    from benchmarks.jobs import conditions

    found = conditions()
    found["command"] = " ".join(  # without the paths of this machine
        [
            "python -m benchmarks.pretrained --plan",
            *parts,
            "--seeds",
            *map(str, args.seeds),
            f"--at_once {args.at_once}",
        ]
    )
    found["commit"] = args.commit or found["commit"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(jobs)} jobs, {args.at_once} at once, on {'cuda' if torch.cuda.is_available() else 'cpu'}", flush=True)
    left = run.run(
        jobs, args.data, args.work, args.output, at_once=args.at_once, threads=args.threads,
        budget_seconds=args.budget_seconds, held_out=args.held_out, conditions=found,
    )  # fmt: skip
    print(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done.")


if __name__ == "__main__":
    main()
