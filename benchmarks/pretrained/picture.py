"""The picture of the README: effect on the loss and cost of each branch of a small pretrained network.

    python -m benchmarks.pretrained.prepare      # once; prints the packages to install
    python -m benchmarks.pretrained.picture      # two minutes on one core; writes docs/branches.png

EfficientNet-Lite0 starts with its ImageNet weights and is fine-tuned for 400 steps of 32 images, on 600 images of
Fashion-MNIST at 48x48. Then ``timm_eps.analyze`` reads 500 other images of the training split. Seed 0.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

import timm_eps
from benchmarks.pretrained.cases import CASES
from benchmarks.pretrained.images import Reader, divide, load
from benchmarks.pretrained.prepare import DIRECTORY
from benchmarks.pretrained.training import fit

DOCS = Path(__file__).parent.parent.parent / "docs"
TRAINED, STEPS, ANALYZED, SEED = 600, 400, 500, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where prepare.py wrote images and weights")
    parser.add_argument("--output", type=Path, default=DOCS, help="directory of branches.png")
    args = parser.parse_args()
    case = CASES["quick"]
    torch.manual_seed(SEED)
    model = timm.create_model(case.architecture, num_classes=len(case.classes))
    state = load_file(args.directory / f"{case.weights}.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    classifier = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("classifier.")}
    model.load_state_dict(state | classifier)
    training, rest = divide(load(args.directory, "train", case.classes, torch.device("cpu")), TRAINED, SEED)
    read = Reader(case.side, model.pretrained_cfg)
    fit(model, training, read, replace(case.recipes[TRAINED], steps=STEPS), SEED)
    batches = [(read(batch.images), batch.labels) for batch in divide(rest, ANALYZED, SEED)[0].batches(100)]
    report = timm_eps.analyze(model, batches)
    print(report)
    report.plot(args.output / "branches.png")


if __name__ == "__main__":
    main()
