"""Find, decode, order and augment images from ``datasets`` as batches of tensors."""

from .augment import Distort, Draws, Normalize, PadCropFlip, channel_mean, pixel_mean
from .batches import Images, TrainingBatches, evaluation_batches
from .images import ImageFiles, ImageReader, ImageStream, ImageTensors, open_image, pictures
from .sources import check_classes, find_columns, load_digits, load_splits, sample

__all__ = [
    "Distort",
    "Draws",
    "ImageFiles",
    "ImageReader",
    "ImageStream",
    "ImageTensors",
    "Images",
    "Normalize",
    "PadCropFlip",
    "TrainingBatches",
    "channel_mean",
    "check_classes",
    "evaluation_batches",
    "find_columns",
    "load_digits",
    "load_splits",
    "open_image",
    "pictures",
    "pixel_mean",
    "sample",
]
