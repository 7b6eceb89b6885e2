"""The cost of gates: time and peak memory of a training step with gates and without.

    python -m benchmarks.gate_cost                        # eps_resnet110, batch 128, 32x32, on the CPU
    python -m benchmarks.gate_cost --states idle work --pairs 20
    python -m benchmarks.gate_cost --device cuda --compile

Gates are idle while no branch must close: in warm-up, and after the budget is reached. In between they work: they
compare each response with a threshold. With the importance criterion they also measure importances.

Steps of all networks alternate. The ratio is taken within each round, so a machine whose speed drifts favours none of
them. Memory is the peak of a separate process for each network (on CUDA, of the allocator).
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

from benchmarks.pretrained.structures import without_gates
from timm_eps import report
from timm_eps.surgery.branches import gates

STATES = ("plain", "idle", "work", "importance")


def build(args: argparse.Namespace, state: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = timm.create_model(args.architecture).to(args.device).train()
    if state == "plain":
        without_gates(model)
    elif state != "idle":
        for gate in gates(model).values():
            gate.epsilon = 1e-6  # the gate works, but does not close
            gate.measure_importance(state == "importance")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return torch.compile(model) if args.compile else model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()


def peak_memory(args: argparse.Namespace, state: str) -> int:
    """Peak bytes of a process that only runs three steps."""
    command = [sys.executable, "-m", "benchmarks.gate_cost", "--only", state, "--architecture", args.architecture]
    command += ["--batch_size", str(args.batch_size), "--image_size", str(args.image_size), "--device", args.device]
    command += ["--compile"] * args.compile
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
    parser.add_argument("--states", choices=STATES[1:], nargs="+", default=STATES[1:])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=STATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)

    if args.only:
        network = build(args, args.only)
        for _ in range(3):
            step(*network, images, labels)
        print(report.peak_memory(args.device))
        return

    networks = {state: build(args, state) for state in ("plain", *args.states)}
    seconds: dict[str, list[float]] = {state: [] for state in networks}
    for turn in range(args.pairs + 1):
        for state in sorted(networks, reverse=turn % 2 == 1):
            start = time.perf_counter()
            step(*networks[state], images, labels)
            if turn:  # the first round warms up
                seconds[state].append(time.perf_counter() - start)
    plain = [peak_memory(args, "plain") for _ in range(3)]
    size = f"batch {args.batch_size}, {args.image_size}x{args.image_size}{', compiled' if args.compile else ''}"
    print(f"{args.architecture}, {size}, {report.hardware(images.device)}, torch {torch.__version__}")
    print(f"without gates: a step {statistics.median(seconds['plain']):.3f} s, peak {plain[0] / 2**20:.0f} MiB")
    for state in args.states:
        ratios = [g / p for g, p in zip(seconds[state], seconds["plain"], strict=True)]
        memory = [peak_memory(args, state) / p for p in plain]
        print(f"{state}: time {spread(ratios)}; peak memory {spread(memory)}")


if __name__ == "__main__":
    main()
