"""Files of a saved model: written to a temporary directory, checked, linked by a digest, and moved when complete."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from ..files.disk import settle, to_disk
from ..files.strict_loading import location_in
from ..files.weight_checks import WEIGHTS, Layout, check_file, check_precision, digest, layout_of, weight_files
from ..models.stored import closed_in, read_config, stored_layout, without_closed
from ..surgery.branches import evaluating, probe_batch
from ..surgery.tracing import tensors

__all__ = ["TransformersFiles", "bind_weights", "check_outputs", "check_rebuilt", "staged"]

CONFIG = "config.json"
_SIDE_HEAD = "side_head."
_WRAPPER = "timm_model."


@contextmanager
def staged(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary directory for a model's files. They are moved to the real directory when all of them are complete.

    All files get the default permissions of new files, and are on the disk before they are moved. Remains of killed
    processes are deleted.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _clear_unfinished(directory)
    with tempfile.TemporaryDirectory(prefix=f".saving-{os.getpid()}-", dir=directory) as name:
        staging = Path(name)
        yield staging
        written = settle(staging)
        # The two files that must match are renamed last, one directly after the other.
        pair = (WEIGHTS, CONFIG)
        for path in sorted(written, key=lambda path: (str(path) in pair, path)):
            (directory / path).parent.mkdir(exist_ok=True)
            os.replace(staging / path, directory / path)
        to_disk(directory)


def _clear_unfinished(directory: Path) -> None:
    for left in directory.glob(".saving-*"):
        number = left.name.split("-")[1]
        if not (number.isdecimal() and _runs(int(number))):
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name == "nt":
        return True  # on Windows a check would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def bind_weights(directory: Path) -> None:
    """Write the digest of the weights to ``config.json``, so that a mismatch of the two files is found."""
    if not (directory / WEIGHTS).is_file():  # saved in parts
        return
    path = directory / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["weights_sha256"] = digest(directory / WEIGHTS)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def check_rebuilt(model_class: Any, directory: Path) -> None:
    """Build the network of ``config.json`` on the meta device and compare it with the saved weights.

    Args:
        model_class: Transformers class of the saved model.
        directory: Directory of both files.

    Raises:
        ValueError: The configuration describes another network. The message names the difference.
    """
    config = model_class.config_class.from_dict(json.loads((directory / CONFIG).read_text(encoding="utf-8")))
    with torch.device("meta"):
        rebuilt = model_class(config)

    def timms(found: dict[str, Layout]) -> dict[str, Layout]:
        """The layout with timm's names, because transformers may have saved its own names."""
        return {name.removeprefix(_WRAPPER): layout for name, layout in without_closed(found).items()}

    try:
        check_file(weight_files(directory), timms(layout_of(rebuilt.state_dict())), adapt=timms)
    except ValueError as error:
        raise ValueError(
            "This model cannot be saved: its modules were changed, so its name and keyword arguments do not describe "
            f"it. {error}"
        ) from None


def check_outputs(model: Any, directory: Path) -> None:
    """Load a saved network and compare its outputs with those of the original, on two random images.

    Names and shapes alone cannot distinguish, for example, a ReLU from a GELU.

    Args:
        model: The transformers model that was saved.
        directory: Directory of the saved model.

    Raises:
        ValueError: The outputs of the loaded network differ.
    """
    loaded = type(model).from_pretrained(directory).timm_model
    batch = probe_batch(model.timm_model)
    with evaluating(model), evaluating(loaded):
        live, stored = tensors(model.timm_model(batch)), tensors(loaded(batch.cpu()))
    # Other devices and memory formats cause rounding differences; other modules cause larger ones.
    is_exact = batch.device.type == "cpu" and batch.dtype in (torch.float32, torch.float64)
    tolerance = 1e-3 if is_exact else 5e-2
    for one, other in zip(live, stored, strict=True):
        one, other = one.float().cpu(), other.float()
        scale = one.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=0.0, atol=tolerance * max(scale, 1e-6), equal_nan=True):
            raise ValueError(
                "This model cannot be saved: its modules were changed, so the network rebuilt from its name and "
                "keyword arguments has other outputs. Create the model with arguments that describe the change."
            )


