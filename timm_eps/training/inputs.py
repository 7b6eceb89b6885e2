"""The images of a run, and timm's description of them, by the arguments of ``train_hf.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from accelerate import Accelerator
from PIL.Image import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from transformers import AutoConfig

from ..hf.configuration_eps_resnet import EpsResNetConfig
from ..names import is_cifar_network
from . import data, start
from .arguments import begins_with_weights, hub_id, on_digits

__all__ = ["analysed_batches", "note_corrupt", "prepare_data"]


def load_images(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """The splits; how the results and the card name them; how many images an epoch has, None if it is not known."""
    if on_digits(args):
        splits: dict[str, Any] = dict(data.load_digits(args.fold))
        about = {"dataset": "scikit-learn digits", "dataset_id": None, "eval_split": f"fold {args.fold} of 5"}
        length: int | None = len(splits["train"])
    else:
        splits, eval_split, length = data.load_splits(
            args.dataset_name, args.dataset_config_name, args.train_dir, args.validation_dir, args.train_val_split,
            args.image_column_name, args.label_column_name, args.seed, args.train_split_name, args.streaming,
            args.test_dir, args.test_split_name,
        )  # fmt: skip
        name = hub_id(args.dataset_name)
        shown = name or Path(args.dataset_name or args.train_dir).name
        about = {"dataset": shown, "dataset_id": name, "eval_split": eval_split}
    if not args.streaming:
        splits["train"] = data.sample(splits["train"], args.max_train_samples, args.seed)
        length = len(splits["train"])
    splits["validation"] = data.sample(splits["validation"], args.max_eval_samples, args.seed)
    if start.needs_analysis(args):
        splits["analysed"] = data.sample(splits["train"], start.ANALYSED, args.seed)
    return splits, about, args.max_train_samples if args.streaming and args.max_train_samples else length


def starting_config(args: argparse.Namespace) -> EpsResNetConfig:
    """The configuration of what the training begins with: the saved model, or the architecture."""
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
        if not isinstance(config, EpsResNetConfig):
            raise ValueError(f"--model_name_or_path {args.model_name_or_path} is a {config.model_type}, no eps_resnet.")
    else:
        if not timm.is_model(args.architecture):
            raise ValueError(f"--architecture {args.architecture!r} is unknown; timm.list_models('eps_*') lists them.")
        config = EpsResNetConfig(architecture=args.architecture)
    if args.with_remote_code and not is_cifar_network(config.architecture):
        raise ValueError(f"--with_remote_code is for the paper's CIFAR networks, {config.architecture} is none.")
    if args.per_pixel_mean and not is_cifar_network(config.architecture):
        raise ValueError(f"--per_pixel_mean is for the paper's CIFAR networks, {config.architecture} is none.")
    return config


def input_of(args: argparse.Namespace, config: EpsResNetConfig, classes: int) -> dict[str, Any]:
    """timm's description of the input: that of the saved model, or of the architecture at the wanted size."""
    pretrained_cfg: dict[str, Any] = dict(config.pretrained_cfg or {})
    if args.model_name_or_path:
        if config.num_labels != classes and not args.ignore_mismatched_sizes:
            raise ValueError(
                f"The saved model tells {config.num_labels} classes apart, the data set has {classes}; "
                "--ignore_mismatched_sizes gives it a new classifier."
            )
        if args.image_size and (pretrained_cfg.get("fixed_input_size") or (config.model_args or {}).get("pixel_mean")):
            raise ValueError(
                f"--image_size {args.image_size}: {config.architecture} takes images of one size, "
                f"{pretrained_cfg['input_size'][-1]}, which its weights depend on."
            )
        if args.image_size:
            pretrained_cfg |= {"input_size": (3, args.image_size, args.image_size), "pool_size": None}
    elif size := args.image_size or (8 if on_digits(args) and is_cifar_network(config.architecture) else None):
        pretrained_cfg |= {"input_size": (3, size, size), "pool_size": None}
    if args.crop_pct:
        pretrained_cfg["crop_pct"] = args.crop_pct
    if pretrained_cfg["input_size"][0] != 3:
        raise ValueError(f"The model reads {pretrained_cfg['input_size'][0]} channels; this script feeds RGB images.")
    return pretrained_cfg


def prepare_images(
    args: argparse.Namespace,
    raw: dict[str, Any],
    columns: tuple[str, str],
    pretrained_cfg: dict[str, Any],
    length: int | None,
) -> dict[str, data.Images]:
    """The splits as the network reads them: small images decoded into memory, others when they are needed."""
    if not args.streaming and args.augmentation != "resized_crop":
        return {name: data.ImageTensors.decode(raw[name], pretrained_cfg, *columns) for name in raw}
    cropped = {"training": True, "flip": args.flip, "color_jitter": args.color_jitter}
    read = dict.fromkeys(raw, data.ImageReader.of(pretrained_cfg))
    if args.augmentation == "resized_crop":
        read["train"] = data.ImageReader.of(pretrained_cfg, **cropped)
    if args.streaming:
        lengths = dict.fromkeys(raw) | {"train": length}
        return {name: data.ImageStream.of(raw[name], read[name], *columns, lengths[name]) for name in raw}
    return {name: data.ImageFiles.of(raw[name], read[name], *columns) for name in raw}


def normalization(args: argparse.Namespace, train: data.Images) -> dict[str, Any]:
    """The paper's mean and deviation; they travel with the model. Weights keep those that they were trained with."""
    if begins_with_weights(args):
        return {}
    if isinstance(train, data.ImageTensors):
        return {"mean": data.channel_mean(train.images), "std": [128 / 255] * 3}
    return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


def prepare_data(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[dict[str, data.Images], dict[str, Any], dict[str, Any], Callable[[int], list[Image]]]:
    """The splits; timm's description of the input; what results and card say; and the first pictures to test on."""
    config = starting_config(args)
    with accelerator.main_process_first():  # it fills the caches that the others read
        raw, about, length = load_images(args)
    columns = data.find_columns(raw["train"].features, args.image_column_name, args.label_column_name)
    pretrained_cfg = input_of(args, config, raw["train"].features[columns[1]].num_classes)
    splits = prepare_images(args, raw, columns, pretrained_cfg, length)
    tested = {name: split for name, split in splits.items() if name != "analysed"}
    data.check_classes(**tested, all_trained=args.max_train_samples is None)
    pretrained_cfg |= normalization(args, splits["train"])
    return splits, pretrained_cfg, about, partial(data.pictures, raw["validation"], columns[0])


def note_corrupt(args: argparse.Namespace, names: list[str], split: str, known: list[str]) -> None:
    """Add images of a split that cannot be read to those known; raise ValueError unless they are to be skipped."""
    if names and args.corrupt_images == "error":
        raise ValueError(f"{names[0]} ({split}) is no image that can be read; --corrupt_images skip leaves it out.")
    known += sorted({f"{name} ({split})" for name in names}.difference(known))


def analysed_batches(
    args: argparse.Namespace,
    accelerator: Accelerator,
    splits: dict[str, data.Images],
    pretrained_cfg: dict[str, Any],
) -> list[tuple[Tensor, Tensor]]:
    """Training images to compare branches on, normalised, with labels, on the device; none if they are not needed."""
    if "analysed" not in splits:
        return []
    normalize = data.Normalize(pretrained_cfg).to(accelerator.device)
    batches = data.evaluation_batches(splits["analysed"], 128)
    found = [(images.to(accelerator.device), labels.to(accelerator.device)) for images, labels, _ in batches]
    return [(normalize(images), labels) for images, labels in found if len(labels)]
