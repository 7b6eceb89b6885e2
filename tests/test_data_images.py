"""Pictures of any kind become tensors, equal from memory, from a table and from a stream; and corrupt pictures."""

from __future__ import annotations

import io
import os
import random
import re

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import encoded, make_dataset
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from timm_eps.training.data import ImageFiles, ImageReader, ImageStream, ImageTensors, open_image, pictures

SIZE = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0}
ALL = (ImageTensors, ImageFiles, ImageStream)


def noise(*shape: int, most: int = 255, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, most + 1, shape, dtype=dtype)


def table(*cells: dict | str | None) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": list(cells), "label": [i % 2 for i in range(len(cells))]}, features)


def made(kind: type, rows: datasets.Dataset, cfg: dict | None = None) -> ImageTensors | ImageFiles | ImageStream:
    """An evaluation split of one of the three kinds."""
    if kind is ImageTensors:
        return ImageTensors.decode(rows, cfg or SIZE)
    return kind.of(rows if kind is ImageFiles else rows.to_iterable_dataset(), ImageReader.of(cfg or SIZE))


def evaluated(picture: Image.Image, cfg: dict) -> Tensor:
    """The picture as preprocessed by timm, and so by an image processor or a pipeline."""
    config = timm.data.resolve_data_config(pretrained_cfg=cfg)
    return timm.data.create_transform(**config, normalize=False)(picture.convert("RGB"))


def rgb(*channels: np.ndarray) -> np.ndarray:
    return np.stack(channels if len(channels) == 3 else channels * 3, axis=-1)


def cmyk_jpeg() -> tuple[dict, np.ndarray]:
    cell = encoded(Image.fromarray(noise(8, 6, 4), "CMYK"), "JPEG", quality=95)
    return cell, np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))


def transparent_palette() -> tuple[dict, np.ndarray]:
    picture = Image.fromarray(noise(8, 6, 3)).quantize(16)
    return encoded(picture, transparency=bytes(range(0, 256, 16))), np.asarray(picture.convert("RGB"))


def rotated(orientation: int) -> tuple[dict, np.ndarray]:
    """A picture from a rotated camera: the file's metadata stores the rotation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    cell = encoded(Image.fromarray(noise(8, 6, 3)), exif=exif)
    return cell, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(cell["bytes"]))))


def of_16_bits(values: np.ndarray, kind: str = "PNG") -> dict:
    return encoded(Image.fromarray(values), kind)


GREY, RGB, ALPHA = noise(8, 6), noise(8, 6, 3), noise(6, 8)[:, :6].repeat(2, 0)[:8]
WIDE = noise(8, 6, most=65535, dtype=np.uint16)
# A value of the table, and the RGB pixels that it stands for.
KINDS = {
    "grey": (encoded(Image.fromarray(GREY)), rgb(GREY)),
    "grey with alpha": (encoded(Image.merge("LA", [Image.fromarray(x) for x in (GREY, ALPHA)])), rgb(GREY)),
    "grey with one transparent value": (encoded(Image.fromarray(GREY), transparency=int(GREY[0, 0])), rgb(GREY)),
    "rgb": (encoded(Image.fromarray(RGB)), RGB),
    "rgb with alpha": (encoded(Image.fromarray(np.dstack([RGB, ALPHA]), "RGBA")), RGB),
    "rgb with one transparent colour": (encoded(Image.fromarray(RGB), transparency=tuple(map(int, RGB[0, 0]))), RGB),
    "palette": (
        encoded(Image.fromarray(RGB).quantize(16)),
        np.asarray(Image.fromarray(RGB).quantize(16).convert("RGB")),
    ),
    "palette with transparency": transparent_palette(),
    "palette with one transparent colour": (
        encoded(Image.fromarray(RGB).quantize(16), transparency=3),
        np.asarray(Image.fromarray(RGB).quantize(16).convert("RGB")),
    ),
    "cmyk jpeg": cmyk_jpeg(),
    "1 bit": (encoded(Image.fromarray(GREY > 99)), rgb(np.where(GREY > 99, 255, 0).astype(np.uint8))),
    "16 bits, multiples of 257": (of_16_bits(GREY.astype(np.uint16) * 257), rgb(GREY)),
    "16 bits": (of_16_bits(WIDE), rgb(np.rint(WIDE / 257).astype(np.uint8))),
    "16 bits, tiff": (of_16_bits(WIDE, "TIFF"), rgb(np.rint(WIDE / 257).astype(np.uint8))),
    "32 bits, tiff": (of_16_bits(WIDE.astype(np.int32), "TIFF"), rgb(np.rint(WIDE / 257).astype(np.uint8))),
    "32 bits, out of range": (
        of_16_bits(np.array([[-5, 0, 65535, 70000]], dtype=np.int32), "TIFF"),
        rgb(np.array([[0, 0, 255, 255]], dtype=np.uint8)),
    ),
    "1x1": (encoded(Image.fromarray(RGB[:1, :1])), RGB[:1, :1]),
    "1x300": (encoded(Image.fromarray(noise(1, 300, 3))), noise(1, 300, 3)),
    "300x1": (encoded(Image.fromarray(noise(300, 1, 3))), noise(300, 1, 3)),
    **{f"orientation {n}": rotated(n) for n in range(2, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_kind_of_picture(kind):
    """Equal to the pixels of the RGB picture and to timm's preprocessing, at any input size, from any source."""
    cell, pixels = KINDS[kind]
    opened = open_image(cell, "RGB")
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), pixels)
    grey = open_image(cell, "L")
    assert grey.mode == "L"
    assert np.abs(np.asarray(grey).astype(int) - np.asarray(Image.fromarray(pixels).convert("L"))).max() <= 1
    for cfg in (SIZE, {**SIZE, "input_size": (3, 10, 12), "crop_pct": 0.875}):
        expected = evaluated(Image.fromarray(pixels), cfg)
        assert expected.shape == cfg["input_size"]
        for split in ALL:
            assert torch.equal(made(split, table(cell), cfg).first(1)[0], expected)


