"""Which process sees which images in which order: a function of seed, epoch and rank, for every kind of split."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import datasets
import pytest
import torch
from conftest import encoded, make_dataset, mostly_slow

from timm_eps.training.data import (
    ImageFiles,
    ImageReader,
    ImageStream,
    ImageTensors,
    TrainingBatches,
    evaluation_batches,
    sample,
)

SIZE = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0}
EVALUATION = ImageReader.of(SIZE)
TRAINING = ImageReader.of(SIZE, training=True, flip=True, color_jitter=[0.2, 0.2, 0.2])
ALL = (ImageTensors, ImageFiles, ImageStream)


def numbered(count: int, broken: Iterable[int] = (), size: tuple[int, int] = (12, 9)) -> datasets.Dataset:
    """Images with unique labels: a label is the number of its image. Some images are corrupt."""
    whole = make_dataset(count, size, "image", "label", classes=tuple(map(str, range(count))))
    cells = [encoded(picture) for picture in whole["image"]]
    for i in broken:
        cells[i] = {"bytes": f"no picture {i}".encode(), "path": None}
    return datasets.Dataset.from_dict({"image": cells, "label": list(range(count))}, whole.features)


def made(kind: type, rows: datasets.Dataset, read=EVALUATION, length: int | None = None, shards: int = 1):
    if kind is ImageTensors:
        return ImageTensors.decode(rows, SIZE)
    if kind is ImageFiles:
        return ImageFiles.of(rows, read)
    return ImageStream.of(rows.to_iterable_dataset(num_shards=shards), read, length=length)


def plain(count: int) -> ImageTensors:
    """Images without pixels. The label of an image is its number."""
    return ImageTensors(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count), [])


def labels_of(batches: Iterable) -> list[list[int]]:
    return [labels.tolist() for _, labels, _ in batches]


def flat(lists: Iterable[Iterable[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def assert_same(some: Iterable, others: Iterable) -> None:
    """Images, labels and names of corrupt images are equal bit for bit."""
    for (images, labels, names), (images2, labels2, names2) in zip(list(some), list(others), strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)
        assert names == names2


# ------------------------------------------------------------------------------------------------ sizes and ranks

COUNTS = list(itertools.product([*range(1, 14), 16, 17, 24, 25, 31], [1, 2, 3, 4, 8], [1, 2, 3, 4]))


def test_every_image_at_most_once_and_all_processes_alike():
    """At most one image per process is left out, and a last batch of one image per process."""
    for count, size, processes in COUNTS:
        if count < processes:
            continue
        ranks = [TrainingBatches(plain(count), size, 7, rank, processes) for rank in range(processes)]
        epochs = [labels_of(batches.epoch(2)) for batches in ranks]
        for batches, epoch in zip(ranks, epochs, strict=True):
            assert [len(labels) for labels in epoch] == batches.sizes == ranks[0].sizes
            assert len(batches) == len(batches.epoch(2)) == len(epoch)
        seen = flat(flat(epochs))
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(range(count))
        sizes, left = ranks[0].sizes, count - len(seen)
        assert set(sizes[:-1]) <= {size}
        assert 1 <= sizes[-1] <= size
        assert sizes[-1] > 1 or size == 1 or len(sizes) == 1
        last_of_one = processes <= left < 2 * processes and size > 1 and set(sizes) == {size}
        assert left < processes or last_of_one, (count, size, processes)


def test_one_process_leaves_out_only_a_last_batch_of_one():
    """Batch norm cannot use a batch of one image. A data set of one image keeps it."""
    for count, size, _ in COUNTS:
        sizes = [len(chunk) for chunk in torch.arange(count).split(size)]
        if count > size and count % size == 1:
            sizes.pop()
        assert TrainingBatches(plain(count), size).sizes == sizes


@pytest.mark.parametrize("kind", [ImageTensors, ImageFiles])
def test_more_processes_continue_the_batches_of_one(kind):
    """Equal image by image, also with random crops, as long as the batches are full."""
    split = made(kind, numbered(26), TRAINING)
    for processes in (2, 3):
        alone = list(TrainingBatches(split, 4 * processes, 3).epoch(1))
        parts = [TrainingBatches(split, 4, 3, rank, processes).epoch(1) for rank in range(processes)]
        together = [
            (torch.cat([images for images, _, _ in batch]), torch.cat([labels for _, labels, _ in batch]), [])
            for batch in zip(*parts, strict=True)
        ]
        whole = 26 // (4 * processes)
        assert_same(together[:whole], alone[:whole])


def test_others_are_left_out_in_each_epoch():
    batches = TrainingBatches(plain(9), 4)
    left = [set(range(9)) - set(flat(labels_of(batches.epoch(epoch)))) for epoch in range(30)]
    assert all(len(one) == 1 for one in left)
    assert len(set(flat(left))) > 4


@pytest.mark.parametrize(
    ("split", "processes", "message"),
    [
        (plain(0), 1, "0 training images are not enough for 1 processes"),
        (plain(3), 4, "3 training images are not enough for 4 processes"),
        (made(ImageFiles, numbered(1)), 2, "1 training images are not enough for 2 processes"),
        (made(ImageStream, numbered(9), length=1), 2, "1 training images are not enough for 2 processes"),
        (
            made(ImageStream, numbered(9)),
            1,
            "number of images of the stream is unknown; set the images per epoch with --max_train",
        ),
    ],
)
def test_too_few_images(split, processes, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(split, 4, processes=processes)


# ------------------------------------------------------------------------------------------------ order and resuming


@pytest.mark.parametrize("kind", ALL)
def test_pairs_are_kept_and_the_order_is_the_seeds(kind):
    rows = numbered(10)
    held = made(ImageTensors, rows)
    orders = {}
    for seed, epoch in itertools.product((0, 1, 2), (0, 1, 2)):
        batches = TrainingBatches(made(kind, rows, length=10), 4, seed)
        for images, labels, names in batches.epoch(epoch):
            assert torch.equal(images, held.images[labels])
            assert images.dtype == torch.uint8
            assert names == []
        orders[seed, epoch] = flat(labels_of(batches.epoch(epoch)))
        assert orders[seed, epoch] == flat(labels_of(TrainingBatches(batches.split, 4, seed).epoch(epoch)))
        assert sorted(orders[seed, epoch]) == list(range(10))
    assert len({tuple(order) for order in orders.values()}) == 9, "others for each seed and each epoch"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ALL)
def test_an_epoch_goes_on_at_any_batch(kind, workers):
    """Equal bit for bit to an uninterrupted epoch, with crops and mirror images, and in another process."""
    split = made(kind, numbered(15, broken=() if kind is ImageTensors else [3]), TRAINING, length=15, shards=2)
    for rank, processes in ((0, 1), (1, 2)):
        whole = list(TrainingBatches(split, 3, 5, rank, processes).epoch(4))
        batches = TrainingBatches(split, 3, 5, rank, processes, num_workers=workers)
        for skip in range(len(whole) + 1) if not workers else (0, 2):
            rest = batches.epoch(4, skip)
            assert len(rest) == len(whole) - skip
            assert_same(rest, whole[skip:])


@pytest.mark.parametrize("kind", [ImageTensors, ImageFiles])
@pytest.mark.parametrize("per_epoch", [1, 2, 3, 7])
def test_epochs_of_so_many_batches_go_on_where_the_one_before_ended(kind, per_epoch):
    split = made(kind, numbered(10), TRAINING)
    for rank, processes in ((0, 1), (1, 2)):
        passes = TrainingBatches(split, 4, 5, rank, processes)
        parts = TrainingBatches(split, 4, 5, rank, processes, per_epoch=per_epoch)
        assert len(parts) == len(parts.epoch(0)) == per_epoch
        count = 12 // per_epoch
        expected = flat(list(passes.epoch(number)) for number in range(12 // len(passes)))
        assert_same(flat(list(parts.epoch(number)) for number in range(count)), expected[: count * per_epoch])
        assert_same(parts.epoch(count - 1, per_epoch - 1), expected[count * per_epoch - 1 : count * per_epoch])


@pytest.mark.parametrize("kind", [ImageFiles, ImageStream])
def test_crops_differ_between_epochs_images_and_runs(kind):
    rows = datasets.concatenate_datasets([numbered(1)] * 8)
    epochs = [
        next(iter(TrainingBatches(made(kind, rows, TRAINING, length=8), 8, seed).epoch(epoch)))[0]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({image.numpy().tobytes() for images in epochs for image in images}) == 24


def test_processes_crop_a_stream_each_in_its_own_way():
    rows = datasets.concatenate_datasets([numbered(1)] * 8)
    split = made(ImageStream, rows, TRAINING, length=8)
    images = flat(next(iter(TrainingBatches(split, 4, 0, rank, 2).epoch(0)))[0] for rank in (0, 1))
    assert len({image.numpy().tobytes() for image in images}) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ALL)
def test_iterating_leaves_random_numbers_alone(kind, workers):
    """The random numbers of a model do not depend on how its images are read."""
    split, tested = made(kind, numbered(8), TRAINING, length=8), made(kind, numbered(8))
    before = torch.get_rng_state().tolist(), random.getstate()
    assert len(list(TrainingBatches(split, 4, num_workers=workers).epoch(0))) == 2
    assert len(list(evaluation_batches(tested, 4, num_workers=workers))) == 2
    assert (torch.get_rng_state().tolist(), random.getstate()) == before


@pytest.mark.parametrize("kind", ALL)
def test_an_epoch_may_be_iterated_again(kind):
    split = made(kind, numbered(8), TRAINING, length=8)
    epoch = TrainingBatches(split, 4).epoch(0)
    assert_same(epoch, list(epoch))


# ------------------------------------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ImageFiles, ImageStream])
def test_another_image_of_the_batch_takes_the_place_of_one_that_cannot_be_read(kind, workers):
    rows = numbered(12, broken=[2, 7])
    held = made(ImageTensors, rows)
    pixels = dict(zip(held.labels.tolist(), held.images, strict=True))
    whole = labels_of(TrainingBatches(plain(12), 4, 1).epoch(3)) if kind is ImageFiles else None
    found = []
    batches = TrainingBatches(made(kind, rows, length=12), 4, 1, num_workers=workers)
    for index, (images, labels, names) in enumerate(batches.epoch(3)):
        assert len(labels) == 4
        assert len(set(labels.tolist())) == 4 - len(names)
        assert all(torch.equal(image, pixels[int(label)]) for image, label in zip(images, labels, strict=True))
        if whole:
            assert set(labels.tolist()) == set(whole[index]) - {2, 7}
        found += names
    assert len(set(found)) == len(found) == 2
    assert kind is ImageStream or set(found) == {"row 2", "row 7"}


@pytest.mark.parametrize("workers", mostly_slow([0, 1], 0))
@pytest.mark.parametrize("kind", [ImageFiles, ImageStream])
def test_a_batch_of_which_nothing_can_be_read(kind, workers):
    split = made(kind, numbered(4, broken=range(4)), length=4)
    with pytest.raises(ValueError, match=r"None of 4 images in a row can be read; the first is (row|image)"):
        list(TrainingBatches(split, 4, num_workers=workers).epoch(0))


@pytest.mark.parametrize("kind", [ImageFiles, ImageStream])
def test_an_image_has_one_name_in_all_epochs_and_turns(kind):
    """A corrupt image is counted once."""
    batches = TrainingBatches(made(kind, numbered(6, broken=[1]), length=12), 6)
    names = flat(names for epoch in range(4) for _, _, names in batches.epoch(epoch))
    assert len(names) >= 4
    assert len(set(names)) == 1


@pytest.mark.parametrize("kind", [ImageFiles, ImageStream])
def test_no_two_images_have_one_name_though_two_processes_read_them(kind):
    split = made(kind, numbered(8, broken=[0, 1, 2, 5]))
    names = [
        name
        for rank in (0, 1)
        for _, _, found in evaluation_batches(split, 2, rank=rank, processes=2)
        for name in found
    ]
    assert len(names) == len(set(names)) == 4


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize(
    ("kind", "shards"), [(ImageTensors, 1), (ImageFiles, 1), *((ImageStream, shards) for shards in (1, 2, 3))]
)
def test_each_image_is_tested_on_once(kind, shards):
    """By any number of processes. Corrupt images are left out."""
    rows = numbered(11, broken=[4])
    split, held = made(kind, rows, shards=shards), made(ImageTensors, rows)
    place = {label: number for number, label in enumerate(held.labels.tolist())}
    for processes, size in itertools.product((1, 2, 3, 4), (1, 3, 50)):
        seen, names = [], []
        for rank in range(processes):
            for images, labels, unreadable in evaluation_batches(split, size, rank=rank, processes=processes):
                assert len(images) == len(labels) == min(size, len(labels) + len(unreadable)) - len(unreadable)
                assert all(
                    torch.equal(image, held.images[place[int(label)]])
                    for image, label in zip(images, labels, strict=True)
                )
                seen += labels.tolist()
                names += unreadable
        assert sorted(seen) == [n for n in range(11) if n != 4]
        assert len(names) == (kind is not ImageTensors)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_one_process_tests_in_order(kind, workers):
    rows = numbered(12, size=(20, 30))
    held, split = made(ImageTensors, rows), made(kind, rows)
    batches = list(evaluation_batches(split, 5, num_workers=workers))
    assert [len(labels) for _, labels, _ in batches] == [5, 5, 2], "no batch is left out"
    assert torch.equal(torch.cat([images for images, _, _ in batches]), held.images)
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == list(range(12))


def test_the_number_of_batches_is_known_of_tables_only():
    for processes, rank in ((1, 0), (3, 1), (3, 2)):
        batches = evaluation_batches(plain(11), 3, rank=rank, processes=processes)
        assert len(batches) == len(list(batches))
    with pytest.raises(TypeError, match="A stream has no length"):
        len(evaluation_batches(made(ImageStream, numbered(2)), 3))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [ImageFiles, ImageStream])
def test_a_batch_to_test_on_may_be_empty(kind, workers):
    split = made(kind, numbered(5, broken=[2, 3]))
    batches = list(evaluation_batches(split, 2, num_workers=workers))
    assert labels_of(batches) == [[0, 1], [], [4]]
    assert [len(names) for _, _, names in batches] == [0, 2, 0]
    assert [len(images) for images, _, _ in batches] == [2, 0, 1]


def test_more_processes_than_images_to_test_on():
    for kind in ALL:
        seen = [
            flat(labels_of(evaluation_batches(made(kind, numbered(2)), 4, rank=rank, processes=3))) for rank in range(3)
        ]
        assert seen == [[0], [1], []]


@pytest.mark.parametrize("kind", ALL)
def test_images_to_test_on_may_be_iterated_again(kind):
    batches = evaluation_batches(made(kind, numbered(5)), 2)
    assert labels_of(batches) == labels_of(batches) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("sizes", [(20,), (3, 17), (17, 3), (1, 1, 18)])
def test_the_beginning_of_a_stream_is_the_same_for_any_number_of_processes(sizes, tmp_path):
    """--max_eval_samples takes the first images, in any number of files."""
    rows, files, start = numbered(20), [], 0
    for number, size in enumerate(sizes):
        files.append(str(tmp_path / f"{number}.parquet"))
        rows.select(range(start, start + size)).to_parquet(files[-1])
        start += size
    stream = datasets.load_dataset("parquet", data_files={"test": files}, streaming=True)["test"]
    split = ImageStream.of(sample(stream, 10, seed=0), EVALUATION)
    for processes in (1, 2, 3):
        seen = flat(
            flat(labels_of(evaluation_batches(split, 4, rank=rank, processes=processes))) for rank in range(processes)
        )
        assert sorted(seen) == list(range(10)), processes


# ------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize(("shards", "processes"), [(1, 2), (1, 3), (2, 2), (4, 2), (3, 2), (2, 4)])
def test_processes_share_a_stream(shards, processes):
    """Each image reaches one process in every epoch, in any number of files."""
    split = made(ImageStream, numbered(12), length=12, shards=shards)
    for epoch in range(4):
        ranks = [TrainingBatches(split, 12 // processes, 0, rank, processes) for rank in range(processes)]
        assert sorted(flat(flat(labels_of(batches.epoch(epoch))) for batches in ranks)) == list(range(12))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_short_stream_goes_round_again(processes):
    """Each turn of all processes covers the whole stream in a new order."""
    split = made(ImageStream, numbered(10), length=40)
    own = 10 // processes
    ranks = [TrainingBatches(split, 4, 3, rank, processes) for rank in range(processes)]
    turns = []
    for epoch in (0, 1, 2):
        seen = [flat(labels_of(batches.epoch(epoch))) for batches in ranks]
        assert [len(one) for one in seen] == [40 // processes] * processes
        turns += [tuple(flat(one[i : i + own] for one in seen)) for i in range(0, 4 * own, own)]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert len(set(turns)) == 12


def test_a_long_stream_gives_an_epoch_of_its_length():
    batches = TrainingBatches(made(ImageStream, numbered(30), length=10), 4, 0)
    epochs = [flat(labels_of(batches.epoch(epoch))) for epoch in range(3)]
    assert [len(set(seen)) for seen in epochs] == [10, 10, 10]
    assert len(set(flat(epochs))) > 15, "others in each"


def test_a_small_buffer_keeps_what_comes_late_late():
    batches = TrainingBatches(made(ImageStream, numbered(30), length=30), 30, buffer_size=3)
    [order] = labels_of(batches.epoch(0))
    assert sorted(order) == list(range(30)) != order
    assert all(label <= place + 3 for place, label in enumerate(order))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_without_images_of_a_stream(workers):
    """The process raises an error instead of waiting forever, although the stream's stated length suffices."""
    split = made(ImageStream, numbered(2), length=40)
    batches = TrainingBatches(split, 4, 0, rank=2, processes=3, num_workers=workers)
    with pytest.raises(ValueError, match="The stream has no images for process 2 of 3"):
        list(batches.epoch(0))


