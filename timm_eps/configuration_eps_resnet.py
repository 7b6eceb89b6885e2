"""Configuration of the transformers classes: timm's config.json plus what side supervision and backbones need."""

from __future__ import annotations

import json
import re
from dataclasses import field
from functools import lru_cache
from typing import Any

import timm
import torch
from huggingface_hub.dataclasses import strict
from transformers import TimmWrapperConfig
from transformers.backbone_utils import BackboneConfigMixin

from .eps_resnet import is_cifar_network
from .names import base_name, twin_name
from .surgery import removed_slots

__all__ = ["EpsResNetConfig"]


@strict
class EpsResNetConfig(BackboneConfigMixin, TimmWrapperConfig):
    """Configuration of :class:`EpsResNetModel`, :class:`EpsResNetForImageClassification` and the backbone.

    One ``config.json`` serves timm and transformers. The structure of a pruned network is data in it:
    ``model_args["removed"]`` lists the slots of the branches that are gone.

    Args:
        architecture: A timm model name that this package registers, such as ``eps_resnet110`` or ``eps_resnet50``.
        model_args: Keyword arguments for ``timm.create_model``; ``removed`` among them.
        pretrained_cfg: timm's description of weights and input (input size, mean, std, ...). By default that of
            the architecture.
        side_loss_weight: Weight of the side head's cross-entropy in the training loss. 0 leaves the side head out. By
            default the paper's 0.1 for the CIFAR networks, and 0 for others. Saved models carry 0, and a stored config
            without the field means 0.
        closed: Slots whose gates are closed but whose branches are still there, in a checkpoint of a training that goes
            on. A saved model has none.
        out_features: Names, out of ``stage_names``, of the features that a backbone puts out; the last if None.
        out_indices: The same by number. Names and numbers must agree if both are given.

    Attributes:
        stage_names (list[str]): What timm's ``feature_info`` lists: ``stem``, if there is one, ``stage1``, and so on.

    Raises:
        ValueError: ``architecture`` is none of this package's, ``side_loss_weight`` is negative or NaN, or
            ``out_features`` or ``out_indices`` are not to be had.
    """

    model_type = "eps_resnet"

    architecture: str = "eps_resnet110"
    pretrained_cfg: dict[str, Any] | None = None
    side_loss_weight: float | None = None
    closed: list[str] = field(default_factory=list)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.architecture != twin_name(self.architecture):
            raise ValueError(
                f"architecture {self.architecture!r} has no gates; its twin is {twin_name(self.architecture)!r}."
            )
        if self.side_loss_weight is None:
            self.side_loss_weight = 0.1 if is_cifar_network(self.architecture) else 0.0
        known = timm.get_pretrained_cfg(self.architecture, allow_unregistered=True)
        if self.pretrained_cfg is None and known is not None:
            self.pretrained_cfg = _carried(known.to_dict())
        if not self.side_loss_weight >= 0:
            raise ValueError(f"side_loss_weight must be at least 0, got {self.side_loss_weight!r}.")
        self.model_args = dict(self.model_args or {})  # timm cannot read a null here
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
        if "architecture" not in config_dict:
            raise ValueError(f"config.json names no 'architecture', only {sorted(config_dict)}.")
        if "id2label" in kwargs:
            # The parent would set the stored number of classes last, which replaces the names just given.
            kwargs["num_labels"] = len(kwargs["id2label"])
        stored = {"side_loss_weight": 0.0, **config_dict}
        if kwargs.get("side_loss_weight", 0.0) is None:  # the default of the architecture is asked for
            stored["side_loss_weight"] = kwargs.pop("side_loss_weight")
        return super().from_dict(stored, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # A loaded configuration also carries the names it was stored with; those of the current labels count.
        labels: dict[Any, str] = self.id2label or {}  # type: ignore[assignment]
        fields = {**super().to_dict(), "label_names": [labels[number] for number in sorted(labels)]}
        # As it reads once it was stored, where timm's tuples are lists.
        fields["pretrained_cfg"] = json.loads(json.dumps(fields["pretrained_cfg"]))
        left_out = {name for name in ("closed", "out_features", "out_indices") if not fields[name]}
        # A repository with code of its own says so here, but that code is not part of the model.
        left_out |= {"auto_map", "image_processor_type"}
        return {name: value for name, value in fields.items() if name not in left_out}

    @classmethod
    def from_timm(cls, model: Any, **kwargs: Any) -> EpsResNetConfig:
        """The configuration of an existing timm model.

        Args:
            model: A model made by ``timm.create_model``; one of timm's own is described as its twin.
            kwargs: Further fields, such as ``id2label``; they win over what the model says.

        Raises:
            ValueError: The model was not made by ``timm.create_model``, has no twin here, or was made with an argument
                that JSON cannot hold, such as a class.
        """
        architecture = twin_name((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "")
        if not (timm.is_model(architecture) and hasattr(model, "forward_features")):
            raise ValueError(
                f"{type(model).__name__} cannot be built again from a name and a list of removed branches; only "
                "models made by timm.create_model can, of an architecture that timm.list_models('eps_*') lists."
            )
        model_args = {k: v for k, v in timm.models.get_model_args(model).items() if k != "num_classes"}
        if removed := removed_slots(model):
            model_args["removed"] = removed
        for name, value in model_args.items():
            if not isinstance(value, str | int | float | list | tuple | dict | None):
                raise ValueError(f"The model was made with {name}={value!r}, which config.json cannot hold; name it.")
        pretrained_cfg = _carried(model.pretrained_cfg) | {
            "input_size": timm.models.get_model_input_config(model)["input_size"]
        }
        fields: dict[str, Any] = dict(
            architecture=architecture,
            model_args=model_args,
            pretrained_cfg=pretrained_cfg,
            side_loss_weight=0.0,
            num_labels=len(kwargs["id2label"]) if "id2label" in kwargs else model.num_classes,
        )
        return cls(**{**fields, **kwargs})


@lru_cache
def _features(architecture: str, model_args: str) -> tuple[str, ...]:
    """The modules that timm lists as features of an architecture, built without memory."""
    options = {name: value for name, value in json.loads(model_args).items() if name != "removed"}
    name = base_name(architecture)
    with torch.device("meta"):
        model: Any = timm.create_model(name if timm.is_model(name) else architecture, **options)
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
