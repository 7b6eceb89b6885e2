"""Images from ``datasets`` into tensors: columns found by their type, augmented in the way of their size.

Small images are cheap to hold and dear to decode, so a split becomes one uint8 tensor (N, C, H, W), augmented by the
batch. Large ones are decoded when they are needed and go through timm's own transforms. For evaluation the geometry is
in both cases that of timm's evaluation transform for the model, which is what image processors and pipelines apply
later: what is measured here is what they will compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "Distort",
    "ImageFiles",
    "ImageTensors",
    "Normalize",
    "PadCropFlip",
    "channel_mean",
    "check_classes",
    "find_columns",
    "load_digits",
    "load_splits",
    "loader",
    "sample",
]

DIGITS_FOLDS = 5


@dataclass
class ImageTensors(Dataset):
    """A split in memory: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,), and the names of the classes."""

    images: Tensor
    labels: Tensor
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # torch's loader asks for a whole batch at once where this method exists.
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]

    @classmethod
    def decode(
        cls,
        dataset: datasets.Dataset,
        pretrained_cfg: dict[str, Any],
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> ImageTensors:
        """Decode every image to the model's input size.

        Args:
            dataset: A split with an image and a class label column.
            pretrained_cfg: timm's description of the input: ``input_size`` (C, H, W), ``interpolation``, ``crop_pct``.
            image_column: Its image column; found by type if None.
            label_column: Its label column; found by type if None.

        Raises:
            ValueError: See :func:`find_columns`; or a label is outside the label column's classes.
        """
        files = ImageFiles.of(dataset, pretrained_cfg, image_column, label_column)
        images = torch.empty((len(files), *_geometry(pretrained_cfg)["input_size"]), dtype=torch.uint8)
        for index in range(len(files)):
            images[index] = files[index][0]
        return cls(images, files.labels, files.label_names)

    def first(self, count: int) -> Tensor:
        """The first images, uint8 (count, C, H, W)."""
        return self.images[:count]


@dataclass
class ImageFiles(Dataset):
    """A split whose images are decoded when they are asked for: uint8 (C, H, W), and the label."""

    rows: datasets.Dataset
    image_column: str
    mode: str
    transform: Callable[[Any], Tensor]
    labels: Tensor
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.rows[index][self.image_column].convert(self.mode)), self.labels[index]

    @classmethod
    def of(
        cls,
        dataset: datasets.Dataset,
        pretrained_cfg: dict[str, Any],
        image_column: str | None = None,
        label_column: str | None = None,
        *,
        training: bool = False,
        flip: bool = False,
        color_jitter: Sequence[float] | None = None,
    ) -> ImageFiles:
        """Images through timm's transform for the model.

        Args:
            dataset: A split with an image and a class label column.
            pretrained_cfg: timm's description of the input: ``input_size`` (C, H, W), ``interpolation``, ``crop_pct``.
            image_column: Its image column; found by type if None.
            label_column: Its label column; found by type if None.
            training: Random crops of 8 to 100 % of the area, resized, instead of the centre.
            flip: With ``training``: whether to mirror half the images.
            color_jitter: With ``training``: largest relative change of brightness, contrast and saturation.

        Raises:
            ValueError: See :func:`find_columns`; or a label is outside the label column's classes.
        """
        image_column, label_column = find_columns(dataset.features, image_column, label_column)
        geometry = _geometry(pretrained_cfg)
        augmentation: dict[str, Any] = (
            {"is_training": True, "hflip": 0.5 * flip, "color_jitter": color_jitter} if training else {}
        )
        names = list(dataset.features[label_column].names)
        given = dataset[label_column]
        labels = torch.tensor([-1 if label is None else label for label in given], dtype=torch.int64)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise ValueError(
                f"Column {label_column!r} holds labels from {labels.min()} to {labels.max()}, "
                f"but its classes are 0 to {len(names) - 1}. A split without labels cannot be used."
            )
        return cls(
            rows=dataset.select_columns(image_column),
            image_column=image_column,
            mode="L" if geometry["input_size"][0] == 1 else "RGB",
            transform=create_transform(**geometry, normalize=False, **augmentation),
            labels=labels,
            label_names=names,
        )

    def first(self, count: int) -> Tensor:
        """The first images, uint8 (count, C, H, W)."""
        return torch.stack([self[index][0] for index in range(min(count, len(self)))])


def _geometry(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    return resolve_data_config(pretrained_cfg=pretrained_cfg)


class PadCropFlip(nn.Module):
    """The augmentation of the CIFAR recipe on a uint8 batch: zero padding, a random crop, a random mirror image.

    (B, C, H, W) -> (B, C, H, W), one offset and one coin an image, drawn on the CPU from torch's global generator.

    Args:
        padding: Pixels on each side.
        flip: Whether to mirror half the images.
    """

    def __init__(self, padding: int, flip: bool) -> None:
        super().__init__()
        self.padding = padding
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        rows, columns = (torch.randint(2 * self.padding + 1, (batch, 1)) + torch.arange(n) for n in (height, width))
        if self.flip:
            columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
        index = torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]
        return padded.permute(0, 2, 3, 1)[tuple(i.to(images.device) for i in index)].permute(0, 3, 1, 2)


class Distort(nn.Module):
    """The augmentation of the SVHN recipe on a uint8 batch: brightness, contrast, a smooth deformation, a random crop.

    (B, C, H, W) -> (B, C, H, W), drawn for each image on its own, on the CPU, from torch's global generator. Brightness
    changes by up to 10 of 255, contrast by up to a fifth. The deformation moves four anchors in the padded image by up
    to 3 pixels (of 40), and what is around them by less, as a Gaussian of the distance.

    Args:
        padding: Pixels on each side.

    Source: https://github.com/yuxwind/epsilonResnet, the SVHN script.
    """

    ANCHORS = (0.2, 0.8)  # in both directions, as a share of the side
    VARIANCE = 0.2  # in squares of the side
    LARGEST_SHIFT = 3 / 40  # of the side

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        x = F.pad(images, (self.padding,) * 4).float()
        brightness, contrast = (_symmetric(batch, 1, 1, 1).to(x.device) for _ in range(2))
        x = (x + 10 * brightness).clamp(0, 255)
        mean = x.mean((2, 3), keepdim=True)
        x = ((x - mean) * (1 + 0.2 * contrast) + mean).clamp(0, 255)
        # Where each pixel of the crop lies in the padded image, and where it reads, both from 0 to 1.
        sides = height + 2 * self.padding, width + 2 * self.padding
        rows, columns = (
            (torch.randint(2 * self.padding + 1, (batch, 1)) + torch.arange(n) + 0.5) / side
            for n, side in zip((height, width), sides, strict=True)
        )
        near_row, near_column = (
            torch.exp(-((place[:, :, None] - torch.tensor(self.ANCHORS)) ** 2) / self.VARIANCE)
            for place in (rows, columns)
        )
        shifts = self.LARGEST_SHIFT * _symmetric(batch, 2, 2, 2)
        moved = torch.einsum("bhr,bwc,bdrc->bhwd", near_row, near_column, shifts)
        place = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
        grid = (2 * (place + moved) - 1).to(x.device)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return x.round().clamp(0, 255).to(images.dtype)


def _symmetric(*shape: int) -> Tensor:
    """Uniform from -1 to 1."""
    return 2 * torch.rand(shape) - 1


class Normalize(nn.Module):
    """uint8 images (B, C, H, W) to what the network reads, float32, bit for bit as timm's evaluation transform.

    Args:
        pretrained_cfg: timm's description of the input, with ``mean`` and ``std`` on the scale from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(pretrained_cfg[name]).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def channel_mean(images: Tensor) -> list[float]:
    """Mean of each channel of uint8 images (N, C, H, W), on the scale from 0 to 1."""
    return (images.double().mean((0, 2, 3)) / 255).tolist()


