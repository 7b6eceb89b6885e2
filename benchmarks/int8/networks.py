"""The quantized networks, dense and pruned, and their images. Each network is trained once and kept.

``digits``: eps_resnet110 on fold 0 of scikit-learn's digits, by ``train_hf.py``. ``lite0``: EfficientNet-Lite0 with
ImageNet weights, fine-tuned on 6,000 images of Fashion-MNIST at 48x48. The pruned one lacks the last six branches.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import timm_eps
from benchmarks.pretrained.cases import CASES, Recipe
from benchmarks.pretrained.images import Labelled, Reader, divide, load
from benchmarks.pretrained.training import fit
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import natural_order
from timm_eps.training import data

ROOT = Path(__file__).parents[2]
STATES = ("dense", "pruned")
EPOCHS, SEED, TRAINED, CALIBRATED = 30, 0, 6_000, 512
RECIPE = Recipe(steps=300, batch_size=32, learning_rate=0.01)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) in the network's input format: some for calibration, others with labels (N,) for the test."""

    calibration: Tensor
    tested: Tensor
    labels: Tensor


def digits(state: str, directory: Path, _: Path) -> None:
    """Train eps_resnet110 on the digits and save it."""
    command = [sys.executable, "train_hf.py", "--num_train_epochs", str(EPOCHS), "--seed", str(SEED)]
    command += ["--output_dir", str(directory), "--num_threads", str(torch.get_num_threads())]
    subprocess.run([*command, *(["--no_gates"] if state == "dense" else [])], cwd=ROOT, check=True)


def lite0(state: str, directory: Path, source: Path) -> None:
    """Fine-tune EfficientNet-Lite0, with all branches or without the last six, and save it."""
    case = CASES["quick"]
    torch.manual_seed(SEED)
    model = timm.create_model(case.architecture, num_classes=len(case.classes))
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("classifier.")}
    model.load_state_dict(load_file(source / f"{case.weights}.safetensors") | own)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, case.side, case.side), "pool_size": None}
    if state == "pruned":
        timm_eps.prune(model, sorted(gates(model), key=natural_order)[-6:])
    training, _ = divide(load(source, "train", case.classes, _CPU), TRAINED, SEED)
    fit(model, training, Reader(case.side, model.pretrained_cfg), RECIPE, SEED)
    if state == "dense":
        timm_eps.add_gates(model)  # `fit` has removed the gates
    timm_eps.save_pretrained(model, directory)


def digits_images(net: nn.Module, _: Path) -> Images:
    """Training and test images of fold 0."""
    splits = data.load_digits(0)
    columns = data.find_columns(splits["train"].features, None, None)
    read = {name: data.ImageTensors.decode(splits[name], net.pretrained_cfg, *columns) for name in splits}
    normalize = data.Normalize(net.pretrained_cfg)
    order = torch.randperm(len(read["train"]), generator=torch.Generator().manual_seed(SEED))[:CALIBRATED]
    tested = read["validation"]
    return Images(normalize(read["train"].images[order]), normalize(tested.images), torch.as_tensor(tested.labels))


def lite0_images(net: nn.Module, source: Path) -> Images:
    """Training images and the 10,000 test images of Fashion-MNIST."""
    case = CASES["quick"]
    reader = Reader(case.side, net.pretrained_cfg)

    def read(labelled: Labelled) -> Tensor:
        return reader(labelled.images).contiguous()

    calibration, _ = divide(load(source, "train", case.classes, _CPU), CALIBRATED, SEED)
    tested = load(source, "test", case.classes, _CPU)
    return Images(read(calibration), read(tested), tested.labels)


MAKERS = {"digits": digits, "lite0": lite0}
READERS = {"digits": digits_images, "lite0": lite0_images}


def network(name: str, state: str, directory: Path, source: Path) -> nn.Module:
    """A trained network, loaded from the directory or trained now.

    Args:
        name: ``digits`` or ``lite0``.
        state: ``dense`` or ``pruned``.
        directory: Directory of the trained networks.
        source: Directory written by ``benchmarks.pretrained.prepare``, with images and weights.
    """
    kept = directory / f"{name}-{state}"
    if not (kept / "config.json").exists():
        print(f"Training {name}, {state}.", flush=True)
        MAKERS[name](state, kept, source)
    return timm.create_model(f"local-dir:{kept}", pretrained=True).eval()
