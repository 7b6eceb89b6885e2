"""Configuration of the transformers classes: timm's config.json with fields for side supervision and backbones."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import lru_cache
from typing import Any

import timm
import torch
from huggingface_hub.dataclasses import strict
from transformers import TimmWrapperConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..files.config_checks import check_config, check_label_names, check_model_args
from ..files.value_checks import shortened
from ..models.stored import network_args
from ..names import base_name, is_cifar_network, twin_name
from ..surgery.branches import timm_body
from ..surgery.removal import structure_of
from .live_structure import LiveStructure

__all__ = ["EpsResNetConfig"]


@strict
class EpsResNetConfig(BackboneConfigMixin, TimmWrapperConfig):
    """Configuration of :class:`EpsResNetModel`, :class:`EpsResNetForImageClassification` and the backbone.

    timm and transformers read the same ``config.json``. It contains the structure of a pruned network:
    ``model_args["removed"]`` lists the slots of removed branches. In checkpoints of a training,
    ``model_args["closed"]`` lists the slots of closed branches.

    Args:
        architecture: A timm model name that this package registers, such as ``eps_resnet110`` or ``eps_resnet50``.
        model_args: Keyword arguments of the network. They may only describe its structure, see
            :func:`timm_eps.files.config_checks.check_model_args`.
        pretrained_cfg: timm's description of weights and input (input size, mean, std, ...). The default is the one of
            the architecture.
        side_loss_weight: Weight of the side head's cross-entropy in the training loss. With 0 there is no side head. By
            default the paper's 0.1 for the CIFAR networks, and 0 for others. It is 0 in saved models, and in a stored
            config without the field.
        weights_sha256: SHA-256 of the weights file that was saved with the configuration, as hexadecimal digits.
        base_model: Name on the Hub of the pretrained model from which the training started.
        out_features: Names of the features that a backbone outputs, out of ``stage_names``; None for the last one.
        out_indices: Indices of these features. Names and indices must agree if both are given.

    Attributes:
        stage_names (list[str]): Features in timm's ``feature_info``: ``stem`` (if the network has one), ``stage1``, ...

    Raises:
        ValueError: ``architecture`` is not provided by this package, ``model_args`` contains anything except structure,
            ``side_loss_weight`` is negative or not finite, or the network has no such ``out_features`` or
            ``out_indices``.

    Example::

        config = timm_eps.EpsResNetConfig(
            architecture="eps_resnet20", num_labels=10, model_args={"removed": ["stages.2.blocks.1.drop_path"]}
        )
        config.stage_names  # ['stem', 'stage1', 'stage2', 'stage3']
    """

    model_type = "eps_resnet"

    architecture: str = "eps_resnet110"
    pretrained_cfg: dict[str, Any] | None = None
    side_loss_weight: float | None = None
    weights_sha256: str | None = None
    base_model: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "closed" in kwargs:
            raise ValueError(f"closed={shortened(kwargs['closed'])} must be in model_args['closed'].")
        if self.architecture != twin_name(self.architecture):
            raise ValueError(
                f"architecture {self.architecture!r} has no gates; its twin is {twin_name(self.architecture)!r}."
            )
        if self.side_loss_weight is None:
            self.side_loss_weight = 0.1 if is_cifar_network(self.architecture) else 0.0
        known = timm.get_pretrained_cfg(self.architecture, allow_unregistered=True)
        if self.pretrained_cfg is None and known is not None:
            self.pretrained_cfg = _carried(known.to_dict())
        if not 0 <= self.side_loss_weight < math.inf:
            raise ValueError(f"side_loss_weight must be a finite number of at least 0, got {self.side_loss_weight!r}.")
        # timm cannot read a null here.
        self.model_args = check_model_args(self.model_args, is_cifar=is_cifar_network(self.architecture))
        self._live = LiveStructure()  # of a backbone that is built from this configuration
        self._out_features = kwargs.pop("out_features", None)
        self._out_indices = kwargs.pop("out_indices", None)
        if self._out_features is not None or self._out_indices is not None:
            self.set_output_features_output_indices(self._out_features, self._out_indices)
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        modules = list(_features(self.architecture, json.dumps(self.model_args)))
        has_stem = _unnumbered(modules[0]) != _unnumbered(modules[1])
        stages = [f"stage{number + 1}" for number in range(len(modules) - has_stem)]
        return ["stem", *stages] if has_stem else stages

    @property
    def num_hidden_layers(self) -> int:
        """Number of stages."""
        return len(self.stage_names) - self.stage_names.count("stem")

    @property
    def out_features(self) -> list[str]:
        # Not in __post_init__: only a backbone needs its stages, and the network must be built to find them.
        return [self.stage_names[-1]] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self.set_output_features_output_indices(out_features=names, out_indices=None)

    @property
    def out_indices(self) -> list[int]:
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @out_indices.setter
    def out_indices(self, indices: tuple[int, ...] | list[int] | None) -> None:
        numbers = None if indices is None else list(indices)
        self.set_output_features_output_indices(out_features=None, out_indices=numbers)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = check_config(config_dict, is_cifar=is_cifar_network)
        if config_dict.get("model_type") in (None, TimmWrapperConfig.model_type):  # saved by timm, or in its wrapper
            config_dict["architecture"] = twin_name(config_dict["architecture"].partition(".")[0])
        # Only the code in the repository needs these. This package plans the edits from the removed branches.
        config_dict = {name: value for name, value in config_dict.items() if name not in _OF_REMOTE_CODE}
        if not timm.is_model(config_dict["architecture"]):
            raise ValueError(
                f"architecture {shortened(config_dict['architecture'])} is unknown; timm.list_models('eps_*') lists "
                "the names."
            )
        if "id2label" in kwargs:
            # The parent would set the stored number of classes last, and so overwrite the given names.
            kwargs["num_labels"] = len(kwargs["id2label"])
        stored = {**config_dict, "side_loss_weight": config_dict.get("side_loss_weight") or 0.0}
        if kwargs.get("side_loss_weight", 0.0) is None:  # None means the default of the architecture
            stored["side_loss_weight"] = kwargs.pop("side_loss_weight")
        return super().from_dict(stored, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        self.note_structure(self._live.read())
        # A loaded configuration also has its stored names, but the current labels are valid.
        labels: dict[Any, str] = self.id2label or {}  # type: ignore[assignment]
        fields = {**super().to_dict(), "label_names": [labels[number] for number in sorted(labels)]}
        # As in a stored file, where timm's tuples are lists.
        fields["pretrained_cfg"] = json.loads(json.dumps(fields["pretrained_cfg"]))
        left_out = {name for name in ("base_model", "out_features", "out_indices") if not fields[name]}
        left_out.add("_live")
        left_out.add("weights_sha256")  # the digest is added when the weights are saved
        left_out |= _OF_REMOTE_CODE  # code in a repository is not part of the model
        return {name: value for name, value in fields.items() if name not in left_out}

    def __deepcopy__(self, memo: dict[int, Any]) -> EpsResNetConfig:
        # transformers writes the configuration of a larger model from a copy of it.
        self.note_structure(self._live.read())
        copied: EpsResNetConfig = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def note_structure(self, structure: dict[str, list[str]] | None) -> None:
        """Say which branches are removed and which gates are closed; None leaves what is said."""
        if structure is not None:
            self.model_args = network_args(self.model_args) | structure

    def describe(self, model: Any) -> None:
        """Follow the structure of a model that was built from this configuration."""
        self._live.add(model)

    @classmethod
    def from_timm(cls, model: Any, **kwargs: Any) -> EpsResNetConfig:
        """The configuration of an existing timm model.

        Args:
            model: A model made by ``timm.create_model``, or a transformers class around one. A network without gates is
                described as its twin. Its class names and base model are kept.
            kwargs: Further fields, such as ``id2label``. They take precedence over the model's values.

        Raises:
            ValueError: The model was not made by ``timm.create_model``, has no twin, or was made with an argument that
                does not describe structure.
        """
        body: Any = timm_body(model)
        known = getattr(body, "pretrained_cfg", None) or {}
        architecture = twin_name(known.get("architecture") or "")
        if not (timm.is_model(architecture) and hasattr(body, "forward_features")):
            raise ValueError(
                f"{type(body).__name__} cannot be rebuilt from a name and a list of removed branches. This needs "
                "a model made by timm.create_model, of an architecture in timm.list_models('eps_*')."
            )
        fields: dict[str, Any] = {
            "architecture": architecture,
            "model_args": _model_args(body),
            "pretrained_cfg": _carried(known) | {"input_size": timm.models.get_model_input_config(body)["input_size"]},
            "side_loss_weight": 0.0,
            "num_labels": body.num_classes,
            "base_model": getattr(body, "base_model", None),
        }
        names = _class_names(model, body)
        if names is not None:
            fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        if "id2label" in kwargs:
            fields["num_labels"] = len(kwargs["id2label"])
            kwargs.setdefault("label2id", {name: int(i) for i, name in kwargs["id2label"].items()})
        return cls(**{**fields, **kwargs})


def _model_args(body: Any) -> dict[str, Any]:
    """Arguments that rebuild the network of a timm model with its current structure."""
    # The source of the weights and the implementation of layers are not part of the network.
    passing = ("num_classes", "removed", "closed", "pretrained_strict", "kwargs_filter", "pretrained_cfg", "cache_dir")
    model_args = {name: value for name, value in timm.models.get_model_args(body).items() if name not in passing}
    model_args |= structure_of(body)
    for name, value in model_args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"The model was made with {name}={shortened(value)}, which config.json cannot store; pass its name."
            ) from None
    return model_args


def _class_names(model: Any, body: Any) -> list[str] | None:
    """Class names of a model, from its transformers or timm configuration; None if their number is wrong."""
    config = getattr(model, "config", None)
    stored = config.id2label if config is not None else (body.pretrained_cfg or {}).get("label_names")
    if not stored or len(stored) != body.num_classes:
        return None
    return check_label_names("label_names", stored)


@lru_cache
def _features(architecture: str, model_args: str) -> tuple[str, ...]:
    """The modules that timm lists as features of an architecture, found on the meta device."""
    options = network_args(json.loads(model_args))
    with torch.device("meta"):
        model: Any = timm.create_model(base_name(architecture), pretrained=False, **options)
    return tuple(info["module"] for info in model.feature_info)


def _unnumbered(module: str) -> str:
    return re.sub(r"[.\d]", "", module)


# Fields of a saved model that refer to code in its repository.
_OF_REMOTE_CODE = {"auto_map", "edits", "edits_sha256", "image_processor_type", "timm_architecture"}

# The source is no longer true for weights that were trained further; other fields are at the root of config.json.
_NOT_CARRIED = {
    "architecture", "custom_load", "file", "hf_hub_filename", "hf_hub_id", "label_descriptions", "label_names",
    "label_offset", "num_classes", "source", "state_dict", "tag", "url",
}  # fmt: skip


def _carried(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """The part of timm's description that is true for any weights: the input and the names of layers."""
    return {name: value for name, value in pretrained_cfg.items() if name not in _NOT_CARRIED}
