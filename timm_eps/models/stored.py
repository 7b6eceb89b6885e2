"""Loading of models through timm, from a directory or the Hub. Files are checked before they are used.

timm reads ``config.json``, passes its ``model_args`` to the entrypoint, and would load any weights file. The
entrypoints of this package call this module first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm.models import PretrainedCfg, load_pretrained
from torch import Tensor, nn

from ..files.config_checks import check_config, check_model_args, check_slots
from ..files.weight_checks import WEIGHTS, Layout, check_file, check_layout, check_precision, layout_of, weight_files
from ..names import base_name, is_cifar_network
from ..surgery.branches import gates

__all__ = [
    "StoredModel",
    "check_names",
    "classifier_names",
    "closed_in",
    "create_stored",
    "dense_layout",
    "network_args",
    "read_config",
    "set_closed",
    "stored_layout",
    "without_closed",
]

_CLOSED = ".closed"
_LARGE = 2**30  # bytes


def read_config(path: str | Path) -> dict[str, Any]:
    """Read and check a ``config.json``.

    Raises:
        ValueError: The file is not JSON, or :func:`check_config` rejects a field.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("config.json is not JSON.") from None
    return check_config(config, is_cifar=is_cifar_network)


def network_args(model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of the timm network, without those that this package adds."""
    return {name: value for name, value in (model_args or {}).items() if name not in ("removed", "closed")}


def dense_layout(
    architecture: str, model_args: Mapping[str, Any] | None, num_classes: int
) -> tuple[dict[str, Layout], set[str]]:
    """Layout of a network with all its branches, on the meta device, and the names of its classifiers' tensors.

    Args:
        architecture: Name of the network, as in ``config.json``.
        model_args: Arguments of the network, checked.
        num_classes: Number of classes; 0 for no classifier.

    Raises:
        ValueError: timm cannot build such a network.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(
                base_name(architecture),
                pretrained=False,
                num_classes=num_classes,
                **network_args(model_args),
            )
    except Exception as error:  # timm's families raise various errors for unknown arguments
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"model_args do not build a network {architecture[:64]!r} of timm: {reason}.") from error
    layout = layout_of(model.state_dict())
    return layout, classifier_names(architecture, layout)


def stored_layout(
    architecture: str, model_args: Mapping[str, Any] | None, num_classes: int
) -> tuple[dict[str, Layout], set[str], set[str]]:
    """Layout that stored weights should have, the names of the classifiers' tensors, and those that may be missing.

    To know the tensors of removed branches, the pruned network must be built. For a twin this takes seconds, and it
    happens anyway when the weights are loaded. Only large twins are built on the meta device first.

    Args:
        architecture: Name, as for :func:`dense_layout`.
        model_args: Arguments, as for :func:`dense_layout`, with ``removed``.
        num_classes: Number, as for :func:`dense_layout`.
    """
    expected, classifier = dense_layout(architecture, model_args, num_classes)
    if not (model_args or {}).get("removed"):
        return expected, classifier, set()
    is_small = 4 * sum(math.prod(layout.shape) for layout in expected.values()) < _LARGE
    if is_small and not is_cifar_network(architecture):
        return expected, classifier, expected.keys() - classifier
    with torch.device("meta"):
        pruned = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **(model_args or {}))
    return without_closed(layout_of(pruned.state_dict())), classifier, set()


def classifier_names(architecture: str, names: Iterable[str]) -> set[str]:
    """The names of the tensors in a network's classifiers, from the architecture's description, not from a file.

    Args:
        architecture: Name of the network, as in ``config.json``.
        names: Names in the state dict.
    """
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    named = (known.classifier if known is not None else None) or ()
    prefixes = tuple(f"{layer}." for layer in ((named,) if isinstance(named, str) else named))
    return {name for name in names if name.startswith(prefixes)} if prefixes else set()


def closed_in(names: Mapping[str, Any]) -> list[str]:
    """The slots of closed gates in stored weights."""
    return sorted(name.removesuffix(_CLOSED) for name in names if name.endswith(_CLOSED))


def set_closed(model: nn.Module, slots: Iterable[str]) -> None:
    """Close the gates of a new network that are closed in its configuration.

    Raises:
        ValueError: The network has no gate at one of the slots.
    """
    found = gates(model)
    for slot in check_slots("closed", slots):
        if slot not in found:
            raise ValueError(f"closed lists {slot[:100]!r}, where this {type(model).__name__} has no gate.")
        found[slot].closed = True


def without_closed(layout: Mapping[str, Layout]) -> dict[str, Layout]:
    """The layout of stored weights without the entries of closed gates."""
    note = Layout((), "bool")
    return {name: value for name, value in layout.items() if not (name.endswith(_CLOSED) and value == note)}