@pytest.mark.parametrize(("value", "pixel"), [(0, 0), (257 * 77, 77), (65535, 255), (128, 0), (129, 1), (65406, 254)])
def test_16_bits_become_8_by_rounding(value, pixel):
    opened = open_image(of_16_bits(np.full((2, 3), value, np.uint16)), "RGB")
    assert np.asarray(opened).tolist() == np.full((2, 3, 3), pixel).tolist()


def test_rotation_is_that_of_the_camera():
    cell, _ = rotated(6)
    assert np.array_equal(np.asarray(open_image(cell, "RGB")), np.rot90(noise(8, 6, 3), -1))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(8, 8), (13, 21), (1, 1)])
def test_decoded_as_timm_evaluates(mode, size):
    """Equal to the pixels of an image processor or a pipeline."""
    dataset = make_dataset(3, size, mode=mode)
    split = ImageTensors.decode(dataset, SIZE)
    assert split.images.dtype == torch.uint8
    assert split.images.shape == (3, 3, 8, 8)
    for row, image in zip(dataset, split.images, strict=True):
        assert torch.equal(image, evaluated(row["img"], SIZE))
    if size == (8, 8) and mode == "RGB":
        assert torch.equal(split.images[0], pil_to_tensor(dataset[0]["img"]))
    assert split.label_names == ["a", "b", "c"]
    assert split.unreadable == []


def test_one_channel_networks_get_grey():
    split = ImageTensors.decode(make_dataset(2), {**SIZE, "input_size": (1, 8, 8)})
    assert split.images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", ALL)
def test_unlabelled_split(kind):
    dataset = make_dataset(3)
    for nothing in (-1, None):
        hidden = datasets.Dataset.from_dict({"img": dataset["img"], "fine_label": [nothing] * 3}, dataset.features)
        with pytest.raises(ValueError, match=r"'fine_label' contains labels from -1 to -1, but its classes are 0 to 2"):
            made(kind, hidden).first(1)


@pytest.mark.parametrize("kind", ALL)
def test_columns_are_found_by_type_or_by_name(kind):
    rows = make_dataset(6).add_column("other", [0] * 6, feature=datasets.ClassLabel(2))
    with pytest.raises(ValueError, match="2 columns of type ClassLabel; name one with --label_column_name"):
        made(kind, rows)
    named = {"image_column": "img", "label_column": "other"}
    if kind is ImageTensors:
        split = ImageTensors.decode(rows, SIZE, **named)
    else:
        split = kind.of(rows if kind is ImageFiles else rows.to_iterable_dataset(), ImageReader.of(SIZE), **named)
    assert split.label_names == ["0", "1"]
    assert torch.equal(split.first(6), made(kind, rows.remove_columns("other")).first(6))


