"""The script on local data of every supported layout: a few images by default, 10,000 images with -m slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import draw_nothing, encoded, make_dataset, mostly_slow, write_splits
from PIL import Image
from transformers import AutoModelForImageClassification

import train_hf

ROOT = Path(__file__).parent.parent

SHORT = [
    *("--architecture", "eps_resnet20", "--num_train_epochs", "1", "--epsilon_warmup_epochs", "0"),
    *("--ramp_epochs", "1", "--patience", "1", "--keep", "3"),
]
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Use one thread, because other processes test on the other cores, and shorten the sleeps of ``datasets``.

    Speed is not tested here, and ``datasets`` sleeps for 5 seconds after each stream of parquet.
    """
    threads = torch.get_num_threads()
    monkeypatch.setattr("timm_eps.training.launching.available_cores", lambda: 1)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    monkeypatch.setattr(
        train_hf.publishing, "paired_seconds", lambda networks, images: dict.fromkeys(networks, [1.0] * 3)
    )
    draw_nothing(monkeypatch)
    yield
    torch.set_num_threads(threads)


def noise(count: int, seed: int = 0) -> Iterator[Image.Image]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def table(count: int, image: str, label: str, names: tuple[str, ...], seed: int) -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    cells = [encoded(picture, compress_level=1) for picture in noise(count, seed)]
    return datasets.Dataset.from_dict({image: cells, label: [i % len(names) for i in range(count)]}, features)


def cifar10(directory: Path, train: int, test: int) -> list[str]:
    splits = {name: table(n, "img", "label", CIFAR10, n) for name, n in {"train": train, "test": test}.items()}
    return ["--dataset_name", write_splits(directory, **splits)]


