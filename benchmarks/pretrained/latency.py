"""Latency of the compared networks on this machine, rebuilt from their records.

    python -m benchmarks.pretrained.latency --case lite0 --images 6000 --keep 3 --seeds 0 1 2

Speed depends on the structure, not on the weights. All networks of a seed are measured in turn, so nothing else should
run on the machine. Median seconds go to benchmarks/pretrained_latency.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency import WAYS, Way
from benchmarks.pretrained.cases import CASES
from benchmarks.pretrained.plan import KEEPS_ALL
from benchmarks.pretrained.structures import rebuilt, sample
from benchmarks.pretrained.tables import by_job
from timm_eps import report

HERE = Path(__file__).parent.parent
STORED = HERE / "pretrained_latency.json"
MEASURED = {
    "eager": WAYS["cpu"][""],
    "compiled": WAYS["cpu"][", channels_last, compiled"],
    "ONNX Runtime": WAYS["cpu"][", in ONNX Runtime"],
}


def networks(records: list[dict[str, Any]], case: str, images: int, keep: int, seed: int) -> dict[str, torch.nn.Module]:
    """Networks by method: of each method the distilled one. Undistilled networks have the same structure."""
    found = {}
    for job, record in by_job(records).items():
        kept = 0 if job.method in KEEPS_ALL else keep
        is_first = job.distilled or job.method not in found
        if (job.case, job.images, job.keep, job.seed) == (case, images, kept, seed) and "params" in record and is_first:
            found[job.method] = record
    return {method: rebuilt(record) for method, record in found.items()}


def by_way(way: Way, nets: dict[str, torch.nn.Module], batch: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a forward pass of each network, run in one way."""
    batch = batch.contiguous(memory_format=way.memory_format)
    laid_out = {name: net.to(memory_format=way.memory_format) for name, net in nets.items()}
    if way.runtime is not None:
        torch.compiler.reset()  # torch stops compiling after a number of structures
        laid_out = {name: way.runtime(net, batch) for name, net in laid_out.items()}
    return report.paired_latency(laid_out, batch, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="lite0")
    parser.add_argument("--images", type=int, default=6_000, help="whose structures: number of training images")
    parser.add_argument("--keep", type=int, help="number of branches that stay; by default the case's first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--ways", choices=list(MEASURED), nargs="+", default=list(MEASURED))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case, records = CASES[args.case], json.loads((HERE / "pretrained.json").read_text())
    keep = args.keep or case.keeps[0]
    measured = json.loads(STORED.read_text()) if STORED.exists() else []
    for seed in args.seeds:
        nets = networks(records, args.case, args.images, keep, seed)
        for way in args.ways:
            for size in args.batch_sizes:
                batch = torch.randn(sample(case, size).shape)
                seconds = by_way(MEASURED[way], nets, batch, args.repeats)
                about = {
                    "case": args.case,
                    "images": args.images,
                    "keep": keep,
                    "seed": seed,
                    "way": way,
                    "batch": size,
                }
                measured = [one for one in measured if any(one[name] != value for name, value in about.items())]
                measured.append({**about, "seconds": seconds, "hardware": report.hardware("cpu")})
                ratios = {name: round(value / seconds["dense"], 3) for name, value in seconds.items()}
                print(about, ratios, flush=True)
                STORED.write_text("[\n" + ",\n".join(json.dumps(one, sort_keys=True) for one in measured) + "\n]\n")


if __name__ == "__main__":
    main()
