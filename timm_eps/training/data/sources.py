"""Load images from the Hub, folders, tables, or the digits, and find their columns and classes."""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np

__all__ = ["check_classes", "check_labels", "find_columns", "load_digits", "load_splits", "sample"]

DIGITS_FOLDS = 5

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def find_columns(
    features: datasets.Features | None, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Names of the image and the label column.

    Args:
        features: The features of a data set.
        image_column: Name of the image column; by default the only column of type ``Image``.
        label_column: Name of the label column; by default the only column of type ``ClassLabel``.

    Raises:
        ValueError: A named column does not exist or has another type, or there is no column or more than one of the
            type.
    """
    return (
        _find_column(features, datasets.Image, image_column, "--image_column_name"),
        _find_column(features, datasets.ClassLabel, label_column, "--label_column_name"),
    )


def _find_column(features: datasets.Features | None, kind: type, name: str | None, flag: str) -> str:
    known = features or {}  # unknown for some streams
    columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in known.items()) or "unknown"
    matching = [key for key, value in known.items() if isinstance(value, kind)]
    if name is not None:
        if name not in matching:
            raise ValueError(f"{flag} {name!r} is not a column of type {kind.__name__}. Columns: {columns}.")
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
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the source has values from 0 to 16
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
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    train_split_name: str = "train",
    streaming: bool = False,
    test_dir: str | None = None,
    test_split_name: str | None = None,
) -> tuple[dict[str, Rows], str, int | None]:
    """Training and validation images from the Hub or from folders, and test images if they are named.

    Args:
        dataset_name: A data set on the Hub, or a local directory that ``datasets.load_dataset`` reads.
        dataset_config_name: Configuration of the data set, such as ``cropped_digits``.
        train_dir: A directory with one sub-directory of images per class.
        validation_dir: Such a directory for validation.
        train_val_split: Share of the training images to validate on, stratified by label, if there is no
            validation or test split.
        image_column: The image column; found by type if None. If it is named, it may hold encoded files or paths.
        label_column: The label column; found by type if None. If it is named, it may hold numbers or strings.
        seed: Seed of that split.
        train_split_name: The split to train on, or several joined by ``+``, such as ``train+extra``.
        streaming: Whether to stream the images without storing them on the disk.
        test_dir: A directory of test images, like ``train_dir``. They are not used for validation.
        test_split_name: A split of the data set for testing. It is not used for validation.

    Returns:
        Splits ``train`` and ``validation``, and ``test`` if it is named; a name of the validation images; and the
        number of training images, None for a stream of unknown length.

    Raises:
        ValueError: No images are named, a training or test split does not exist, a stream has no validation split, or a
            named column cannot be used.
    """
    if dataset_name is not None:
        splits = datasets.load_dataset(
            dataset_name, dataset_config_name, streaming=streaming, cache_dir=_cache_of(dataset_name)
        )
    elif train_dir is not None:
        folders = {"train": train_dir, "validation": validation_dir, "test": test_dir}
        files = {name: f"{directory}/**" for name, directory in folders.items() if directory}
        test_split_name = "test" if test_dir else None
        splits = datasets.load_dataset("imagefolder", data_files=files, streaming=streaming)
    else:
        raise ValueError("Name the images: --dataset_name, or --train_dir with --validation_dir.")
    names = train_split_name.split("+")
    untouched = [test_split_name] if test_split_name else []
    if missing := [name for name in (*names, *untouched) if name not in splits]:
        raise ValueError(f"The data set has no split {missing[0]!r}, only {sorted(splits)}.")
    if both := set(names).intersection(untouched):
        raise ValueError(f"--test_split_name {min(both)} is among the splits that are trained on, {train_split_name}.")
    lengths = [_length(splits[name], name) for name in names]
    found = {"train": datasets.concatenate_datasets([splits[name] for name in names])}
    used = {*names, *untouched}
    tested = next((name for name in ("validation", "test") if name in splits and name not in used), None)
    if test_split_name:
        found["test"] = splits[test_split_name]
    if tested:
        found["validation"] = splits[tested]
    elif streaming:
        raise ValueError(f"The stream has no validation split, only {sorted(splits)}; train without --streaming.")
    found = _with_types(found, image_column, label_column)
    if tested:
        known = [length for length in lengths if length is not None]
        return found, tested, sum(known) if len(known) == len(lengths) else None
    _, label = find_columns(found["train"].features, image_column, label_column)
    check_labels(found["train"][label], label, found["train"].features[label].names)
    names = found["train"].features[label].names
    counts = collections.Counter(found["train"][label])
    if lonely := [names[number] for number, count in counts.items() if count < 2]:
        raise ValueError(
            f"{label}: class {lonely[0]!r} has one image, but training and validation need one each. Add images, "
            "leave the class out, or name a validation split."
        )
    halves = found["train"].train_test_split(train_val_split, stratify_by_column=label, seed=seed)
    share = f"{100 * train_val_split:g} % of {train_split_name}"
    found |= {"train": halves["train"], "validation": halves["test"]}
    return found, share, len(halves["train"])


def _cache_of(directory: str) -> str | None:
    """A cache directory for the current files: ``datasets`` identifies directories only by their last name."""
    if not os.path.isdir(directory):
        return None
    files = sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in Path(directory).resolve().rglob("*"))
    return str(Path(datasets.config.HF_DATASETS_CACHE) / hashlib.sha256(repr(files).encode()).hexdigest()[:16])


def _length(split: Rows, name: str) -> int | None:
    if isinstance(split, datasets.Dataset):
        return len(split)
    described = split.info.splits or {}
    return described[name].num_examples if name in described else None


def _with_types(splits: dict[str, Rows], image_column: str | None, label_column: str | None) -> dict[str, Rows]:
    """Convert named columns to their types: images, and classes by name."""
    features = splits["train"].features or {}
    if image_column in features and not isinstance(features[image_column], datasets.Image):
        try:
            splits = {name: rows.cast_column(image_column, datasets.Image()) for name, rows in splits.items()}
        except (TypeError, ValueError, NotImplementedError) as error:
            kind = type(features[image_column]).__name__
            raise ValueError(f"--image_column_name {image_column!r} ({kind}) contains no images: {error}.") from error
    if label_column is not None and isinstance(features.get(label_column), datasets.Value):
        dtype = features[label_column].dtype
        if not dtype.startswith(("int", "uint", "string", "large_string", "bool")):
            raise ValueError(
                f"--label_column_name {label_column!r} contains {dtype}; classes must be strings or whole numbers."
            )
        if isinstance(splits["train"], datasets.IterableDataset):
            raise ValueError(
                f"--label_column_name {label_column!r} contains {dtype}, but the classes of a stream are unknown "
                "before its end. Train without --streaming, or store the column as a ClassLabel."
            )
        values = sorted(value for value in splits["train"].unique(label_column) if value is not None)
        number_of = {value: number for number, value in enumerate(values)}
        kind = datasets.ClassLabel(names=[str(value) for value in values])
        splits = {name: _as_classes(rows, name, label_column, number_of, kind) for name, rows in splits.items()}
    return splits


def _as_classes(
    rows: datasets.Dataset, split: str, column: str, number_of: dict[Any, int], kind: datasets.ClassLabel
) -> datasets.Dataset:
    given = rows[column]
    if strangers := [value for value in rows.unique(column) if value is not None and value not in number_of]:
        raise ValueError(f"Class {strangers[0]!r} is in the {split} split but has no training image.")
    numbers = [number_of.get(value) for value in given]
    return rows.remove_columns(column).add_column(column, numbers, feature=kind)


def check_labels(labels: Sequence[int | None], column: str, names: Sequence[str]) -> list[int]:
    """The labels. Raises ValueError for a label without a class."""
    numbers = [-1 if label is None else label for label in labels]
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(names):
        raise ValueError(
            f"Column {column!r} contains labels from {min(numbers)} to {max(numbers)}, but its classes are 0 to "
            f"{len(names) - 1}. A split without labels cannot be used."
        )
    return numbers


def check_classes(train: Any, *, all_trained: bool = True, **others: Any) -> None:
    """Raise ValueError if splits have different classes, or a class of another split has no training image.

    The latter is not checked for streams, or without ``all_trained``, because a sample may lack classes.

    Args:
        train: Training images.
        all_trained: Whether these are all training images.
        others: Other splits, by name.
    """
    for name, split in others.items():
        if train.label_names != split.label_names:
            raise ValueError(
                f"The training split has the classes {train.label_names}, the {name} split {split.label_names}."
            )
        if not (all_trained and hasattr(train, "labels") and hasattr(split, "labels")):
            continue
        if unseen := sorted(set(split.labels.tolist()) - set(train.labels.tolist())):
            raise ValueError(
                f"Class {train.label_names[unseen[0]]!r} is in the {name} split but has no training image."
            )


def sample(split: Rows, most: int | None, seed: int) -> Rows:
    """At most ``most`` random rows (of a stream, the first ones); all rows, in order, if ``most`` is None."""
    if most is None:
        return split
    if isinstance(split, datasets.IterableDataset):
        return split.take(most)
    return split.shuffle(seed=seed).select(range(min(most, len(split))))
