"""Images through ``datasets``: columns, decoding, augmentation, and clear words for what cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from timm_eps.data import (
    Distort,
    ImageFiles,
    ImageTensors,
    Normalize,
    PadCropFlip,
    channel_mean,
    check_classes,
    find_columns,
    load_digits,
    load_splits,
    loader,
    sample,
)

SIZE = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0}


def make_dataset(count=12, size=(8, 8), image="img", label="fine_label", mode="RGB", classes=("a", "b", "c")):
    rng = np.random.default_rng(0)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, *channels), dtype=np.uint8), mode) for _ in range(count)]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    return datasets.Dataset.from_dict({image: pictures, label: [i % len(classes) for i in range(count)]}, features)


def test_digits_folds_cover_every_image_once():
    seen = []
    for fold in range(5):
        splits = load_digits(fold)
        assert len(splits["train"]) + len(splits["validation"]) == 1797
        seen += [np.asarray(row["image"]).tobytes() for row in splits["validation"]]
        counts = np.bincount(splits["validation"]["label"])
        assert counts.max() - counts.min() <= 3, "stratified"
    assert len(seen) == 1797
    whole = [np.asarray(row["image"]).tobytes() for split in load_digits(0).values() for row in split]
    assert sorted(seen) == sorted(whole)


def test_digits_are_real_images():
    split = load_digits()["train"]
    image = np.asarray(split[0]["image"])
    assert image.shape == (8, 8)
    assert image.dtype == np.uint8
    assert split.features["label"].names == [str(i) for i in range(10)]
    assert max(np.asarray(row["image"]).max() for row in split) == 255


@pytest.mark.parametrize("fold", [-1, 5, 1.5])
def test_no_such_fold(fold):
    with pytest.raises(ValueError, match="fold must be 0 to 4"):
        load_digits(fold)


def test_columns_by_type():
    assert find_columns(make_dataset().features) == ("img", "fine_label")


IMAGE, LABEL, NUMBER = datasets.Image(), datasets.ClassLabel(2), datasets.Value("int64")


@pytest.mark.parametrize(
    ("features", "names", "message"),
    [
        (
            {"x": NUMBER, "y": LABEL},
            {},
            "no column of type Image; name one with --image_column_name. Columns: x (Value)",
        ),
        ({"x": IMAGE, "y": NUMBER}, {}, "no column of type ClassLabel"),
        ({"x": IMAGE, "fine": LABEL, "coarse": LABEL}, {}, "2 columns of type ClassLabel"),
        ({"x": IMAGE, "y": LABEL}, {"label_column": "z"}, "--label_column_name 'z' is no column of type ClassLabel"),
        ({"x": IMAGE, "y": LABEL}, {"image_column": "y"}, "--image_column_name 'y' is no column of type Image"),
    ],
)
def test_bad_columns(features, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_columns(datasets.Features(features), **names)


def test_named_columns_decide():
    features = datasets.Features(
        {"x": datasets.Image(), "fine": datasets.ClassLabel(2), "coarse": datasets.ClassLabel(2)}
    )
    assert find_columns(features, label_column="coarse") == ("x", "coarse")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(8, 8), (13, 21), (1, 1)])
def test_decoded_as_timm_evaluates(mode, size):
    """The same pixels that an image processor or a pipeline will make of the picture."""
    dataset = make_dataset(3, size, mode=mode)
    split = ImageTensors.decode(dataset, SIZE)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=SIZE), normalize=False)
    assert split.images.dtype == torch.uint8
    assert split.images.shape == (3, 3, 8, 8)
    for row, image in zip(dataset, split.images, strict=True):
        assert torch.equal(image, transform(row["img"].convert("RGB")))
    if size == (8, 8) and mode == "RGB":
        assert torch.equal(split.images[0], pil_to_tensor(dataset[0]["img"]))
    assert split.label_names == ["a", "b", "c"]


def test_one_channel_networks_get_grey():
    split = ImageTensors.decode(make_dataset(2), {**SIZE, "input_size": (1, 8, 8)})
    assert split.images.shape == (2, 1, 8, 8)


def test_unlabelled_split():
    dataset = make_dataset(3)
    for nothing in (-1, None):
        hidden = datasets.Dataset.from_dict({"img": dataset["img"], "fine_label": [nothing] * 3}, dataset.features)
        with pytest.raises(ValueError, match=r"'fine_label' holds labels from -1 to -1, but its classes are 0 to 2"):
            ImageTensors.decode(hidden, SIZE)


def test_splits_that_number_classes_differently():
    train, validation = (ImageTensors.decode(make_dataset(6, classes=tuple(c)), SIZE) for c in ("abc", "acb"))
    check_classes(train, train)
    with pytest.raises(ValueError, match=r"the classes \['a', 'b', 'c'\], the validation split \['a', 'c', 'b'\]"):
        check_classes(train, validation)


def test_normalisation_is_timms():
    cfg = {**SIZE, "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.5, 0.6)}
    dataset = make_dataset(1)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    normalised = Normalize(cfg)(ImageTensors.decode(dataset, cfg).images)
    assert torch.equal(normalised[0], transform(dataset[0]["img"]))


def test_channel_mean():
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:, 1] = 255
    images[:, 2] = 51
    assert channel_mean(images) == pytest.approx([0, 1, 0.2])


def test_loader_shuffles_by_seed_and_keeps_pairs():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split = ImageTensors(images, torch.arange(10), [])
    orders = []
    for seed in (0, 0, 1):
        batches = list(loader(split, 4, shuffle=True, seed=seed))
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        assert all(torch.equal(i.flatten(), labels.to(torch.uint8)) for i, labels in batches)
        orders.append([int(label) for _, labels in batches for label in labels])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(10))
    assert [int(x) for _, labels in loader(split, 4, shuffle=False) for x in labels] == list(range(10))


def test_a_last_batch_of_one_is_left_out_in_training():
    split = ImageTensors(torch.zeros(9, 1, 1, 1, dtype=torch.uint8), torch.arange(9), [])
    assert [len(labels) for _, labels in loader(split, 4, shuffle=True)] == [4, 4]
    assert [len(labels) for _, labels in loader(split, 4, shuffle=False)] == [4, 4, 1]


def test_samples_are_drawn():
    """Folders are sorted by class: their first rows are one class."""
    dataset = make_dataset(30).sort("fine_label")
    assert len(set(sample(dataset, 12, seed=0)["fine_label"])) == 3
    assert sample(dataset, 12, seed=0)["fine_label"] == sample(dataset, 12, seed=0)["fine_label"]
    assert sample(dataset, None, seed=0) is dataset
    assert len(sample(dataset, 99, seed=0)) == 30


def crops(image: torch.Tensor, padding: int, flip: bool) -> list[bytes]:
    """All results that the augmentation may have for one image."""
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    height, width = image.shape[1:]
    windows = [padded[:, i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
    if flip:
        windows += [window.flip(2) for window in windows]
    return [window.contiguous().numpy().tobytes() for window in windows]


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (1, False), (2, True), (0, True)])
def test_augmentation_is_pad_crop_flip(padding, flip):
    image = torch.randint(1, 256, (3, 6, 4), dtype=torch.uint8)
    possible = crops(image, padding, flip)
    batch = PadCropFlip(padding, flip)(image.repeat(400, 1, 1, 1))
    assert batch.shape == (400, 3, 6, 4)
    seen = {one.contiguous().numpy().tobytes() for one in batch}
    assert seen <= set(possible)
    assert len(seen) == len(set(possible)), "every offset and both sides occur, each image with its own"


def test_augmentation_draws_from_the_global_generator():
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    augment = PadCropFlip(1, True)
    torch.manual_seed(3)
    first = augment(images)
    assert not torch.equal(augment(images), first)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)


def test_local_parquet_and_folders(tmp_path):
    make_dataset(30).to_parquet(tmp_path / "set" / "train.parquet")
    splits, name = load_splits(dataset_name=str(tmp_path / "set"))
    assert (len(splits["train"]), len(splits["validation"])) == (25, 5), "a split is made where there is none"
    assert name == "15 % of train"
    for split, count in (("train", 4), ("val", 2)):
        for label in "xy":
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((9, 7), 50).save(folder / f"{i}.png")
    splits, name = load_splits(train_dir=str(tmp_path / "train"), validation_dir=str(tmp_path / "val"))
    assert (len(splits["train"]), len(splits["validation"])) == (8, 4)
    assert find_columns(splits["train"].features) == ("image", "label")
    assert name == "validation"


def test_nothing_to_load():
    with pytest.raises(ValueError, match="Name the images: --dataset_name"):
        load_splits()


def test_no_training_split(tmp_path):
    make_dataset(4).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        load_splits(dataset_name=str(tmp_path))


def test_distort_moves_and_recolours_each_image_on_its_own():
    square = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    square[:, :, 12:20, 12:20] = 200
    distorted = Distort(4)(square)
    assert distorted.shape == square.shape
    assert distorted.dtype == torch.uint8
    bright = (distorted[:, 0] > 100).flatten(1)
    assert len({tuple(row.tolist()) for row in bright}) > 50, "place and form differ"
    assert 40 < bright.sum(1).min() <= bright.sum(1).max() < 110, "of 64 pixels: larger or smaller, never gone"
    assert len(distorted.amax((1, 2, 3)).unique()) > 10, "brightness differs"
    torch.manual_seed(1)
    first = Distort(4)(square)
    torch.manual_seed(1)
    assert torch.equal(Distort(4)(square), first)


def test_distort_without_deformation_crops_whole_pixels(monkeypatch):
    monkeypatch.setattr(Distort, "LARGEST_SHIFT", 0.0)
    square = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
    square[:, :, 6:10, 6:10] = 200
    assert ((Distort(2)(square)[:, 0] > 100).sum((1, 2)) == 16).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_read_through_timms_transforms(workers):
    rows = make_dataset(size=(20, 30))
    cfg = {**SIZE, "crop_pct": 0.875}
    files, held = ImageFiles.of(rows, cfg), ImageTensors.decode(rows, cfg)
    batches = list(loader(files, 5, shuffle=False, num_workers=workers))
    assert torch.equal(torch.cat([images for images, _ in batches]), held.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), held.labels)
    assert torch.equal(files.first(3), held.first(3))
    assert len(files) == 12
    assert files.label_names == ["a", "b", "c"]


def test_training_files_are_random_crops():
    files = ImageFiles.of(make_dataset(size=(20, 30)), SIZE, training=True, flip=True, color_jitter=[0.1, 0.1, 0.1])
    image, label = files[0]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert not torch.equal(image, files[0][0])
    assert label == 0


def test_several_splits_to_train_on(tmp_path):
    parts = {"train": make_dataset(6), "extra": make_dataset(4), "test": make_dataset(3)}
    for name, part in parts.items():
        part.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    files = {name: str(tmp_path / f"{name}-*.parquet") for name in parts}
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: {Path(path).name}\n" for name, path in files.items())
        + "---\n"
    )
    splits, tested = load_splits(str(tmp_path), train_split_name="train+extra")
    assert (len(splits["train"]), len(splits["validation"]), tested) == (10, 3, "test")
    with pytest.raises(ValueError, match=r"no split 'more', only \['extra', 'test', 'train'\]"):
        load_splits(str(tmp_path), train_split_name="train+more")
