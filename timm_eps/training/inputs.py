"""The images of a run, and timm's description of the input, from the arguments of ``train_hf.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from PIL.Image import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..hub.onnx_int8 import CALIBRATION_IMAGES
from ..hub.remote_code import check_remote_name
from ..names import is_cifar_network
from . import choices, data
from .arguments import Arguments, DataArguments, ModelArguments, hub_id

__all__ = ["ImageData", "saved_config"]


@dataclass
class ImageData:
    """The images of a run, and the input format of its network.

    Attributes:
        splits: Splits ``train``, ``validation`` and maybe ``test``. Parts of the training images: ``analysed``, if they
            are needed to compare branches; ``calibration``, if they are needed for eight bits.
        pretrained_cfg: timm's description of the input.
        about: Facts about the images for the results and the card.
        pictures: Function that returns the first validation images as pictures.
        skip_corrupt: Whether images that cannot be read are skipped.
        corrupt: Names of the skipped images so far.
    """

    splits: dict[str, data.Images]
    pretrained_cfg: dict[str, Any]
    about: dict[str, Any]
    pictures: Callable[[int], list[Image]]
    skip_corrupt: bool = False
    corrupt: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, args: Arguments, accelerator: Accelerator) -> ImageData:
        """Load the images of the arguments, in every process of a run.

        Raises:
            ValueError: The images do not fit the network, or an image cannot be read.
        """
        config = starting_config(args)
        with accelerator.main_process_first():  # the first process fills the caches
            raw, about, length = load_splits(args)
        columns = data.find_columns(raw["train"].features, args.data.image_column_name, args.data.label_column_name)
        pretrained_cfg = input_of(args.model, args.data, config, raw["train"].features[columns[1]].num_classes)
        splits = prepare_splits(args.data, raw, columns, pretrained_cfg, length)
        tested = {name: split for name, split in splits.items() if name not in ("analysed", "calibration")}
        data.check_classes(**tested, all_trained=args.data.max_train_samples is None)
        pretrained_cfg |= normalization(args.model, splits["train"])
        pictures = partial(data.pictures, raw["validation"], columns[0])
        found = cls(splits, pretrained_cfg, about, pictures, args.data.corrupt_images == "skip")
        for name, split in tested.items():
            found.note_corrupt(getattr(split, "unreadable", []), name)
        return found

    @property
    def label_names(self) -> list[str]:
        """The classes, by number."""
        return list(self.splits["train"].label_names)

    def __str__(self) -> str:
        size = "x".join(str(n) for n in self.pretrained_cfg["input_size"])
        validation = self.splits["validation"]
        tested = "a stream" if isinstance(validation, data.ImageStream) else f"{len(validation):,}"
        return (
            f"{len(self.splits['train']):,} images of {self.about['dataset']} ({size}, {len(self.label_names)} "
            f"classes), testing on {tested} ({self.about['eval_split']})"
        )

    def note_corrupt(self, names: list[str], split: str) -> None:
        """Record images of a split that cannot be read. Raises ValueError unless they may be skipped."""
        if names and not self.skip_corrupt:
            raise ValueError(f"{names[0]} ({split}) cannot be read as an image; --corrupt_images skip leaves it out.")
        self.corrupt += sorted({f"{name} ({split})" for name in names}.difference(self.corrupt))

    def normalize(self, device: torch.device) -> data.Normalize:
        """The layer that converts uint8 images (B, C, H, W) to the input of the network."""
        return data.Normalize(self.pretrained_cfg).to(device)

    def analysed(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Normalised training images with labels for comparing branches; empty if they are not needed."""
        return list(self.batches_of("analysed", device)) if "analysed" in self.splits else []

    def batches_of(self, split: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of a split, normalised, with labels."""
        normalize = self.normalize(device)
        for images, labels, _ in data.evaluation_batches(self.splits[split], 128):
            if len(labels):
                yield normalize(images.to(device)), labels.to(device)

    def sample(self, count: int, device: torch.device) -> Tensor:
        """The first validation images, normalised, (count, C, H, W)."""
        return data.Normalize(self.pretrained_cfg)(self.splits["validation"].first(count)).to(device)


def load_splits(args: Arguments) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """The splits, their names for the results and the card, and the number of images per epoch (None if unknown)."""
    given, seed = args.data, args.training.seed
    if given.is_digits:
        splits: dict[str, Any] = dict(data.load_digits(given.fold))
        about = {"dataset": "scikit-learn digits", "dataset_id": None, "eval_split": f"fold {given.fold} of 5"}
        length: int | None = len(splits["train"])
    else:
        splits, eval_split, length = data.load_splits(
            given.dataset_name, given.dataset_config_name, given.train_dir, given.validation_dir,
            given.train_val_split, given.image_column_name, given.label_column_name, seed, given.train_split_name,
            given.streaming, given.test_dir, given.test_split_name,
        )  # fmt: skip
        name = hub_id(given.dataset_name)
        shown = name or Path(str(given.dataset_name or given.train_dir)).name
        about = {"dataset": shown, "dataset_id": name, "eval_split": eval_split}
    if not given.streaming:
        splits["train"] = data.sample(splits["train"], given.max_train_samples, seed)
        length = len(splits["train"])
    splits["validation"] = data.sample(splits["validation"], given.max_eval_samples, seed)
    if args.saving.with_onnx_int8:
        splits["calibration"] = data.sample(splits["train"], CALIBRATION_IMAGES, seed)
    if choices.needs_analysis(args):
        splits["analysed"] = data.sample(splits["train"], choices.ANALYSED, seed)
    return splits, about, given.max_train_samples if given.streaming and given.max_train_samples else length


def saved_config(name: str) -> EpsResNetConfig:
    """The configuration of a saved model, of this package, of timm, or of transformers' wrapper around timm.

    Args:
        name: Name on the Hub, or a directory.

    Raises:
        ValueError: The model does not exist, or is not a network of timm.
    """
    if Path(name).is_file():
        raise ValueError(
            f"--model_name_or_path {name} is a file. Load it into a model of timm.create_model, then save that with "
            "timm_eps.save_pretrained."
        )
    try:
        stored, _ = EpsResNetConfig.get_config_dict(name)
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--model_name_or_path {name} is not a directory with config.json, and cannot be read from the Hub: "
            f"{reason}"
        ) from error
    if "architecture" not in stored:
        kind = stored.get("model_type", "unknown")
        raise ValueError(
            f"--model_name_or_path {name} is a {kind} model of transformers. Only networks of timm can be pruned; "
            "timm.list_models('eps_*') lists them."
        )
    return EpsResNetConfig.from_dict(stored)


def starting_config(args: Arguments) -> EpsResNetConfig:
    """The configuration of the initial network: of the saved model, or of the architecture."""
    name = args.model.model_name_or_path
    if name:
        config = saved_config(name)
    else:
        name = args.model.name
        if not timm.is_model(name):
            raise ValueError(f"--architecture {name!r} is unknown; timm.list_models('eps_*') lists them.")
        config = EpsResNetConfig(architecture=name)
    if args.saving.with_remote_code:
        check_remote_name(config.architecture)
    if args.paper.per_pixel_mean and not is_cifar_network(config.architecture):
        raise ValueError(f"--per_pixel_mean works only for the paper's CIFAR networks, not for {config.architecture}.")
    return config


def input_of(model: ModelArguments, given: DataArguments, config: EpsResNetConfig, classes: int) -> dict[str, Any]:
    """timm's description of the input: of the saved model, or of the architecture at the requested size."""
    pretrained_cfg: dict[str, Any] = dict(config.pretrained_cfg or {})
    size = given.image_size
    if model.model_name_or_path:
        if config.num_labels != classes and not model.ignore_mismatched_sizes:
            raise ValueError(
                f"The saved model has {config.num_labels} classes, but the data set has {classes}. Use "
                "--ignore_mismatched_sizes to replace the classifier."
            )
        if size and (pretrained_cfg.get("fixed_input_size") or (config.model_args or {}).get("pixel_mean")):
            raise ValueError(
                f"--image_size {size}: {config.architecture} accepts only images of size "
                f"{pretrained_cfg['input_size'][-1]}, because its weights depend on the size."
            )
    elif given.is_digits and is_cifar_network(config.architecture):
        size = size or 8
    if size:
        pretrained_cfg |= {"input_size": (3, size, size), "pool_size": None}
    if given.crop_pct:
        pretrained_cfg["crop_pct"] = given.crop_pct
    if pretrained_cfg["input_size"][0] != 3:
        raise ValueError(f"The model needs {pretrained_cfg['input_size'][0]} channels, but the images have 3 (RGB).")
    return pretrained_cfg


def prepare_splits(
    given: DataArguments,
    raw: dict[str, Any],
    columns: tuple[str, str],
    pretrained_cfg: dict[str, Any],
    length: int | None,
) -> dict[str, data.Images]:
    """The splits in the network's format: small images are decoded into memory, others when they are needed."""
    if not given.streaming and given.augmentation != "resized_crop":
        return {name: data.ImageTensors.decode(raw[name], pretrained_cfg, *columns) for name in raw}
    cropped: dict[str, Any] = {"training": True, "flip": given.flip, "color_jitter": given.color_jitter}
    read = dict.fromkeys(raw, data.ImageReader.of(pretrained_cfg))
    if given.augmentation == "resized_crop":
        read["train"] = data.ImageReader.of(pretrained_cfg, **cropped)
    if given.streaming:
        lengths = dict.fromkeys(raw) | {"train": length}
        return {name: data.ImageStream.of(raw[name], read[name], *columns, lengths[name]) for name in raw}
    return {name: data.ImageFiles.of(raw[name], read[name], *columns) for name in raw}


def normalization(model: ModelArguments, train: data.Images) -> dict[str, Any]:
    """The paper's mean and deviation, which are saved with the model. Pretrained weights keep their own."""
    if model.has_weights:
        return {}
    if isinstance(train, data.ImageTensors):
        return {"mean": data.channel_mean(train.images), "std": [128 / 255] * 3}
    return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
