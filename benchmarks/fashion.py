"""Fashion-MNIST as a data set that ``datasets.load_dataset`` reads, for trainings from scratch.

python -m benchmarks.pretrained.prepare --architectures       # once: writes outputs/pretrained/fashion_mnist.npz
python -m benchmarks.fashion --output outputs/fashion
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from benchmarks.pretrained.prepare import DIRECTORY, IMAGES

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28


def split(images: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    """A table with the columns ``image`` and ``label``, from uint8 images (N, 28, 28) and labels (N,)."""
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    return datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in images], "label": labels}, kind)


def write(directory: Path, source: Path) -> None:
    """Write both splits as parquet files.

    Raises:
        FileNotFoundError: ``source`` does not exist.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: run python -m benchmarks.pretrained.prepare first.")
    (directory / "data").mkdir(parents=True, exist_ok=True)
    with np.load(source) as arrays:
        for name in ("train", "test"):
            rows = split(arrays[f"{name}_images"], arrays[f"{name}_labels"])
            rows.to_parquet(directory / "data" / f"{name}-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/fashion"))
    parser.add_argument("--source", type=Path, default=DIRECTORY / IMAGES)
    args = parser.parse_args()
    write(args.output, args.source)


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"fashion: error: {error}")