def loader(
    split: ImageTensors | ImageFiles, batch_size: int, shuffle: bool, seed: int = 0, num_workers: int = 0
) -> DataLoader:
    """Batches of (images uint8 (B, C, H, W), labels (B,)); the order depends on ``seed`` alone.

    Args:
        split: The images.
        batch_size: Of all batches but the last.
        shuffle: For training; then a last batch of one image is left out.
        seed: Of the order.
        num_workers: Processes that decode files; 0 decodes in this one. Images in memory need none.
    """
    in_memory = isinstance(split, ImageTensors)
    return DataLoader(
        split,
        num_workers=0 if in_memory else num_workers,
        batch_size=batch_size,
        shuffle=shuffle,
        # One image has no variance: batch norm on 1x1 features refuses it. Only such a rest is left out.
        drop_last=shuffle and len(split) > batch_size and len(split) % batch_size == 1,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_as_it_is if in_memory else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def find_columns(
    features: datasets.Features, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Names of the image and the label column.

    Args:
        features: The features of a data set.
        image_column: Taken as it is if given; else the only column of type ``Image``.
        label_column: Taken as it is if given; else the only column of type ``ClassLabel``.

    Raises:
        ValueError: A named column is not there or not of that type, or there is none or more than one to choose from.
    """
    return (
        _find_column(features, datasets.Image, image_column, "--image_column_name"),
        _find_column(features, datasets.ClassLabel, label_column, "--label_column_name"),
    )


def _find_column(features: datasets.Features, kind: type, name: str | None, flag: str) -> str:
    columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
    matching = [key for key, value in features.items() if isinstance(value, kind)]
    if name is not None:
        if name not in matching:
            raise ValueError(f"{flag} {name!r} is no column of type {kind.__name__}. Columns: {columns}.")
        return name
    if len(matching) != 1:
        found = f"{len(matching)} columns" if matching else "no column"
        raise ValueError(f"The data set has {found} of type {kind.__name__}; name one with {flag}. Columns: {columns}.")
    return matching[0]


def load_digits(fold: int = 0) -> datasets.DatasetDict:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn, split by one of five stratified folds.

    Over the five folds every image is in ``validation`` exactly once (UCI Optical Recognition of Handwritten Digits,
    https://archive.ics.uci.edu/dataset/80).

    Args:
        fold: 0 to 4.

    Returns:
        Splits ``train`` and ``validation`` with the columns ``image`` (grey, 8x8) and ``label``.

    Raises:
        ValueError: There is no such fold.
    """
    from PIL import Image
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import StratifiedKFold

    if fold not in range(DIGITS_FOLDS):
        raise ValueError(f"fold must be 0 to {DIGITS_FOLDS - 1}, got {fold!r}.")
    bunch = load()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the source counts from 0 to 16
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in bunch.target_names])}
    )
    indices = list(StratifiedKFold(DIGITS_FOLDS, shuffle=True, random_state=0).split(pixels, bunch.target))[fold]
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [Image.fromarray(pixels[i]) for i in chosen], "label": bunch.target[chosen]}, features
            )
            for split, chosen in zip(("train", "validation"), indices, strict=True)
        }
    )


