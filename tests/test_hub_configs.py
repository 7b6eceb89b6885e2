"""Each recipe in hub_configs/ is read, builds its network, and trains a step on data of its data set's schema."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import mostly_slow
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file

import train_hf
from timm_eps.names import base_name
from timm_eps.training.arguments import used_arguments
from timm_eps.training.inputs import ImageData

ROOT = Path(__file__).parent.parent

CONFIGS = sorted(path.name for path in (ROOT / "hub_configs").glob("*.json"))
# Data set, configuration, columns with classes, splits, side in pixels: as described on the Hub.
SCHEMAS = {
    "uoft-cs/cifar10": ("plain_text", {"img": None, "label": 10}, ["train", "test"], 32),
    "uoft-cs/cifar100": ("cifar100", {"img": None, "fine_label": 100, "coarse_label": 20}, ["train", "test"], 32),
    "ufldl-stanford/svhn": ("cropped_digits", {"image": None, "label": 10}, ["train", "test", "extra"], 32),
    "ILSVRC/imagenet-1k": ("default", {"image": None, "label": 1000}, ["train", "validation", "test"], 80),
    "ethz/food101": ("default", {"image": None, "label": 101}, ["train", "validation"], 80),
}


@pytest.fixture(scope="module")
def published():
    """The data sets on the loopback Hub, filled with noise."""
    for repo_id, (config, columns, splits, side) in SCHEMAS.items():
        features = datasets.Features(
            {
                name: datasets.Image() if classes is None else datasets.ClassLabel(num_classes=classes)
                for name, classes in columns.items()
            }
        )
        for number, split in enumerate(splits):
            rng = np.random.default_rng(number)
            unlabelled = repo_id == "ILSVRC/imagenet-1k" and split == "test"
            rows = [
                {
                    name: Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
                    if classes is None
                    else (-1 if unlabelled else index % 2)
                    for name, classes in columns.items()
                }
                for index in range(8)
            ]
            columnwise = {name: [row[name] for row in rows] for name in columns}
            datasets.Dataset.from_dict(columnwise, features).push_to_hub(repo_id, config, split=split)


def parse(name: str, *flags: str):
    return train_hf.parse_arguments(["--config", str(ROOT / "hub_configs" / name), *flags])


@pytest.mark.parametrize("name", CONFIGS)
def test_is_a_published_pair(name):
    """The name is <architecture>.<data set>.json, and every field is used."""
    args = parse(name).flat()
    architecture, dataset, _ = name.split(".", 2)
    assert args["architecture"].partition(".")[0] == architecture
    assert dataset.partition("-epsilon")[0] == (args["dataset_name"] or "digits").rpartition("/")[2]
    assert args["output_dir"] == f"outputs/{name.removesuffix('.json')}".replace(f"{architecture}.", f"{architecture}-")
    stored = json.loads((ROOT / "hub_configs" / name).read_text())
    unused = stored.keys() - used_arguments(parse(name)).keys() - {"license", "output_dir"}
    defaults = train_hf.parse_arguments([]).flat()
    assert not {key for key in unused if stored[key] not in (0, defaults[key])}
    assert timm.is_model(architecture)


def test_the_papers_runs_are_there():
    pairs = {(name.split(".")[0], name.split(".")[1].partition("-")[0], parse(name).paper.epsilon) for name in CONFIGS}
    for depth in (110, 200, 500, 752):
        assert {(f"eps_resnet{depth}", "cifar10", 2.5), (f"eps_resnet{depth}", "cifar100", 2.5)} <= pairs
    for depth in (110, 200, 302):
        assert (f"eps_resnet{depth}", "svhn", 1.5) in pairs
    for depth, epsilon in ((101, 2.0), (101, 2.1), (152, 1.8)):
        assert (f"eps_resnetv2_{depth}", "imagenet", epsilon) in pairs


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, 3))
def test_takes_a_step(name, published, tmp_path):
    args = parse(
        name, *("--max_train_samples", "4", "--max_eval_samples", "2", "--num_train_epochs", "1"),
        *("--per_device_train_batch_size", "4", "--num_warmup_steps", "0", "--dataloader_num_workers", "0"),
        *("--num_threads", "1"),
        *(() if (size := parse(name).data.image_size) is None or size < 200 else ("--image_size", "64")),
    )  # fmt: skip
    if args.model.pretrained:
        put_weights(args.model.name, tmp_path)
    accelerator = train_hf.start_accelerator(args)
    images = ImageData.load(args, accelerator)
    training, results = train_hf.train(args, accelerator, images)
    assert images.about["dataset_id"] == args.data.dataset_name
    assert training.model.config.num_labels == len(images.label_names)
    assert training.pruner.epoch == 1
    assert 0 <= results["eval_accuracy"] <= 1
    assert all(torch.isfinite(parameter).all() for parameter in training.model.parameters())


@pytest.mark.slow
def test_streamed_by_its_id(published, tmp_path):
    """Streamed from the Hub, without a copy on disk."""
    results = train_hf.main(
        ["--architecture", "eps_resnet20", "--dataset_name", "uoft-cs/cifar10", "--streaming",
         "--num_train_epochs", "1",
         "--per_device_train_batch_size", "4", "--epsilon_warmup_epochs", "0", "--num_threads", "1",
         "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert results["train_images"] == results["eval_images"] == 8


def put_weights(architecture: str, directory: Path) -> None:
    """Put weights of these names where timm looks for published weights."""
    name, tag = architecture.split(".")
    model = timm.create_model(base_name(name))
    save_file(model.state_dict(), directory / "model.safetensors")
    api = HfApi()
    repo_id = f"timm/{base_name(name)}.{tag}"
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=directory)
