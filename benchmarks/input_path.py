"""The cost of the input: augmented and normalised images per second, and their share of a training step.

    python -m benchmarks.input_path                 # 50,000 random 32x32 images; then the default run of train_hf.py
    python -m benchmarks.input_path --device cuda

The first figure is for the input path alone. The share comes from steps of train_hf.py, each divided into reading a
batch, and forward, backward and optimizer. Figures are medians over the dense network's steps, and over steps of the
network with a quarter of its blocks, which are the shortest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

import train_hf
from benchmarks.training_speed import begin
from timm_eps import remove_closed, report
from timm_eps.surgery.branches import gates
from timm_eps.training import data
from timm_eps.training.launching import available_cores

CIFAR = {"mean": (0.49, 0.48, 0.45), "std": (0.5, 0.5, 0.5)}


def images_a_second(augment: Callable[[Tensor], Tensor], device: torch.device, repeats: int) -> list[float]:
    """One figure for each pass through 50,000 images in batches of 128."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = data.ImageTensors(images, torch.zeros(len(images), dtype=torch.int64), ["a"])
    batches = data.TrainingBatches(split, 128, pin_memory=device.type == "cuda")
    normalize = data.Normalize(CIFAR).to(device)
    found = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        for batch, _, _ in batches.epoch(turn):
            normalize(augment(batch.to(device, non_blocking=True)))
        synchronize(device)
        found.append(len(images) / (time.perf_counter() - start))
    return found[1:]  # the first pass warms up


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def share_of_step(keep: float, epochs: int) -> tuple[float, float]:
    """Median seconds of reading a batch, and of a whole step, with this share of the default run's blocks."""
    with tempfile.TemporaryDirectory() as directory:
        training = begin(directory)
    found = gates(training.model)
    for slot in list(found)[round(keep * len(found)) :]:
        found[slot].closed = True
    remove_closed(training.model)
    training.network.train()
    reading, whole = [], []
    for epoch in range(epochs):
        batches = iter(training.batches.epoch(epoch))
        while True:
            start = time.perf_counter()
            if (batch := next(batches, None)) is None:
                break
            images, labels = training.read(batch[0], batch[1])
            synchronize(images.device)
            read = time.perf_counter()
            train_hf.forward_backward(training, images, labels)
            train_hf.take_step(training)
            synchronize(images.device)
            reading.append(read - start)
            whole.append(time.perf_counter() - start)
    return statistics.median(reading), statistics.median(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(available_cores())
    print(f"{report.hardware(device)}, torch {torch.__version__}")
    for name, augment in {
        "pad, crop, flip": data.PadCropFlip(4, flip=True),
        "the set for SVHN": data.Distort(4),
    }.items():
        found = images_a_second(augment, device, args.repeats)
        print(
            f"{name}: median {statistics.median(found):,.0f} images/s "
            f"({min(found):,.0f} to {max(found):,.0f}, {args.repeats} passes through 50,000 32x32 images)"
        )
    for keep in (1.0, 0.25):
        reading, whole = share_of_step(keep, args.repeats)
        print(
            f"default run with {100 * keep:g} % of its blocks: reading takes {100 * reading / whole:.2f} % of a step "
            f"({1e3 * reading:.2f} of {1e3 * whole:.1f} ms, medians of {args.repeats} epochs)"
        )


if __name__ == "__main__":
    main()
