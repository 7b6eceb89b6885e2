"""Sources, columns and classes of images, and clear errors for unusable data."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import encoded, make_dataset, write_splits
from PIL import Image

from timm_eps.training.data import (
    ImageFiles,
    ImageReader,
    ImageStream,
    check_classes,
    find_columns,
    load_digits,
    load_splits,
    open_image,
    sample,
)

READ = ImageReader.of({"input_size": (3, 8, 8), "crop_pct": 1.0})
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE, LABEL, NUMBER = datasets.Image(), datasets.ClassLabel(2), datasets.Value("int64")


def with_labels(values: list, kind: str | None = None) -> datasets.Dataset:
    """A table of pictures whose classes are plain values in the column ``breed``."""
    rows = make_dataset(len(values)).remove_columns("fine_label")
    return rows.add_column("breed", values, feature=datasets.Value(kind) if kind else None)


def make_folders(directory: Path, classes: str, count: int) -> str:
    for label in classes:
        (directory / label).mkdir(parents=True)
        for i in range(count):
            Image.effect_noise((9, 7), 50).save(directory / label / f"{i}.png")
    return str(directory)


def describe(directory: str, **counts: int) -> str:
    """A data card that states the number of images, as the Hub writes it."""
    splits = "".join(f"  - name: {name}\n    num_examples: {count}\n" for name, count in counts.items())
    Path(directory, "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    return directory


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
        ({"x": IMAGE, "y": LABEL}, {"label_column": "z"}, "--label_column_name 'z' is not a column of type ClassLabel"),
        ({"x": IMAGE, "y": LABEL}, {"image_column": "y"}, "--image_column_name 'y' is not a column of type Image"),
        (None, {}, "no column of type Image; name one with --image_column_name. Columns: unknown"),
    ],
)
def test_bad_columns(features, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_columns(features and datasets.Features(features), **names)


def test_named_columns_decide():
    features = datasets.Features({"x": IMAGE, "fine": LABEL, "coarse": LABEL})
    assert find_columns(features, label_column="coarse") == ("x", "coarse")


def test_splits_that_number_classes_differently():
    train, validation = (ImageFiles.of(make_dataset(6, classes=tuple(c)), READ) for c in ("abc", "acb"))
    check_classes(train, validation=train)
    with pytest.raises(ValueError, match=r"the classes \['a', 'b', 'c'\], the validation split \['a', 'c', 'b'\]"):
        check_classes(train, validation=validation)


def test_a_class_without_training_images():
    """For a table the labels are checked too; for a stream only the class names."""
    rows = make_dataset(6)
    trained = rows.filter(lambda row: row["fine_label"] != 1)
    with pytest.raises(ValueError, match="Class 'b' is in the validation split but has no training image"):
        check_classes(ImageFiles.of(trained, READ), validation=ImageFiles.of(rows, READ))
    check_classes(ImageFiles.of(trained, READ), validation=ImageFiles.of(rows, READ), all_trained=False)
    train, validation, other = (
        ImageStream.of(rows.to_iterable_dataset(), READ)
        for rows in (trained, rows, make_dataset(6, classes=("a", "c", "b")))
    )
    check_classes(train, validation=validation)
    with pytest.raises(ValueError, match="The training split has the classes"):
        check_classes(train, validation=other)


def test_samples_are_drawn():
    """Folders are sorted by class, so the first rows are all of one class."""
    dataset = make_dataset(30).sort("fine_label")
    assert len(set(sample(dataset, 12, seed=0)["fine_label"])) == 3
    assert sample(dataset, 12, seed=0)["fine_label"] == sample(dataset, 12, seed=0)["fine_label"]
    assert sample(dataset, None, seed=0) is dataset
    assert len(sample(dataset, 99, seed=0)) == 30


def test_a_sample_of_a_stream_is_its_beginning():
    rows = datasets.Dataset.from_dict({"x": list(range(9))})
    stream = rows.to_iterable_dataset()
    assert [row["x"] for row in sample(stream, 4, seed=1)] == [0, 1, 2, 3]
    assert [row["x"] for row in sample(stream, 99, seed=1)] == list(range(9))
    assert sample(stream, None, seed=0) is stream


def test_local_parquet_and_folders(tmp_path):
    make_dataset(30).to_parquet(tmp_path / "set" / "train.parquet")
    splits, name, length = load_splits(dataset_name=str(tmp_path / "set"))
    assert (len(splits["train"]), len(splits["validation"])) == (25, 5), "a split is made where there is none"
    assert (name, length) == ("15 % of train", 25)
    train, validation = make_folders(tmp_path / "train", "xy", 4), make_folders(tmp_path / "val", "xy", 2)
    splits, name, length = load_splits(train_dir=train, validation_dir=validation)
    assert (len(splits["train"]), len(splits["validation"])) == (8, 4)
    assert find_columns(splits["train"].features) == ("image", "label")
    assert (name, length) == ("validation", 8)


@pytest.mark.parametrize("column", [{}, {"label_column": "breed"}])
def test_a_split_that_is_made_depends_on_the_seed_and_keeps_the_shares(tmp_path, column):
    rows = with_labels(list("abc") * 20) if column else make_dataset(60)
    directory = write_splits(tmp_path, train=rows)
    label = column.get("label_column", "fine_label")
    drawn = []
    for seed in (0, 0, 1):
        splits, _, length = load_splits(directory, train_val_split=0.3, seed=seed, **column)
        assert (len(splits["train"]), length) == (42, 42)
        assert set(Counter(splits["validation"][label]).values()) == {6}
        pictures = {name: [np.asarray(image).tobytes() for image in rows["img"]] for name, rows in splits.items()}
        assert len({*pictures["train"], *pictures["validation"]}) == 60
        drawn.append(pictures["validation"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_nothing_to_load():
    with pytest.raises(ValueError, match="Name the images: --dataset_name"):
        load_splits()


@pytest.mark.parametrize("streaming", [False, True])
def test_no_training_split(tmp_path, streaming):
    directory = write_splits(tmp_path, test=make_dataset(4))
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        load_splits(directory, streaming=streaming)


def test_several_splits_to_train_on(tmp_path):
    directory = write_splits(tmp_path, train=make_dataset(6), extra=make_dataset(4), test=make_dataset(3))
    splits, tested, length = load_splits(directory, train_split_name="train+extra")
    assert (len(splits["train"]), len(splits["validation"]), tested, length) == (10, 3, "test", 10)
    with pytest.raises(ValueError, match=r"no split 'more', only \['extra', 'test', 'train'\]"):
        load_splits(directory, train_split_name="train+more")


@pytest.mark.parametrize(
    ("trained", "tested", "images"),
    [("train", "validation", 4), ("train+validation", "test", 3), ("test", "validation", 4)],
)
def test_no_split_is_both_trained_and_tested_on(tmp_path, trained, tested, images):
    directory = write_splits(tmp_path, train=make_dataset(6), validation=make_dataset(4), test=make_dataset(3))
    splits, name, _ = load_splits(directory, train_split_name=trained)
    assert (name, len(splits["validation"])) == (tested, images)


@pytest.mark.parametrize(
    ("columns", "classes", "config", "trained", "images"),
    [
        (("img", "label"), CIFAR10, None, {"train": 20}, 20),
        (("image", "label"), "0123456789", "cropped_digits", {"train": 20, "extra": 30}, 50),
    ],
    ids=["cifar10", "svhn"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_schemas_on_the_hub(tmp_path, columns, classes, config, trained, images, streaming):
    """CIFAR-10 has img, label, train and test; SVHN has image, label, train, test, extra, and a configuration."""
    cards = []
    for name, count in {**trained, "test": 10}.items():
        rows = make_dataset(count, (32, 32), *columns, classes=tuple(classes))
        rows.to_parquet(tmp_path / (config or "plain") / f"{name}-00000-of-00001.parquet")
        cards.append(f"  - split: {name}\n    path: {config or 'plain'}/{name}-*\n")
    head = f"configs:\n- config_name: {config or 'plain'}\n  data_files:\n"
    (tmp_path / "README.md").write_text(f"---\n{head}{''.join(cards)}---\n")
    splits, tested, length = load_splits(str(tmp_path), config, train_split_name="+".join(trained), streaming=streaming)
    assert tested == "test"
    assert length == (None if streaming else images)
    assert find_columns(splits["train"].features) == columns
    assert splits["validation"].features[columns[1]].names == list(classes)
    labels = [[row[columns[1]] for row in splits[name]] for name in ("train", "validation")]
    assert labels[0] == [i % 10 for count in trained.values() for i in range(count)]
    assert labels[1] == list(range(10))


def test_directories_of_one_name_are_not_taken_for_each_other(tmp_path):
    """``datasets`` caches a directory by its name. Each directory is read all the same."""
    head = "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"
    for number, images in enumerate((12, 6)):
        directory = Path(write_splits(tmp_path / str(number) / "pictures", train=make_dataset(images)))
        (directory / "README.md").write_text(head)
        splits, _, _ = load_splits(str(directory), train_val_split=0.5)
        assert sum(map(len, splits.values())) == images


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b", "c"], ["a", "b", "c"]),
        ([10, 2, 10, -3], ["-3", "2", "10"]),
        ([True, False, True], ["False", "True"]),
        (["é", "z", "", "Z"], ["", "Z", "z", "é"]),
    ],
)
def test_plain_values_become_classes(tmp_path, values, names):
    """Classes are numbered in the order of the values, equally in both splits."""
    rows = with_labels(values)
    directory = write_splits(tmp_path, train=rows, test=rows.select([2]))
    splits, _, _ = load_splits(directory, label_column="breed")
    for split, given in (("train", values), ("validation", values[2:3])):
        files = ImageFiles.of(splits[split], READ, label_column="breed")
        assert files.label_names == names
        assert [files.label_names[label] for label in files.labels] == [str(value) for value in given]


@pytest.mark.parametrize("kind", ["int8", "uint16", "large_string"])
def test_kinds_of_plain_values(tmp_path, kind):
    values = ["a", "b"] if kind == "large_string" else [7, 5]
    directory = write_splits(tmp_path, train=with_labels(values, kind), test=with_labels(values, kind))
    splits, _, _ = load_splits(directory, label_column="breed")
    assert splits["train"].features["breed"].names == sorted(map(str, values))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0.5, 1.0], [0.5], "--label_column_name 'breed' contains double; classes must be strings or whole numbers"),
        ([b"a", b"b"], [b"a"], "--label_column_name 'breed' contains binary; classes must be strings or whole numbers"),
        (["a", "b"], ["a", "dog"], "Class 'dog' is in the validation split but has no training image"),
        ([1, 2], [1, 3], "Class 3 is in the validation split but has no training image"),
        (["a", None, "b"], ["a"], "'breed' contains labels from -1 to 1, but its classes are 0 to 1"),
        (["a", "b"], ["a", None], "'breed' contains labels from -1 to 0, but its classes are 0 to 1"),
        ([["a"], ["b"]], [["a"]], "--label_column_name 'breed' is not a column of type ClassLabel"),
    ],
)
def test_plain_values_that_are_no_classes(tmp_path, train, test, message):
    directory = write_splits(tmp_path, train=with_labels(train), test=with_labels(test))

    def use() -> None:
        for rows in load_splits(directory, label_column="breed")[0].values():
            ImageFiles.of(rows, READ, label_column="breed")

    with pytest.raises(ValueError, match=re.escape(message).replace("double", "(double|float64)")):
        use()


def test_missing_labels_before_the_split_is_made(tmp_path):
    directory = write_splits(tmp_path, train=with_labels(["a", None, "b", "a", "b"]))
    with pytest.raises(ValueError, match="'breed' contains labels from -1 to 1, but its classes are 0 to 1"):
        load_splits(directory, label_column="breed", train_val_split=0.4)


def test_a_named_column_may_hold_files_or_paths(tmp_path):
    pictures = make_dataset(6)["img"]
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    rows = make_dataset(6).remove_columns("img")
    rows = rows.add_column("file", [path.read_bytes() for path in paths]).add_column("path", [str(p) for p in paths])
    directory = write_splits(tmp_path / "set", train=rows, test=rows)
    with pytest.raises(ValueError, match="no column of type Image"):
        find_columns(load_splits(directory)[0]["train"].features)
    for streaming in (False, True):
        for column in ("file", "path"):
            splits, _, _ = load_splits(directory, image_column=column, streaming=streaming)
            for split in splits.values():
                made = ImageStream.of(split, READ) if streaming else ImageFiles.of(split, READ)
                seen = [open_image(row[column], "RGB") for row in (made.source if streaming else made.rows)]
                assert [np.asarray(a).tobytes() for a in seen] == [np.asarray(b).tobytes() for b in pictures]


@pytest.mark.parametrize("values", [[1, 2], [0.5, 1.0], [True, False]])
def test_a_named_column_without_images(tmp_path, values):
    rows = make_dataset(2).add_column("number", values)
    directory = write_splits(tmp_path, train=rows, test=rows)
    with pytest.raises(ValueError, match=r"--image_column_name 'number' \(Value\) contains no images"):
        load_splits(directory, image_column="number")


@pytest.mark.parametrize("known", [False, True])
def test_streams_of_parquet(tmp_path, known):
    directory = write_splits(tmp_path, train=make_dataset(6), extra=make_dataset(5), test=make_dataset(3))
    if known:
        describe(directory, train=6, extra=5, test=3)
    for names, images in (("train", 6), ("train+extra", 11)):
        splits, tested, length = load_splits(directory, train_split_name=names, streaming=True)
        assert all(isinstance(split, datasets.IterableDataset) for split in splits.values())
        assert (tested, length) == ("test", images if known else None)
        assert find_columns(splits["train"].features) == ("img", "fine_label")
        assert sum(1 for _ in splits["train"]) == images
        assert sum(1 for _ in splits["validation"]) == 3


def test_a_length_that_is_known_of_one_part_only_is_not_known(tmp_path):
    directory = write_splits(tmp_path, train=make_dataset(6), extra=make_dataset(5), test=make_dataset(3))
    describe(directory, train=6, test=3)
    assert load_splits(directory, streaming=True)[2] == 6
    assert load_splits(directory, train_split_name="train+extra", streaming=True)[2] is None


def test_streams_of_folders(tmp_path):
    train, validation = make_folders(tmp_path / "train", "xy", 3), make_folders(tmp_path / "val", "xy", 1)
    splits, tested, length = load_splits(train_dir=train, validation_dir=validation, streaming=True)
    assert (tested, length) == ("validation", None)
    assert find_columns(splits["train"].features) == ("image", "label")
    assert splits["train"].features["label"].names == ["x", "y"]
    assert Counter(row["label"] for row in splits["train"]) == {0: 3, 1: 3}
    with pytest.raises(ValueError, match=r"The stream has no validation split, only \['train'\]; .*--streaming"):
        load_splits(train_dir=train, streaming=True)


def test_streams_do_not_say_which_plain_values_there_are(tmp_path):
    rows = with_labels(["a", "b"])
    directory = write_splits(tmp_path, train=rows, test=rows)
    with pytest.raises(ValueError, match="'breed' contains string, but the classes of a stream are unknown"):
        load_splits(directory, label_column="breed", streaming=True)
    with pytest.raises(ValueError, match="no column of type ClassLabel; name one with --label_column_name"):
        find_columns(load_splits(directory, streaming=True)[0]["train"].features)


def test_files_embedded_in_a_table_keep_their_pixels(tmp_path):
    """Loading does not encode the files again."""
    cell = encoded(make_dataset(1)["img"][0])
    rows = datasets.Dataset.from_dict({"img": [cell], "y": [0]}, datasets.Features({"img": IMAGE, "y": LABEL}))
    splits, _, _ = load_splits(write_splits(tmp_path, train=rows, test=rows))
    assert ImageFiles.of(splits["train"], READ).rows[0]["img"]["bytes"] == cell["bytes"]