def load_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_val_split: float = 0.15,
    label_column: str | None = None,
    seed: int = 0,
    train_split_name: str = "train",
) -> tuple[datasets.DatasetDict, str]:
    """Training and validation images from the Hub or from folders.

    Args:
        dataset_name: A data set on the Hub, or a local directory that ``datasets.load_dataset`` reads.
        dataset_config_name: Its configuration, such as ``cropped_digits``.
        train_dir: A directory with one sub-directory of images a class.
        validation_dir: The same for validation.
        train_val_split: Share of the training images to validate on, stratified by label, if there is no
            validation or test split.
        label_column: The label column; found by type if None.
        seed: Of that split.
        train_split_name: The split to train on, or several joined by ``+``, such as ``train+extra``.

    Returns:
        Splits ``train`` and ``validation``, and which images the latter are.

    Raises:
        ValueError: Nothing to load is named, or a split to train on is not there.
    """
    if dataset_name is not None:
        splits = datasets.load_dataset(dataset_name, dataset_config_name)
    elif train_dir is not None:
        folders = {"train": f"{train_dir}/**", "validation": f"{validation_dir}/**" if validation_dir else None}
        splits = datasets.load_dataset("imagefolder", data_files={k: v for k, v in folders.items() if v})
    else:
        raise ValueError("Name the images: --dataset_name, or --train_dir with --validation_dir.")
    names = train_split_name.split("+")
    if missing := [name for name in names if name not in splits]:
        raise ValueError(f"The data set has no split {missing[0]!r}, only {sorted(splits)}.")
    train = datasets.concatenate_datasets([splits[name] for name in names])
    for name in ("validation", "test"):
        if name in splits and name not in names:
            return datasets.DatasetDict({"train": train, "validation": splits[name]}), name
    _, label = find_columns(train.features, label_column=label_column)
    halves = train.train_test_split(train_val_split, stratify_by_column=label, seed=seed)
    share = f"{100 * train_val_split:g} % of {train_split_name}"
    return datasets.DatasetDict({"train": halves["train"], "validation": halves["test"]}), share


def check_classes(train: ImageTensors | ImageFiles, validation: ImageTensors | ImageFiles) -> None:
    """Raise ValueError if the splits number classes differently, or one to validate on was never trained."""
    if train.label_names != validation.label_names:
        raise ValueError(
            f"The training split has the classes {train.label_names}, the validation split {validation.label_names}."
        )
    unseen = sorted(set(validation.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        raise ValueError(
            f"Class {train.label_names[unseen[0]]!r} is in the validation split but has no training image."
        )


def sample(split: datasets.Dataset, most: int | None, seed: int) -> datasets.Dataset:
    """At most so many rows of a split, drawn by the seed; all of them, in order, if ``most`` is None."""
    return split if most is None else split.shuffle(seed=seed).select(range(min(most, len(split))))
