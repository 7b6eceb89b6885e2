"""Convert pictures of any format to uint8 tensors of the model's input size.

Small images need little memory but take time to decode, so a split becomes one tensor (N, C, H, W). Large images are
decoded when they are needed, from a table or from a stream. For evaluation, the geometry is always the one of timm's
evaluation transform for the model. Image processors and pipelines apply the same transform, so they get the same
accuracy.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import Dataset

from .sources import check_labels, find_columns

__all__ = ["ImageFiles", "ImageReader", "ImageStream", "ImageTensors", "Item", "open_image", "pictures"]

# An image uint8 (C, H, W), its label, and its name; no image if it cannot be read.
Item = tuple[Tensor | None, int, str]


def open_image(cell: dict[str, Any], mode: str) -> Image.Image:
    """Decode a picture.

    Args:
        cell: Value of a column of type ``datasets.Image(decode=False)``: ``bytes``, ``path``, or both.
        mode: ``RGB`` or ``L``. An alpha channel is dropped, as in image processors. 16 bits per pixel are scaled to 8,
            because Pillow would clip them.

    Raises:
        OSError: The picture cannot be read.
    """
    try:
        image = datasets.Image().decode_example(cell)
        if image.mode.startswith("I"):
            image = Image.fromarray(np.rint(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert(mode)
    except Exception as error:  # Pillow's plug-ins may raise any error for damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass
class ImageReader:
    """Converts a cell of an image column to a tensor.

    Args:
        mode: Mode of :func:`open_image`.
        transform: Function from a picture to uint8 (C, H, W).
    """

    mode: str
    transform: Callable[[Any], Tensor]

    @classmethod
    def of(
        cls,
        pretrained_cfg: dict[str, Any],
        *,
        training: bool = False,
        flip: bool = False,
        color_jitter: Sequence[float] | None = None,
    ) -> ImageReader:
        """timm's transform for a model.

        Args:
            pretrained_cfg: timm's description of the input: ``input_size`` (C, H, W), ``interpolation``, ``crop_pct``.
            training: Whether to use resized random crops of 8 to 100 % of the area instead of the centre.
            flip: Whether to mirror half the images, with ``training``.
            color_jitter: Largest relative change of brightness, contrast and saturation, with ``training``.
        """
        geometry = resolve_data_config(pretrained_cfg=pretrained_cfg)
        augmentation: dict[str, Any] = (
            {"is_training": True, "hflip": 0.5 * flip, "color_jitter": color_jitter} if training else {}
        )
        mode = "L" if geometry["input_size"][0] == 1 else "RGB"
        return cls(mode, create_transform(**geometry, normalize=False, **augmentation))

    def __call__(self, cell: dict[str, Any], seed: int | None = None) -> Tensor | None:
        """uint8 (C, H, W), or None if the image cannot be read. ``seed`` alone determines the random transform."""
        try:
            image = open_image(cell, self.mode)
        except OSError:
            return None
        if seed is None:
            return self.transform(image)
        with _seeded(seed):
            return self.transform(image)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and torch's random numbers temporarily, and restore their states afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


@dataclass
class ImageTensors(Dataset):
    """A split in memory: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,), and the names of the classes.

    ``unreadable`` has the names of the images that were left out.
    """

    images: Tensor
    labels: Tensor
    label_names: list[str]
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, list[str]]:
        # torch's loader requests a whole batch at once if this method exists.
        chosen = torch.as_tensor(indices)
        return self.images.index_select(0, chosen), self.labels.index_select(0, chosen), []

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
            pretrained_cfg: See :meth:`ImageReader.of`.
            image_column: Its image column; found by type if None.
            label_column: Its label column; found by type if None.

        Raises:
            ValueError: See :func:`find_columns`; a label is outside the label column's classes; there is not enough
                memory; or no image can be read.
        """
        files = ImageFiles.of(dataset, ImageReader.of(pretrained_cfg), image_column, label_column)
        shape = len(files), *resolve_data_config(pretrained_cfg=pretrained_cfg)["input_size"]
        _check_memory(shape)
        images = torch.empty(shape, dtype=torch.uint8)
        kept: list[int] = []
        unreadable: list[str] = []
        for index, (image, _, name) in enumerate(files[row] for row in range(len(files))):
            if image is None:
                unreadable.append(name)
            else:
                images[len(kept)] = image
                kept.append(index)
        if not kept:
            raise ValueError(f"None of the {len(files)} images can be read; the first is {', '.join(unreadable[:1])}.")
        return cls(images[: len(kept)], files.labels[kept], files.label_names, unreadable)

    def first(self, count: int) -> Tensor:
        """The first images, uint8 (count, C, H, W)."""
        return self.images[:count]


