"""The order of the images for each process. It depends only on the seed, the epoch and the rank.

A run can therefore resume at any batch, and several processes together see the same images as one process.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader

from .images import ImageFiles, ImageStream, ImageTensors, Item

__all__ = ["Batch", "TrainingBatches", "evaluation_batches"]

Images: TypeAlias = ImageTensors | ImageFiles | ImageStream
# Images uint8 (B, C, H, W), labels (B,), and the names of images that could not be read.
Batch = tuple[Tensor, Tensor, list[str]]


@dataclass
class TrainingBatches:
    """The batches of one process, epoch by epoch, from any position.

    All processes have the same number of batches, of the same sizes. Images that would make the last batch uneven are
    dropped, different ones in each epoch. A final batch with one image per process is dropped too, because batch norm
    cannot compute a variance from it. An image that cannot be read is replaced by another one of its batch.

    An epoch is one pass through the images, or ``per_epoch`` batches, which continue where the previous epoch ended.

    An epoch of a stream has ``length`` images, shuffled in a buffer and divided among the processes. At the end of its
    part, a process starts again.

    Args:
        split: Images.
        batch_size: Batch size of one process.
        seed: Seed of the order, and of random transforms of each image.
        rank: Index of this process.
        processes: Number of processes.
        num_workers: Number of worker processes that read images; 0 reads in this process. Images in memory need none.
        pin_memory: Whether to put batches in pinned memory, for asynchronous copies to an accelerator.
        buffer_size: Size of the shuffle buffer of a stream.
        per_epoch: Number of batches per epoch, if an epoch is not a pass; not for streams, which have a length.

    Raises:
        ValueError: There are not enough images for a batch in each process, or a stream has no length.
    """

    split: Images
    batch_size: int
    seed: int = 0
    rank: int = 0
    processes: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    buffer_size: int = 1000
    per_epoch: int | None = None

    def __post_init__(self) -> None:
        length = len(self.split)
        whole, rest = divmod(length, self.batch_size * self.processes)
        self.sizes = [self.batch_size] * whole
        rest //= self.processes
        if rest >= 2 or (rest and not whole):
            self.sizes.append(rest)
        if not self.sizes:
            raise ValueError(f"{length} training images are not enough for {self.processes} processes.")

    def __len__(self) -> int:
        return self.per_epoch or len(self.sizes)

    def epoch(self, number: int, skip: int = 0) -> DataLoader:
        """Batches of (images uint8 (B, C, H, W), labels (B,), names of images that could not be read).

        Args:
            number: Index of the epoch, from 0.
            skip: Number of finished batches. They are not read again.
        """
        requests = self._from_stream if isinstance(self.split, ImageStream) else self._from_table
        batches = _Requests(lambda: requests(number, skip), len(self) - skip)
        return _loader(self.split, batches, self.num_workers, self.pin_memory, _fill)

    def _from_table(self, epoch: int, skip: int) -> Iterator[list[Any]]:
        first = epoch * len(self)
        of_pass: int | None = None
        for index in range(first + skip, first + len(self)):
            number, batch = divmod(index, len(self.sizes))
            if number != of_pass:
                order, seeds, of_pass = *self._order(number), number
            start = batch * self.batch_size * self.processes + self.rank * self.sizes[batch]
            part = slice(start, start + self.sizes[batch])
            pairs = zip(order[part].tolist(), seeds[part].tolist(), strict=True)
            yield order[part].tolist() if isinstance(self.split, ImageTensors) else list(pairs)

    def _order(self, number: int) -> tuple[Tensor, Tensor]:
        """The indices of one pass through the images, and a seed for the random transforms of each image."""
        generator = torch.Generator().manual_seed(_seed(self.seed, number))
        order = torch.randperm(len(self.split), generator=generator)  # type: ignore[arg-type]
        return order, torch.randint(2**62, order.shape, generator=generator)

    def _from_stream(self, epoch: int, skip: int) -> Iterator[list[Any]]:
        seeds = random.Random(_seed(self.seed, epoch, self.rank))
        rows = ((*row, seeds.getrandbits(62)) for row in self._endless(epoch))
        for batch, size in enumerate(self.sizes):
            request = list(itertools.islice(rows, size))
            if batch >= skip:
                yield request

    def _endless(self, epoch: int) -> Iterator[tuple[Any, int]]:
        assert isinstance(self.split, ImageStream)
        shuffled = self.split.source.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        own = split_dataset_by_node(shuffled, self.rank, self.processes)
        for turn in itertools.count():
            own.set_epoch(epoch + turn * 2**20)  # an order different from all epochs
            is_empty = True
            for row in self.split.rows(own):
                is_empty = False
                yield row
            if is_empty:
                raise ValueError(f"The stream has no images for process {self.rank} of {self.processes}.")


def _seed(*numbers: int) -> int:
    """One seed from several numbers, different for different numbers."""
    return random.Random(repr(numbers)).getrandbits(62)


def evaluation_batches(
    split: Images,
    batch_size: int,
    *,
    rank: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """The evaluation images of one process. All processes together have each image once.

    Batches are like those of :class:`TrainingBatches`, but without images that cannot be read, so a batch may be empty.
    The arguments are the same.
    """
    if isinstance(split, ImageStream):
        # Row by row: parts by file would have other rows if the source is the beginning of a stream.
        def rows() -> Iterator[tuple[Any, int, None]]:
            for row in itertools.islice(split.rows(split.source), rank, None, processes):
                yield *row, None

        batches = _Requests(lambda: _batched(rows(), batch_size))
    else:
        indices = range(rank, len(split), processes)
        batches = _Requests(lambda: _batched(indices, batch_size), -(-len(indices) // batch_size))
    return _loader(split, batches, num_workers, pin_memory, _leave_out)


class _Requests:
    """A torch batch sampler, which determines the requests of a loader to the data set."""

    def __init__(self, make: Callable[[], Iterator[list[Any]]], length: int | None = None) -> None:
        self.make = make
        self.length = length

    def __iter__(self) -> Iterator[list[Any]]:
        return self.make()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("A stream has no length.")
        return self.length


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _loader(
    split: Images, batches: _Requests, num_workers: int, pin_memory: bool, collate: Callable[[Any], Batch]
) -> DataLoader:
    in_memory = isinstance(split, ImageTensors)
    return DataLoader(
        split,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=0 if in_memory else num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is if in_memory else collate,
        worker_init_fn=_ignore_interrupts,
        # Unused, but without a generator a loader would draw from torch's global one.
        generator=torch.Generator().manual_seed(0),
    )


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal also sends to workers, because the training needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Batch:
    return batch


def _leave_out(items: list[Item]) -> Batch:
    whole = [(image, label) for image, label, _ in items if image is not None]
    unreadable = [name for image, _, name in items if image is None]
    if not whole:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), unreadable
    images, labels = zip(*whole, strict=True)
    return torch.stack(images), torch.tensor(labels), unreadable


def _fill(items: list[Item]) -> Batch:
    images, labels, unreadable = _leave_out(items)
    if not len(images):
        raise ValueError(f"None of {len(items)} images in a row can be read; the first is {unreadable[0]}.")
    again = torch.arange(len(items)) % len(images)
    return images[again], labels[again], unreadable