def test_a_process_with_an_empty_part_of_a_stream():
    """Parts are assigned anew in each epoch. The process with the empty part raises an error."""

    def rows_of(parts: list[list[int]]) -> Iterable[dict]:
        for part in parts:
            for number in part:
                yield numbered(2, [])[number]

    features = numbered(2).features
    stream = datasets.IterableDataset.from_generator(rows_of, features, gen_kwargs={"parts": [[0, 1], []]})
    split = ImageStream.of(stream, EVALUATION, length=4)
    for epoch in range(3):
        outcomes = []
        for rank in (0, 1):
            try:
                outcomes.append(sorted(flat(labels_of(TrainingBatches(split, 2, 0, rank, 2).epoch(epoch)))))
            except ValueError as error:
                outcomes.append(str(error).startswith(f"The stream has no images for process {rank} of 2"))
        assert outcomes in ([True, [0, 1]], [[0, 1], True])


def test_a_stream_with_a_label_of_no_class():
    rows = numbered(3)
    rows = datasets.Dataset.from_dict({"image": rows["image"], "label": [0, None, 1]}, rows.features)
    split = made(ImageStream, rows, length=3)
    for use in (TrainingBatches(split, 3).epoch(0), evaluation_batches(split, 3)):
        with pytest.raises(ValueError, match="'label' contains labels from -1 to -1, but its classes are 0 to 2"):
            list(use)
