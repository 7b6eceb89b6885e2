"""A training step beside another process that keeps a core busy, for both ways in which threads may wait.

    python -m benchmarks.busy                             # eps_resnet110 on 8x8, batch 32, all cores

By default, threads wait in a loop and take the core from the threads that they wait for. With
``OMP_WAIT_POLICY=passive`` they sleep, and take longer to begin. With one thread nothing waits. Each run has a process
of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

WARMUP, STEPS = 3, 20


def seconds_of_steps(threads: int) -> list[float]:
    """Seconds of each step of a short training in this process."""
    import timm
    import torch

    import timm_eps  # noqa: F401  registers the network

    torch.set_num_threads(threads)
    model = timm.create_model("eps_resnet110", in_chans=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, seconds = torch.randn(32, 1, 8, 8), []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        model(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP:]


def mean_step(policy: str, threads: int, is_busy: bool) -> float:
    """Mean seconds of a step in a process with a wait policy, beside a busy process or alone."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {} if policy == "default" else {"OMP_WAIT_POLICY": policy}
        done = subprocess.run(
            [sys.executable, __file__, "--only", str(threads)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return statistics.mean(map(float, done.stdout.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(*seconds_of_steps(args.only))
        return
    cores = len(os.sched_getaffinity(0))
    for policy, threads in (("default", cores), ("passive", cores), ("default", 1)):
        alone, beside = ([mean_step(policy, threads, busy) for _ in range(args.rounds)] for busy in (False, True))
        ratio = statistics.median(beside) / statistics.median(alone)
        figures = ", ".join(
            f"{name} {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"
            for name, found in {"alone": alone, "beside a busy process": beside}.items()
        )
        print(f"{policy}, {threads} threads: {figures}, {ratio:.1f} times as long")


if __name__ == "__main__":
    main()