def corrupt(kind: str, directory: os.PathLike) -> dict | str | None:
    large = Image.fromarray(noise(40, 40, 3))
    content = {name: encoded(large, name)["bytes"] for name in ("PNG", "JPEG")}
    if kind == "text":
        path = os.path.join(directory, "text.png")
        with open(path, "w") as file:
            file.write("no picture")
        return path
    return {
        "half a png": {"bytes": content["PNG"][: len(content["PNG"]) // 2], "path": "half.png"},
        "half a jpeg": {"bytes": content["JPEG"][: len(content["JPEG"]) // 2], "path": None},
        "no bytes": {"bytes": b"", "path": None},
        "other bytes": {"bytes": bytes(200), "path": None},
        "none": None,
        "missing": os.path.join(directory, "gone.png"),
    }[kind]


CORRUPT = ["half a png", "half a jpeg", "text", "no bytes", "other bytes", "none", "missing"]


@pytest.mark.parametrize("kind", CORRUPT)
def test_what_cannot_be_read_is_left_out_and_named(kind, tmp_path):
    bad, whole = corrupt(kind, tmp_path), make_dataset(3)["img"]
    rows = table(encoded(whole[0]), bad, encoded(whole[1]), encoded(whole[2]))
    files, stream, held = ImageFiles.of(rows, ImageReader.of(SIZE)), made(ImageStream, rows), made(ImageTensors, rows)
    path = bad if isinstance(bad, str) else (bad or {}).get("path")
    assert files[1][:2] == (None, 1)
    assert path in files[1][2] if path else files[1][2] == "row 1"
    assert held.unreadable == [files[1][2]]
    assert held.labels.tolist() == [0, 0, 1]
    assert torch.equal(held.images, torch.stack([pil_to_tensor(picture) for picture in whole]))
    for split in (files, stream, held):
        assert torch.equal(split.first(9), held.images)
    with pytest.raises(OSError, match=r"^\w+: "):
        open_image(bad, "RGB")


def test_nothing_that_can_be_read(tmp_path):
    rows = table(*(corrupt(kind, tmp_path) for kind in CORRUPT))
    with pytest.raises(ValueError, match=r"None of the 7 images can be read; the first is .*half\.png"):
        ImageTensors.decode(rows, SIZE)
    for kind in (ImageFiles, ImageStream):
        with pytest.raises(ValueError, match="No image of the split can be read"):
            made(kind, rows).first(2)
    assert pictures(rows, "image", 2) == []


def test_names_tell_images_apart():
    """A table of folders keeps only the file name of each path, and file names repeat across classes."""
    rows = table(*({"bytes": b"", "path": "0.jpg"} for _ in range(3)), encoded(Image.fromarray(RGB)))
    assert len(set(ImageTensors.decode(rows, SIZE).unreadable)) == 3


def test_a_file_is_named_by_its_path(tmp_path):
    path = str(tmp_path / "picture.png")
    Image.fromarray(RGB).save(path)
    for kind in (ImageFiles, ImageStream):
        split = made(kind, table(path))
        item = split[0] if kind is ImageFiles else split[({"bytes": None, "path": path}, 1, None)]
        assert item[2] == path


def test_images_that_memory_cannot_hold(monkeypatch):
    """A fifth of the memory stays free."""
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 5, "SC_PAGE_SIZE": 3 * 8 * 8}.__getitem__)
    assert len(ImageTensors.decode(make_dataset(4), SIZE)) == 4
    with pytest.raises(
        ValueError, match=r"^5 images of 3x8x8 need 0 GiB, but this machine has 0; --augmentation resiz"
    ):
        ImageTensors.decode(make_dataset(5), SIZE)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**23, "SC_PAGE_SIZE": 4096}.__getitem__)
    with pytest.raises(ValueError, match=re.escape("12 images of 3x40000x30000 need 40 GiB, but this machine has 32")):
        ImageTensors.decode(make_dataset(12), {**SIZE, "input_size": (3, 40000, 30000)})