class TransformersFiles(NamedTuple):
    """The files that ``from_pretrained`` reads.

    Attributes:
        config: Content of ``config.json``, checked.
        weights: Paths of the safetensors files; empty if only transformers can find them.
        described: Configuration of the network to build, which the caller may have passed.
        name: First argument of ``from_pretrained``.
    """

    config: dict[str, Any]
    weights: list[Path]
    described: Any
    name: Any

    @classmethod
    def of(cls, config_class: Any, name: Any, kwargs: dict[str, Any]) -> TransformersFiles | None:
        """Find the files in a directory or on the Hub; None if there is no configuration to check.

        Args:
            config_class: Class of the configuration.
            name: First argument of ``from_pretrained``.
            kwargs: Keyword arguments of ``from_pretrained``."""
        where = location_in(kwargs)
        path = cached_file(name, CONFIG, _raise_exceptions_for_missing_entries=False, **where)
        if path is None:
            return None
        config = read_config(path)
        given = kwargs.get("config")
        described = given if isinstance(given, config_class) else config_class.from_dict(dict(config))
        root = Path(name) / (kwargs.get("subfolder") or "")
        if root.is_dir():
            weights = weight_files(root)
        else:
            found = cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False, **where)
            weights = [] if found is None else [Path(found)]
        return cls(config, weights, described, name)

    @property
    def num_classes(self) -> int:
        """Number of classes of the stored network; 0 without a classifier."""
        return self.config.get("num_classes") or 0

    @property
    def closed(self) -> list[str]:
        """Slots of the gates that are closed in the stored network."""
        noted = [slot for path in self.weights for slot in closed_in(_names(path))]
        return sorted({*noted, *(self.described.model_args.get("closed") or ())})

    def with_open_gates(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained`` that build the network with open gates.

        transformers expects every entry of the network's state dict in the file, and closed gates have an entry.

        Args:
            kwargs: Keyword arguments of the caller.
        """
        if not self.described.model_args.get("closed"):
            return kwargs
        kwargs = dict(kwargs)
        config = copy.deepcopy(kwargs.pop("config", None))
        if config is None:
            where = location_in(kwargs)
            config, rest = type(self.described).from_pretrained(self.name, return_unused_kwargs=True, **kwargs)
            kwargs = {**rest, **where}
        config.model_args = {key: value for key, value in config.model_args.items() if key != "closed"}
        return {**kwargs, "config": config}

    @property
    def asks_for_side_head(self) -> bool:
        """Whether ``config.json``, not the caller, requests a side head."""
        stored = self.config.get("side_loss_weight")
        return bool(stored) and self.described.side_loss_weight == stored

    def check(self, *, replaces_classifier: bool) -> None:
        """Compare the weights with the network that the configuration describes.

        Args:
            replaces_classifier: Whether the stored classifier may be missing or differ.

        Raises:
            ValueError: The weights do not fit. The message names the tensor.
        """
        if not self.weights:
            return
        expected, classifier, may_lack = stored_layout(
            self.described.architecture, self.described.model_args, self.num_classes
        )

        def adapt(found: dict[str, Layout]) -> dict[str, Layout]:
            plain = {name.removeprefix(_WRAPPER): layout for name, layout in without_closed(found).items()}
            if len(plain) < len(without_closed(found)):
                raise ValueError(f"{WEIGHTS} contains a tensor twice, with and without the prefix {_WRAPPER!r}.")
            return {name: layout for name, layout in plain.items() if not name.startswith(_SIDE_HEAD)}

        check_file(
            self.weights,
            expected,
            may_lack=may_lack,
            may_differ=classifier if replaces_classifier else (),
            adapt=adapt,
            sha256=self.config.get("weights_sha256"),
        )
        check_precision(self.config.get("dtype") or self.config.get("torch_dtype"), self.weights)


def _names(path: Path) -> dict[str, None]:
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys())