def _check_memory(shape: tuple[int, ...]) -> None:
    needed = int(np.prod(shape))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > 0.8 * there:
            raise ValueError(
                f"{shape[0]:,} images of {'x'.join(map(str, shape[1:]))} need {needed / 2**30:.0f} GiB, but "
                f"this machine has {there / 2**30:.0f}; --augmentation resized_crop reads them when they are needed."
            )


@dataclass
class ImageFiles(Dataset):
    """A split whose images are decoded on request, by their index or by (index, seed)."""

    rows: datasets.Dataset
    image_column: str
    read: ImageReader
    labels: Tensor
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        index, seed = key if isinstance(key, tuple) else (key, None)
        cell = self.rows[index][self.image_column]
        return self.read(cell, seed), int(self.labels[index]), _name(cell, f"row {index}")

    @classmethod
    def of(
        cls,
        dataset: datasets.Dataset,
        read: ImageReader,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> ImageFiles:
        """The images of a table.

        Args:
            dataset: A split with an image and a class label column.
            read: Reader that converts cells to tensors.
            image_column: Its image column; found by type if None.
            label_column: Its label column; found by type if None.

        Raises:
            ValueError: See :func:`find_columns`; or a label is outside the label column's classes.
        """
        image_column, label_column = find_columns(dataset.features, image_column, label_column)
        names = list(dataset.features[label_column].names)
        labels = check_labels(dataset[label_column], label_column, names)
        rows = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        return cls(rows, image_column, read, torch.tensor(labels, dtype=torch.int64), names)

    def first(self, count: int) -> Tensor:
        """The first images that can be read, uint8 (count, C, H, W)."""
        return _first((self[index] for index in range(len(self))), count)


@dataclass
class ImageStream(Dataset):
    """A split that is read in the order of the disk or the internet.

    The items requested from this data set are rows, ``(cell, label, seed)``, which it decodes. Any number of worker
    processes can therefore share the work without changing the order.

    Args:
        source: Rows with an image and a class label column.
        length: Number of images per epoch; None for an evaluation to the end.
    """

    source: datasets.IterableDataset
    image_column: str
    label_column: str
    read: ImageReader
    label_names: list[str]
    length: int | None = None

    def __len__(self) -> int:
        if self.length is None:
            raise ValueError(
                "The number of images of the stream is unknown; set the images per epoch with --max_train_samples."
            )
        return self.length

    def __getitem__(self, row: tuple[dict[str, Any], int, int | None]) -> Item:
        cell, label, seed = row
        return self.read(cell, seed), label, _name(cell, _digest(cell))

    @classmethod
    def of(
        cls,
        dataset: datasets.IterableDataset,
        read: ImageReader,
        image_column: str | None = None,
        label_column: str | None = None,
        length: int | None = None,
    ) -> ImageStream:
        """The images of a stream; the arguments are those of :meth:`ImageFiles.of`, and ``length`` as above.

        Raises:
            ValueError: See :func:`find_columns`.
        """
        image_column, label_column = find_columns(dataset.features, image_column, label_column)
        names = list(dataset.features[label_column].names)
        source = dataset.select_columns([image_column, label_column])
        source = source.cast_column(image_column, datasets.Image(decode=False))
        return cls(source, image_column, label_column, read, names, length)

    def rows(self, source: datasets.IterableDataset) -> Iterator[tuple[dict[str, Any], int]]:
        """(cell, label) of each row of the source, or of a part of it. Raises ValueError for an invalid label."""
        for row in source:
            [label] = check_labels([row[self.label_column]], self.label_column, self.label_names)
            yield row[self.image_column], label

    def first(self, count: int) -> Tensor:
        """The first images that can be read, uint8 (count, C, H, W)."""
        return _first((self[cell, label, None] for cell, label in self.rows(self.source)), count)


def pictures(rows: datasets.Dataset | datasets.IterableDataset, column: str, count: int) -> list[Image.Image]:
    """The first readable pictures of a split in RGB, the same ones as in ``first``."""
    found: list[Image.Image] = []
    for row in rows.select_columns([column]).cast_column(column, datasets.Image(decode=False)):
        if len(found) == count:
            break
        try:
            found.append(open_image(row[column], "RGB"))
        except OSError:
            continue
    return found


def _name(cell: dict[str, Any] | None, otherwise: str) -> str:
    path, content = (cell or {}).get("path"), (cell or {}).get("bytes")
    if path and content is None:
        return path
    return f"{path} ({otherwise})" if path else otherwise


def _digest(cell: dict[str, Any] | None) -> str:
    content = (cell or {}).get("bytes")
    return "empty image" if content is None else f"image with SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"


def _first(items: Iterator[Item], count: int) -> Tensor:
    images = (image for image, _, _ in items if image is not None)
    found = [image for _, image in zip(range(count), images, strict=False)]
    if not found:
        raise ValueError("No image of the split can be read.")
    return torch.stack(found)