class StoredModel(NamedTuple):
    """A saved model with a configuration that timm has read.

    Attributes:
        config: Content of ``config.json``, checked.
        cfg: timm's description of the model, with the location of the weights.
        cache_dir: Cache directory for files of the Hub; None for the default.
    """

    config: dict[str, Any]
    cfg: dict[str, Any]
    cache_dir: str | Path | None

    @classmethod
    def found_by_timm(cls, pretrained_cfg: Any, cache_dir: str | Path | None) -> StoredModel | None:
        """The model of ``timm.create_model('local-dir:...')`` or ``'hf-hub:...'``; None for any other call."""
        cfg = dict(vars(pretrained_cfg)) if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
        if not isinstance(cfg, Mapping) or cfg.get("source") not in ("local-dir", "hf-hub"):
            return None
        if cfg["source"] == "local-dir":
            return cls(read_config(Path(cfg["file"]) / "config.json"), dict(cfg), cache_dir)
        return cls(read_config(_on_hub(cfg, "config.json", cache_dir)), dict(cfg), cache_dir)

    @property
    def num_classes(self) -> int:
        """Number of classes of the weights; 0 without a classifier."""
        return self.config.get("num_classes") or 0

    def weights(self, *, replaces_classifier: bool) -> dict[str, Tensor]:
        """Read the weights, after comparing them with the network of the configuration.

        Args:
            replaces_classifier: Whether the caller requests other classes, so that the stored classifier may differ.

        Raises:
            ValueError: The weights do not fit. The message names the tensor or the field.
        """
        config = self.config
        expected, classifier, may_lack = stored_layout(
            config["architecture"], config.get("model_args"), self.num_classes
        )
        is_local = self.cfg["source"] == "local-dir"
        files = weight_files(self.cfg["file"]) if is_local else [_on_hub(self.cfg, WEIGHTS, self.cache_dir)]
        check_file(
            files,
            expected,
            may_lack=may_lack,
            may_differ=classifier if replaces_classifier else (),
            adapt=without_closed,
            sha256=config.get("weights_sha256"),
        )
        check_precision(config.get("dtype") or config.get("torch_dtype"), files)
        # Weights without an entry for a gate are from a network in which it was open.
        closed = (config.get("model_args") or {}).get("closed") or ()
        tensors = {f"{slot}{_CLOSED}": torch.ones((), dtype=torch.bool) for slot in closed}
        for path in files:
            tensors |= load_file(path)
        return tensors


def _on_hub(cfg: Mapping[str, Any], name: str, cache_dir: str | Path | None) -> Path:
    repo_id, _, revision = cfg["hf_hub_id"].partition("@")
    return Path(hf_hub_download(repo_id, name, revision=revision or None, cache_dir=cache_dir))


def create_stored(
    architecture: str,
    build: Callable[..., nn.Module],
    pretrained: bool,
    kwargs: dict[str, Any],
    filter_fn: Callable[..., Any] | None = None,
) -> nn.Module:
    """Build a network for a timm entrypoint. A network from a file is checked first.

    Args:
        architecture: Name of the entrypoint.
        build: Function of ``pretrained``, ``load`` and keyword arguments. It calls ``load(model)`` on the network with
            its gates, if that is not None.
        pretrained: Whether the caller requests weights.
        kwargs: Keyword arguments of the entrypoint.
        filter_fn: timm's adaptation of a checkpoint to the family.

    Raises:
        ValueError: The file contains anything except structure, or its weights do not fit.
    """
    stored = StoredModel.found_by_timm(kwargs.get("pretrained_cfg"), kwargs.get("cache_dir"))
    if stored is None:
        check_model_args(kwargs.get("pretrained_model_args"), is_cifar=is_cifar_network(architecture))
    if stored is None or not pretrained:
        return build(pretrained, None, **kwargs)
    replaces_classifier = kwargs.get("num_classes", stored.num_classes) != stored.num_classes
    tensors = stored.weights(replaces_classifier=replaces_classifier)

    def load(model: Any) -> None:
        check_names(tensors, model, classifier_names(architecture, tensors) if replaces_classifier else ())
        load_pretrained(
            model,
            {
                **stored.cfg,
                **_layers_of(architecture, model),
                "source": None,
                "custom_load": False,
                "label_offset": 0,
                "num_classes": stored.num_classes,
                "state_dict": dict(tensors),
            },
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3),
            filter_fn=filter_fn,
        )
        model.base_model = stored.config.get("base_model") or stored.cfg.get("hf_hub_id")
        kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(kinds) == 1 and kwargs.get("dtype") is None:
            model.to(kinds.pop())  # keep the precision of the file, like transformers

    return build(False, load, **kwargs)


def _layers_of(architecture: str, model: Any) -> dict[str, Any]:
    """Paths of the first convolution and the classifier, from the architecture's description."""
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    cfg = model.pretrained_cfg if known is None else vars(known)
    return {name: cfg.get(name) for name in ("first_conv", "classifier")}


def check_names(tensors: Mapping[str, Tensor], model: nn.Module, may_differ: Iterable[str] = ()) -> None:
    """Compare the names of stored weights with those of the pruned network.

    Shapes were already compared with the file's configuration. The caller may have requested another number of image
    channels.

    Args:
        tensors: Weights by name.
        model: Network with its gates.
        may_differ: Names that may be missing in either.

    Raises:
        ValueError: The weights belong to a network with other branches.
    """
    stored, own = (without_closed(layout_of(values)) for values in (tensors, model.state_dict()))
    check_layout({name: own.get(name, layout) for name, layout in stored.items()}, own, may_differ=may_differ)
