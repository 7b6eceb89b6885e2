"""The cost of depth: a training step, its memory, and a removal, for the paper's CIFAR networks.

    python -m benchmarks.depth                         # eps_resnet110, 200, 500, 752; batch 128, 32x32, on the CPU
    python -m benchmarks.depth --batch_size 32 --rounds 1

Each network trains in a separate process, so that the peak memory belongs to one network. The processes alternate over
the rounds. Seconds are medians. Removal takes half of the blocks at once, with the proof.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import timm
import torch
from torch.nn import functional as F

import timm_eps
from timm_eps import report
from timm_eps.surgery.branches import gates

DEPTHS = (110, 200, 500, 752)


def measure(depth: int, batch_size: int, device: str) -> dict[str, Any]:
    """Seconds of building, of a step, and of removing half of the blocks, and the peak of memory in GiB."""
    torch.manual_seed(0)

    def seconds(do: Any) -> float:
        start = time.perf_counter()
        do()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    start = time.perf_counter()
    model = timm.create_model(f"eps_resnet{depth}").to(device).train()
    build = time.perf_counter() - start
    optimizer = torch.optim.SGD(timm_eps.param_groups(model, 2e-4), lr=0.01, momentum=0.9)
    pruner = timm_eps.EpsilonPruner(model, optimizer, epsilon=0.0, patience=1)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # warms up
    whole = seconds(step)
    for gate in list(gates(model).values())[::2]:
        gate.epsilon = torch.inf
    removal = seconds(pruner.step)
    pruned = seconds(step)
    return {
        "build": build, "step": whole, "removal": removal, "step after": pruned,
        "GiB": report.peak_memory(device) / 2**30,
        "removed": len(pruner.history[-1]["removed"]), "blocks": pruner.total,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.batch_size, args.device)))
        return
    found: dict[int, list[dict[str, Any]]] = {depth: [] for depth in DEPTHS}
    for _ in range(args.rounds):
        for depth in DEPTHS:
            command = [sys.executable, __file__, "--only", str(depth), "--batch_size", str(args.batch_size)]
            done = subprocess.run([*command, "--device", args.device], capture_output=True, text=True, check=True)
            found[depth].append(json.loads(done.stdout))
    where = f"{report.hardware(args.device)}, torch {torch.__version__}"
    print(f"Batch {args.batch_size}, 32x32, {where}; medians of {args.rounds} rounds.\n")
    print("| depth | build | step | a block of it | removal of half | step after it | peak memory |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for depth, rounds in found.items():
        one = {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}
        print(
            f"| {depth} | {one['build']:.1f} s | {one['step']:.2f} s | {1e3 * one['step'] / one['blocks']:.1f} ms "
            f"| {one['removal']:.2f} s ({one['removal'] / one['step']:.2f} steps) | {one['step after']:.2f} s "
            f"| {one['GiB']:.1f} GiB |"
        )


if __name__ == "__main__":
    main()