TRAINING = {"training": True, "flip": True, "color_jitter": [0.2, 0.2, 0.2]}


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_the_seed_alone_decides_on_what_is_random():
    read, cell = ImageReader.of(SIZE, **TRAINING), encoded(Image.fromarray(noise(30, 20, 3)))
    images = [read(cell, seed) for seed in range(20)]
    assert len({image.numpy().tobytes() for image in images}) == 20
    torch.manual_seed(99)
    random.seed(99)
    assert all(torch.equal(read(cell, seed), image) for seed, image in enumerate(images))
    assert all(image.shape == (3, 8, 8) and image.dtype == torch.uint8 for image in images)
    assert not torch.equal(read(cell, 2**62 - 1), read(cell, 2**61))


def test_reading_leaves_other_random_numbers_alone():
    def fails(picture: Image.Image) -> Tensor:
        torch.rand(1)
        random.random()
        raise RuntimeError("no transform")

    before = random_states()
    cell = encoded(Image.fromarray(noise(30, 20, 3)))
    ImageReader.of(SIZE, **TRAINING)(cell, 3)
    ImageReader.of(SIZE, **TRAINING)(corrupt("no bytes", "."), 3)
    ImageReader.of(SIZE)(cell)
    with pytest.raises(RuntimeError, match="no transform"):
        ImageReader("RGB", fails)(cell, 3)
    assert random_states() == before


def test_flips_mirror_half_the_images_and_only_if_asked_for():
    picture = Image.fromarray(noise(8, 8, 3))
    whole = ImageReader.of(SIZE, training=True, flip=True)
    whole.transform.transforms[0].scale = whole.transform.transforms[0].ratio = (1, 1)  # no crop
    images = [whole(encoded(picture), seed) for seed in range(200)]
    mirrored = sum(torch.equal(image, pil_to_tensor(picture).flip(2)) for image in images)
    assert 70 < mirrored < 130
    assert mirrored + sum(torch.equal(image, pil_to_tensor(picture)) for image in images) == 200
    dark_left = np.zeros((30, 30, 3), np.uint8) + np.linspace(0, 255, 30).astype(np.uint8)[None, :, None]
    unflipped = ImageReader.of(SIZE, training=True)
    for seed in range(50):
        image = unflipped(encoded(Image.fromarray(dark_left)), seed).float()
        assert image[..., 0].mean() < image[..., -1].mean()


def test_training_files_are_random_crops():
    files = ImageFiles.of(make_dataset(size=(20, 30)), ImageReader.of(SIZE, **TRAINING))
    image, label, name = files[(0, 1)]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert not torch.equal(image, files[(0, 2)][0])
    assert torch.equal(image, files[(0, 1)][0])
    assert (label, name) == (0, "row 0")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("count", [1, 3, 9])
def test_pictures_are_those_of_first(kind, count, tmp_path):
    """Corrupt pictures are left out of both. The result is shorter if there are too few pictures."""
    cells = [encoded(Image.fromarray(noise(9, 7 + i, 3))) for i in range(5)]
    cells[1:1] = [corrupt("half a png", tmp_path), None]
    rows = table(*cells, corrupt("text", tmp_path))
    shown = pictures(rows.to_iterable_dataset() if kind is ImageStream else rows, "image", count)
    images = made(kind, rows).first(count)
    assert len(shown) == len(images) == min(count, 5)
    assert all(torch.equal(evaluated(picture, SIZE), image) for picture, image in zip(shown, images, strict=True))


def test_items_are_image_label_and_name():
    """A table is indexed by number, a stream is given the row. Both return the same items."""
    rows = make_dataset(6, size=(12, 9))
    held, files, stream = (made(kind, rows) for kind in ALL)
    assert (len(held), len(files)) == (6, 6)
    with pytest.raises(ValueError, match="number of images of the stream is unknown"):
        len(stream)
    for index, (cell, label) in enumerate(stream.rows(stream.source)):
        image, number, name = files[index]
        again = stream[(cell, label, None)]
        assert torch.equal(image, held.images[index])
        assert torch.equal(image, again[0])
        assert label == number == again[1] == int(held.labels[index])
        assert name == f"row {index}"
        assert "image" in again[2]


def test_memory_answers_by_the_batch():
    held = made(ImageTensors, make_dataset(6))
    images, labels, unreadable = held.__getitems__([4, 0, 4])
    assert torch.equal(images, held.images[[4, 0, 4]])
    assert labels.tolist() == [1, 0, 1]
    assert unreadable == []
