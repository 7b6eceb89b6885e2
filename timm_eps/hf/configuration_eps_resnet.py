"""Configuration of the transformers classes: timm's config.json plus what side supervision and backbones need."""

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
from ..names import base_name, is_cifar_network, twin_name
from ..surgery.branches import timm_body
from ..surgery.removal import structure_of
from .live_structure import LiveStructure

__all__ = ["EpsResNetConfig"]


@strict
class EpsResNetConfig(BackboneConfigMixin, TimmWrapperConfig):
    """Configuration of :class:`EpsResNetModel`, :class:`EpsResNetForImageClassification` and the backbone.

    One ``config.json`` serves timm and transformers. The structure of a pruned network is data in it:
    ``model_args["removed"]`` lists the slots of removed branches, ``model_args["closed"]`` those of closed gates whose
    branches are still there, in a checkpoint of a training.

    Args:
        architecture: A timm model name that this package registers, such as ``eps_resnet110`` or ``eps_resnet50``.
        model_args: Keyword arguments of the network; they name its structure and nothing else, see
            :func:`timm_eps.files.config_checks.check_model_args`.
        pretrained_cfg: timm's description of weights and input (input size, mean, std, ...). By default that of
            the architecture.
        side_loss_weight: Weight of the side head's cross-entropy in the training loss. 0 leaves the side head out. By
            default the paper's 0.1 for the CIFAR networks, and 0 for others. Saved models carry 0, and a stored config
            without the field means 0.
        weights_sha256: SHA-256 of the weights file that the configuration was saved with, as hexadecimal digits.
        base_model: Name on the Hub of the model whose weights a training began with.
        out_features: Names, out of ``stage_names``, of the features that a backbone puts out; the last if None.
        out_indices: The same by number. Names and numbers must agree if both are given.

    Attributes:
        stage_names (list[str]): What timm's ``feature_info`` lists: ``stem``, if there is one, ``stage1``, and so on.

    Raises:
        ValueError: ``architecture`` is not one of this package's, ``model_args`` does not name structure,
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
            raise ValueError(f"closed={shortened(kwargs['closed'])} belongs into model_args['closed'].")
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
        # Not in __post_init__: only a backbone needs to know its stages, and they are found by building the network.
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
        if config_dict.get("model_type") == TimmWrapperConfig.model_type:  # timm's own network in a stock wrapper
            config_dict["architecture"] = twin_name(config_dict["architecture"].partition(".")[0])
        if not timm.is_model(config_dict["architecture"]):
            raise ValueError(
                f"architecture {shortened(config_dict['architecture'])} is unknown; timm.list_models('eps_*') lists "
                "the names."
            )
        if "id2label" in kwargs:
            # The parent would set the stored number of classes last, which replaces the names just given.
            kwargs["num_labels"] = len(kwargs["id2label"])
        stored = {**config_dict, "side_loss_weight": config_dict.get("side_loss_weight") or 0.0}
        if kwargs.get("side_loss_weight", 0.0) is None:  # the default of the architecture is asked for
            stored["side_loss_weight"] = kwargs.pop("side_loss_weight")
        return super().from_dict(stored, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        self.note_structure(self._live.read())
        # A loaded configuration also carries the names it was stored with; those of the current labels count.
        labels: dict[Any, str] = self.id2label or {}  # type: ignore[assignment]
        fields = {**super().to_dict(), "label_names": [labels[number] for number in sorted(labels)]}
        # As it reads once it was stored, where timm's tuples are lists.
        fields["pretrained_cfg"] = json.loads(json.dumps(fields["pretrained_cfg"]))
        left_out = {name for name in ("base_model", "out_features", "out_indices") if not fields[name]}
        left_out.add("_live")
        left_out.add("weights_sha256")  # who writes a file of weights notes its digest
        # A repository with code of its own says so here, but that code is not part of the model.
        left_out |= {"auto_map", "image_processor_type"}
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
            others = {name: v for name, v in (self.model_args or {}).items() if name not in ("removed", "closed")}
            self.model_args = others | structure

    def describe(self, model: Any) -> None:
        """Follow the structure of a model that was built from this configuration."""
        self._live.add(model)

    @classmethod
    def from_timm(cls, model: Any, **kwargs: Any) -> EpsResNetConfig:
        """The configuration of an existing timm model.

        Args:
            model: A model made by ``timm.create_model``, or a transformers class around one. A network of timm's own is
                described as its twin. Class names and the base model that it knows are kept.
            kwargs: Further fields, such as ``id2label``; they win over what the model says.

        Raises:
            ValueError: The model was not made by ``timm.create_model``, has no twin here, or was made with an argument
                that does not name structure.
        """
        body: Any = timm_body(model)
        known = getattr(body, "pretrained_cfg", None) or {}
        architecture = twin_name(known.get("architecture") or "")
        if not (timm.is_model(architecture) and hasattr(body, "forward_features")):
            raise ValueError(
                f"{type(body).__name__} cannot be built again from a name and a list of removed branches; only "
                "models made by timm.create_model can, of an architecture that timm.list_models('eps_*') lists."
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
    """Arguments that build the network of a timm model again, its structure as it is now among them."""
    # What a network was loaded from, and by which variant of its layers, is no part of it.
    passing = ("num_classes", "removed", "closed", "pretrained_strict", "kwargs_filter", "pretrained_cfg", "cache_dir")
    model_args = {name: value for name, value in timm.models.get_model_args(body).items() if name not in passing}
    model_args |= structure_of(body)
    for name, value in model_args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"The model was made with {name}={shortened(value)}, which config.json cannot hold; name it."
            ) from None
    return model_args


def _class_names(model: Any, body: Any) -> list[str] | None:
    """Class names that a model knows, in a transformers configuration or in timm's; None if they are not of number."""
    config = getattr(model, "config", None)
    stored = config.id2label if config is not None else (body.pretrained_cfg or {}).get("label_names")
    if not stored or len(stored) != body.num_classes:
        return None
    return check_label_names("label_names", stored)


@lru_cache
def _features(architecture: str, model_args: str) -> tuple[str, ...]:
    """The modules that timm lists as features of an architecture, built without memory."""
    options = {name: value for name, value in json.loads(model_args).items() if name not in ("removed", "closed")}
    with torch.device("meta"):
        model: Any = timm.create_model(base_name(architecture), pretrained=False, **options)
    return tuple(info["module"] for info in model.feature_info)


def _unnumbered(module: str) -> str:
    return re.sub(r"[.\d]", "", module)


# Where weights came from is not true of weights that were trained on; the others stand at the root of config.json.
_NOT_CARRIED = {
    "architecture", "custom_load", "file", "hf_hub_filename", "hf_hub_id", "label_descriptions", "label_names",
    "label_offset", "num_classes", "source", "state_dict", "tag", "url",
}  # fmt: skip


def _carried(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """What of timm's description holds for any weights of the architecture: the input and the names of layers."""
    return {name: value for name, value in pretrained_cfg.items() if name not in _NOT_CARRIED}
