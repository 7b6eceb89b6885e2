"""The cost of gates: time and peak memory of a training step with gates and without.

    python -m benchmarks.gate_cost                        # eps_resnet110, batch 128, 32x32, on the CPU
    python -m benchmarks.gate_cost --importance           # gates that measure the importance of their branch
    python -m benchmarks.gate_cost --device cuda

Steps of both networks alternate, and the ratio is taken pair by pair, so that changes in the machine's speed affect
both alike. Memory is the peak of a separate process per network (on CUDA, of the allocator).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import timm
import torch
from torch import nn
from torch.nn import functional as F

from timm_eps import report
from timm_eps.surgery.branches import gates


def build(args: argparse.Namespace, gated: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = timm.create_model(args.architecture).to(args.device).train()
    for slot, gate in gates(model).items():
        if gated:
            gate.epsilon = 1e-6  # the gate works, but does not close
            gate.measure_importance(args.importance)
        else:
            block, _, name = slot.rpartition(".")
            setattr(model.get_submodule(block), name, gate.drop_path)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()


def peak_memory(args: argparse.Namespace, gated: bool) -> int:
    """Peak bytes of a process that only runs three steps."""
    command = [sys.executable, __file__, "--only", "gated" if gated else "plain", "--architecture", args.architecture]
    command += ["--batch_size", str(args.batch_size), "--image_size", str(args.image_size), "--device", args.device]
    command += ["--importance"] * args.importance
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def spread(ratios: list[float]) -> str:
    return f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="eps_resnet110")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--only", choices=["gated", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)

    if args.only:
        network = build(args, args.only == "gated")
        for _ in range(3):
            step(*network, images, labels)
        print(report.peak_memory(args.device))
        return

    networks = {name: build(args, name == "gated") for name in ("gated", "plain")}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(args.pairs + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            step(*network, images, labels)
            if turn:  # the first pair warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [g / p for g, p in zip(seconds["gated"], seconds["plain"], strict=True)]
    memory = [(peak_memory(args, True), peak_memory(args, False)) for _ in range(3)]
    memory_ratios = [g / p for g, p in memory]
    size = f"batch {args.batch_size}, {args.image_size}x{args.image_size}"
    size += ", importance measured" if args.importance else ""
    print(f"{args.architecture}, {size}, {report.hardware(images.device)}, torch {torch.__version__}")
    medians = ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in seconds.items())
    print(f"a step, median: {medians}")
    print(f"time, gated / plain: {spread(ratios)}")
    print(f"peak memory, gated / plain: {spread(memory_ratios)}; plain {memory[0][1] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
