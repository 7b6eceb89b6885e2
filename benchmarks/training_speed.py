"""How many steps a second train_hf.py takes: gates off, idle, at work, and measuring importance.

On a GPU also as CUDA graphs, and compiled as CUDA graphs.

    python -m benchmarks.training_speed -- --mixed_precision bf16 --channels_last
    python -m benchmarks.training_speed --rounds 3 --steps 2 -- --architecture eps_resnet20

Network eps_resnet110, batch 128, the digits at 32x32. Arguments after ``--`` go to train_hf.py. No gate closes. The
trainings take turns of a few steps, so that changes in the machine's speed affect all of them alike. Results are
medians over the rounds, and medians of the ratios to the first training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from tqdm.auto import tqdm

import train_hf
from timm_eps.training.arguments import parse_arguments
from timm_eps.training.inputs import ImageData
from timm_eps.training.launching import start_accelerator
from timm_eps.training.publishing import hardware
from timm_eps.training.run import Run

GATES = {
    "gates off": ["--no_gates"],
    "gates idle": ["--epsilon", "1e-30", "--epsilon_warmup_epochs", "8"],
    "gates at work": ["--epsilon", "1e-30", "--epsilon_warmup_epochs", "0"],
    "importance measured": ["--keep", "0.5", "--criterion", "importance", "--epsilon_warmup_epochs", "0"],
}


def begin(directory: str, *flags: str) -> Run:
    """A training before its first step."""
    args = parse_arguments(["--output_dir", directory, *flags])
    accelerator = start_accelerator(args)
    return train_hf.prepare(args, accelerator, ImageData.load(args, accelerator))


def seconds_of_epoch(training: Run, number: int) -> float:
    """Time for reading and training, without the work at the end of an epoch."""
    training.progress.batch = 0
    training.loss.item()  # waits for the device
    start = time.perf_counter()
    with training.queue():
        train_hf.train_epoch(training, number, tqdm(disable=True))
    training.loss.item()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of each training in a round")
    parser.add_argument("arguments", nargs="*", help="further arguments of train_hf.py, after --")
    args = parser.parse_args()
    ways = {"": []}
    if torch.cuda.is_available():
        ways |= {", as a CUDA graph": ["--cuda_graphs"], ", compiled, as a CUDA graph": ["--compile", "--cuda_graphs"]}
    shared = ["--image_size", "32", "--steps_per_epoch", str(args.steps)]
    with tempfile.TemporaryDirectory() as directory:
        trainings = {
            f"{name}{way}": begin(directory, *shared, *flags, *how, *args.arguments)
            for way, how in ways.items()
            for name, flags in GATES.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainings}
        for turn in range(args.rounds + 1):
            for name, training in trainings.items():
                found = seconds_of_epoch(training, turn)
                if turn:  # the first round warms up
                    seconds[name].append(found)
    first, *_ = trainings.values()
    print(f"{hardware(first.accelerator)}, torch {torch.__version__}, {first.accelerator.mixed_precision}")
    for name, found in seconds.items():
        ratios = [own / plain for own, plain in zip(found, seconds["gates off"], strict=True)]
        print(
            f"{name}: {args.steps / statistics.median(found):.2f} steps/s, {statistics.median(ratios):.3f} of the time "
            f"({min(ratios):.3f} to {max(ratios):.3f}, {args.rounds} rounds)"
        )


if __name__ == "__main__":
    main()
