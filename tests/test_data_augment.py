"""Augmentation per batch, by one process or by several, and normalisation."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import make_dataset

from timm_eps.training.data import Distort, Draws, ImageTensors, Normalize, PadCropFlip, channel_mean

SIZE = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0}


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def crops(image: torch.Tensor, padding: int, flip: bool) -> list[bytes]:
    """All results that the augmentation may produce for one image."""
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


AUGMENTATIONS = {
    "crop": PadCropFlip(2, False), "crop and flip": PadCropFlip(1, True), "flip": PadCropFlip(0, True),
    "distort": Distort(4), "distort without padding": Distort(0),
}  # fmt: skip
every_augmentation = pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


@every_augmentation
def test_drawn_from_the_global_generator_unless_one_is_given(augment):
    images = noise(8, 3, 8, 8)
    torch.manual_seed(3)
    first = augment(images)
    assert not torch.equal(augment(images), first)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)
    before = torch.get_rng_state()
    assert torch.equal(augment(images, Draws(torch.Generator().manual_seed(3))), first)
    assert torch.equal(torch.get_rng_state(), before)


@every_augmentation
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_processes_augment_together_as_one_would(augment, processes, channels):
    """Over several batches, the last of which is smaller."""
    alone = Draws(torch.Generator().manual_seed(5))
    parts = [Draws(torch.Generator().manual_seed(5), rank, processes) for rank in range(processes)]
    for size in (12, 12, 6):
        images = noise(size, channels, 16, 12)
        together = [augment(part, draws) for part, draws in zip(images.chunk(processes), parts, strict=True)]
        assert torch.equal(torch.cat(together), augment(images, alone))


@every_augmentation
def test_augmentation_leaves_its_input_alone(augment):
    images = noise(8, 3, 8, 8)
    before = images.clone()
    result = augment(images)
    assert torch.equal(images, before)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)


@every_augmentation
def test_the_memory_format_of_the_input_does_not_matter(augment):
    images = noise(8, 3, 8, 12)
    pair = images, images.contiguous(memory_format=torch.channels_last)
    first, second = (augment(x, Draws(torch.Generator().manual_seed(0))) for x in pair)
    assert torch.equal(first, second)


def test_draws_are_rows_of_those_of_all_processes():
    def drawn(rank: int, processes: int, batch: int) -> list[torch.Tensor]:
        draws = Draws(torch.Generator().manual_seed(1), rank, processes)
        return [draws.integers(9, batch), draws.uniform(batch, 2, 3), draws.uniform(batch)]

    whole = drawn(0, 1, 12)
    assert [list(numbers.shape) for numbers in whole] == [[12, 1], [12, 2, 3], [12]]
    for processes in (2, 3, 4, 12):
        parts = [drawn(rank, processes, 12 // processes) for rank in range(processes)]
        for numbers, *own in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat(own), numbers)


def test_integers_are_from_zero_to_the_end():
    assert set(Draws().integers(4, 500).flatten().tolist()) == {0, 1, 2, 3}
    assert 0 <= Draws().uniform(500).min() < 0.1 < 0.9 < Draws().uniform(500).max() < 1


@pytest.mark.parametrize("flip", [False, True])
def test_crops_lie_with_the_channels_last(flip):
    """Accelerators prefer channels-last tensors, and normalisation keeps the layout."""
    cropped = PadCropFlip(2, flip)(noise(4, 3, 8, 8))
    assert cropped.is_contiguous(memory_format=torch.channels_last)
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert Normalize(cfg)(cropped).is_contiguous(memory_format=torch.channels_last)


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


def test_distort_without_deformation_crops_whole_pixels(monkeypatch):
    monkeypatch.setattr(Distort, "LARGEST_SHIFT", 0.0)
    square = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
    square[:, :, 6:10, 6:10] = 200
    assert ((Distort(2)(square)[:, 0] > 100).sum((1, 2)) == 16).all()


@pytest.mark.parametrize(("mean", "std"), [((0.3, 0.4, 0.5), (0.2, 0.5, 0.6)), ((0.0, 1.0, 0.123), (1.0, 0.01, 3.0))])
def test_normalisation_is_timms(mean, std):
    cfg = {**SIZE, "mean": mean, "std": std}
    dataset = make_dataset(8)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    images = ImageTensors.decode(dataset, cfg).images
    before = images.clone()
    normalised = Normalize(cfg)(images)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, torch.stack([transform(picture) for picture in dataset["img"]]))
    assert torch.equal(images, before)


def test_normalisation_of_floats_does_not_change_them():
    images = torch.full((1, 3, 2, 2), 7.0)
    Normalize({"mean": (0.5,) * 3, "std": (0.5,) * 3})(images)
    assert (images == 7).all()


def test_normalisation_is_not_among_the_weights():
    assert Normalize({"mean": (0.5,) * 3, "std": (0.5,) * 3}).state_dict() == {}


def test_channel_mean():
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:, 1] = 255
    images[:, 2] = 51
    assert channel_mean(images) == pytest.approx([0, 1, 0.2])