def svhn(directory: Path, train: int, test: int) -> list[str]:
    counts = {"train": train // 2, "extra": train - train // 2, "test": test}
    splits = {name: table(n, "image", "label", tuple("0123456789"), n) for name, n in counts.items()}
    return ["--dataset_name", write_splits(directory, **splits), "--train_split_name", "train+extra"]


def strings(directory: Path, train: int, test: int) -> list[str]:
    """Classes given as strings."""
    splits = {}
    for name, count in {"train": train, "test": test}.items():
        rows = table(count, "picture", "number", ("siamese", "birman", "korat"), count)
        breeds = [rows.features["number"].int2str(number) for number in rows["number"]]
        splits[name] = rows.remove_columns("number").add_column("breed", breeds)
    return ["--dataset_name", write_splits(directory, **splits), "--label_column_name", "breed"]


def photographs(directory: Path, train: int, test: int) -> list[str]:
    """JPEGs of mixed sizes by class, among them a grey and a CMYK image. The last image of each class is corrupt."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    for split, count in {"train": train, "validation": test}.items():
        for label in ("cat", "dog"):
            (directory / split / label).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(20, 65, 2)
            picture = Image.fromarray(pixels[:height, :width, :3])
            if i == 1:
                picture = picture.convert("L")
            if i == 2:
                picture = Image.fromarray(pixels[:height, :width], "CMYK")
            picture.save(directory / split / ("cat", "dog")[i % 2] / f"{i}.jpg")
    return ["--train_dir", str(directory / "train"), "--validation_dir", str(directory / "validation")]


def break_one(directory: Path, split: str = "train") -> Path:
    """Cut a file off in the middle."""
    file = directory / split / "dog" / "5.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


RESIZED = ["--augmentation", "resized_crop", "--image_size", "32"]
# The layout of the data, and further arguments.
LAYOUTS = {
    "cifar10": (cifar10, ["--flip"]),
    "svhn": (svhn, ["--augmentation", "distort"]),
    "photographs": (photographs, [*RESIZED, "--flip", "--corrupt_images", "skip"]),
    "strings": (strings, []),
    "stream, crop": (cifar10, ["--streaming", "--augmentation", "crop", "--flip"]),
    "stream, distort": (svhn, ["--streaming", "--augmentation", "distort"]),
    "stream, resized_crop": (cifar10, ["--streaming", *RESIZED, "--flip", "--color_jitter", "0.1", "0.1", "0.1"]),
    "stream of photographs": (photographs, ["--streaming", *RESIZED, "--corrupt_images", "skip"]),
}


def laid_out(layout: str, directory: Path, train: int, test: int) -> list[str]:
    make, further = LAYOUTS[layout]
    arguments = [*SHORT, *make(directory / "data", train, test), *further]
    if make is photographs:
        break_one(directory / "data")
    if "--streaming" in further:
        arguments += ["--max_train_samples", str(train)]
    return [*arguments, "--output_dir", str(directory / "out")]


def check(directory: Path, layout: str, train: int, test: int) -> None:
    """The results refer to these images, and the saved model knows the classes."""
    results = json.loads((directory / "out" / "all_results.json").read_text())
    make, further = LAYOUTS[layout]
    assert (results["train_images"], results["eval_images"]) == (train, test)
    assert results["corrupt_images"] == (make is photographs)
    assert results["eval_split"] == ("validation" if make is photographs else "test")
    assert len(results["eval_accuracy_by_epoch"]) == 1
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["arguments"].get("augmentation", "crop") == train_hf.parse_arguments(further).data.augmentation
    names = {
        cifar10: list(CIFAR10), svhn: list("0123456789"), strings: ["birman", "korat", "siamese"],
        photographs: ["cat", "dog"],
    }  # fmt: skip
    config = AutoModelForImageClassification.from_pretrained(directory / "out").config
    assert list(config.id2label.values()) == names[make]
    assert list(config.pretrained_cfg["input_size"]) == [3, 32, 32]


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, 0, 3, len(LAYOUTS) - 1))
def test_a_few_images(tmp_path, layout, capsys):
    train_hf.main([*laid_out(layout, tmp_path, 40, 20), "--per_device_train_batch_size", "16"])
    check(tmp_path, layout, 40, 20)
    said = capsys.readouterr().out
    with_corrupt = LAYOUTS[layout][0] is photographs
    assert f"Training eps_resnet20 on 40 images of {'train' if with_corrupt else 'data'} (3x32x32, " in said
    assert ("images could not be read and were left out, such as" in said) == with_corrupt


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_images(tmp_path, layout):
    """One epoch from one command: half of the images for training, half for the test."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train_hf.py")]
    done = subprocess.run(
        [*command, *laid_out(layout, tmp_path, 5000, 5000), "--num_threads", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Saved in" in done.stdout
    check(tmp_path, layout, 5000, 5000)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("further", [RESIZED, ["--image_size", "32"], [*RESIZED, "--streaming"]])
def test_a_corrupt_image_ends_the_run_unless_it_is_to_be_skipped(tmp_path, split, further):
    arguments = [*SHORT, *photographs(tmp_path / "data", 8, 8), *further, "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_train_samples", "8"] if "--streaming" in further else []
    file = break_one(tmp_path / "data", split)
    with pytest.raises(
        ValueError, match=rf"{file} \({split}\) cannot be read as an image; --corrupt_images skip leaves it out"
    ):
        train_hf.main(arguments)
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("further", mostly_slow([RESIZED, ["--image_size", "32"], [*RESIZED, "--streaming"]], 1, 2))
def test_corrupt_images_are_counted_once_each(tmp_path, further):
    """Images of both splits count once, however often they are read. Corrupt test images are no wrong answers."""
    arguments = [*SHORT, *photographs(tmp_path / "data", 12, 8), *further, "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_train_samples", "24"] if "--streaming" in further else []
    for split in ("train", "validation"):
        break_one(tmp_path / "data", split)
    results = train_hf.main([*arguments, "--corrupt_images", "skip", "--num_train_epochs", "3"])
    assert results["corrupt_images"] == 2
    assert results["eval_images"] == 7


@pytest.mark.parametrize(
    ("further", "name"),
    mostly_slow([([], "0.jpg"), (RESIZED, None), (["--streaming"], None), (["--streaming"], "0.jpg")], 1, 2),
)
def test_corrupt_images_in_a_table_are_counted_once_each(tmp_path, further, name):
    """Images without names, or with equal names."""
    whole = make_dataset(12, (32, 32), "image", "label")
    cells = [encoded(picture) for picture in whole["image"]]
    cells[3] = {"bytes": b"nothing", "path": name}
    cells[7] = {"bytes": b"no picture", "path": name}
    rows = datasets.Dataset.from_dict({"image": cells, "label": whole["label"]}, whole.features)
    arguments = [*SHORT, "--dataset_name", write_splits(tmp_path / "data", train=rows, test=whole), *further]
    arguments += ["--max_train_samples", "24"] if "--streaming" in further else []
    results = train_hf.main(
        [*arguments, "--corrupt_images", "skip", "--num_train_epochs", "2", "--output_dir", str(tmp_path / "out")]
    )
    assert results["corrupt_images"] == 2


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (
            ["--streaming"],
            "The number of images of the stream is unknown; set the images per epoch with --max_train_samples",
        ),
        (["--streaming", "--train_split_name", "train+test"], "no validation split"),
        (
            ["--streaming", "--label_column_name", "text"],
            "'text' contains string, but the classes of a stream are unknown",
        ),
        (["--label_column_name", "share"], "'share' contains .*; classes must be strings or whole numbers"),
        (["--label_column_name", "img"], "'img' is not a column of type ClassLabel"),
        (["--image_column_name", "share"], "'share' .*contains no images"),
        (["--train_split_name", "training"], r"no split 'training', only \['test', 'train'\]"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, further, message):
    rows = make_dataset(6).add_column("text", list("ababab")).add_column("share", [0.5] * 6)
    arguments = [*SHORT, "--dataset_name", write_splits(tmp_path / "data", train=rows, test=rows), *further]
    with pytest.raises(ValueError, match=message):
        train_hf.main([*arguments, "--output_dir", str(tmp_path / "out")])


def test_a_seed_gives_the_same_model_from_a_stream_and_from_files(tmp_path):
    """With any number of reader processes."""
    for layout in ("stream, resized_crop", "photographs"):
        weights = set()
        for workers in ("0", "2"):
            directory = tmp_path / layout / workers
            arguments = [*laid_out(layout, directory, 24, 8), "--dataloader_num_workers", workers]
            train_hf.main([*arguments, "--per_device_train_batch_size", "8"])
            weights.add((directory / "out/model.safetensors").read_bytes())
        assert len(weights) == 1
