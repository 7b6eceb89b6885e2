"""A pruned timm network for machines with timm and transformers alone: a copy of ``standalone_twin.py`` of timm-eps.

timm builds the dense network of the architecture. The edits in ``config.json`` then remove the residual branches that
``model_args["removed"]`` lists. The repository also has copies of the modules that this file imports. timm-eps reads
the same directory, and ignores this file.

The branches were found with timm-eps, after "Learning Strict Identity Mappings in Deep Residual Networks", X. Yu,
Z. Yu, S. Ramalingam, CVPR 2018, https://arxiv.org/abs/1804.01661. Needs transformers 5.23 and timm 1.0.31.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from typing import Any

import timm
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    TimmWrapperPreTrainedModel,
)
from transformers.core_model_loading import WeightRenaming

from .config_checks import check_config, check_model_args
from .edits import apply_edits, check_edits, edits_as_json, edits_digest, restore_constants
from .strict_loading import StrictLoading, align_weights
from .value_checks import shortened

__all__ = ["EpsResNetConfig", "EpsResNetForImageClassification", "EpsResNetModel", "stock_network"]

_WRAPPER = "timm_model."
_NAME = re.compile(r"\w{1,128}", re.ASCII)


@strict
class EpsResNetConfig(TimmWrapperConfig):
    """Configuration of a pruned timm network.

    Args:
        architecture: Name of the network in timm-eps, such as ``eps_resnet50``.
        timm_architecture: Its name in timm, such as ``resnet50``.
        model_args: timm's keyword arguments of the network, and ``removed``, the slots of the removed branches.
        pretrained_cfg: timm's description of the input, which the image processor reads.
        edits: What replaces which module of the dense network, in this order.
        edits_sha256: SHA-256 of what ``edits`` are for, and of the edits, by :func:`.edits.edits_digest`.
        weights_sha256: SHA-256 of the weights file, as hexadecimal digits.

    Raises:
        ValueError: A field does not describe structure, or the edits do not fit ``removed``.
    """

    model_type = "eps_resnet"

    architecture: str = "eps_resnet50"
    timm_architecture: str = "resnet50"
    pretrained_cfg: dict[str, Any] | None = None
    edits: list[Any] | None = None
    edits_sha256: str | None = None
    weights_sha256: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "id2label" in kwargs:
            # The parent would set the stored number of classes last, which replaces the names just given.
            kwargs["num_labels"] = len(kwargs["id2label"])
        return super().from_dict(check_config(config_dict, is_cifar=lambda _: False), **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        # timm also accepts names of repositories and directories, and would fetch files from there.
        if not (_NAME.fullmatch(self.timm_architecture) and timm.is_model(self.timm_architecture)):
            name = shortened(self.timm_architecture)
            raise ValueError(f"timm_architecture must be a network of timm {timm.__version__}, got {name}.")
        self.model_args = check_model_args(self.model_args, is_cifar=False)
        if self.model_args.get("closed"):
            raise ValueError("model_args['closed'] is for checkpoints of a training, which only timm_eps reads.")
        removed = self.model_args.get("removed") or ()
        edits = edits_as_json(check_edits(self.edits or [], removed))
        if edits and self.edits_sha256 != edits_digest(self.timm_architecture, removed, edits):
            raise ValueError(
                "edits are not those that config.json was saved with: edits_sha256 differs. Keep timm_architecture, "
                "model_args['removed'] and edits as one save wrote them."
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        labels: dict[Any, str] = self.id2label or {}  # type: ignore[assignment]
        fields = {**super().to_dict(), "label_names": [labels[number] for number in sorted(labels)]}
        fields.pop("weights_sha256", None)  # it is that of the file that was loaded
        return fields


def stock_network(config: EpsResNetConfig, num_classes: int) -> nn.Module:
    """Build timm's network and remove the branches.

    Args:
        config: Its configuration.
        num_classes: Number of classes; 0 builds no classifier.

    Raises:
        ValueError: timm does not build such a network, or the edits do not fit it.
    """
    removed = (config.model_args or {}).get("removed") or ()
    options = {key: value for key, value in (config.model_args or {}).items() if key not in ("removed", "closed")}
    try:
        body = timm.create_model(config.timm_architecture, pretrained=False, num_classes=num_classes, **options)
    except Exception as error:  # timm's families raise errors of many types for unknown arguments
        reason = " ".join(str(error).split())[:120]
        name = shortened(config.timm_architecture)
        raise ValueError(f"timm {timm.__version__} does not build the network {name}: {reason}.") from error
    apply_edits(body, check_edits(config.edits or [], removed))
    return body


class _Pruned(StrictLoading, TimmWrapperPreTrainedModel):
    """Base of the two classes: strict loading, and saving with timm's names."""

    config_class = EpsResNetConfig
    config: EpsResNetConfig
    timm_model: Any
    structure_fields = ("timm_architecture", "model_args", "edits")
    wrapper_prefix = _WRAPPER

    @classmethod
    def network_of(cls, config: EpsResNetConfig, num_classes: int) -> nn.Module:
        return stock_network(config, num_classes)

    @classmethod
    def classifier_names(cls, config: EpsResNetConfig) -> set[str]:
        with torch.device("meta"):
            names = stock_network(config, num_classes=2).state_dict()
        return {name for name in names if name.startswith(tuple(f"{path}." for path in _classifiers(config)))}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["key_mapping"] = {rf"^(?!{_WRAPPER})(.+)": rf"{_WRAPPER}\1"}  # files have timm's names
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        restore_constants(model.timm_model)
        align_weights(model)
        return found

    def post_init(self) -> None:
        fields = {key: value for key, value in (self.config.pretrained_cfg or {}).items() if key not in _LAYER_FIELDS}
        self.timm_model.pretrained_cfg = {**self.timm_model.pretrained_cfg, **fields}
        # By default, transformers saves a model that was not loaded with the wrapper's names.
        self._weight_conversions = [WeightRenaming(rf"^(?!{_WRAPPER})(.+)", rf"{_WRAPPER}\1")]
        super().post_init()


class EpsResNetModel(_Pruned, TimmWrapperModel):
    """A pruned network without a classifier."""

    def __init__(self, config: EpsResNetConfig) -> None:
        TimmWrapperPreTrainedModel.__init__(self, config)
        self.features_only = False
        self.timm_model = stock_network(config, num_classes=0)
        self._keys_to_ignore_on_load_unexpected = [rf"^({_WRAPPER})?{path}\." for path in _classifiers(config)]
        self.post_init()


class EpsResNetForImageClassification(_Pruned, TimmWrapperForImageClassification):
    """A pruned network with a classifier; ValueError if the configuration has no classes."""

    def __init__(self, config: EpsResNetConfig) -> None:
        TimmWrapperPreTrainedModel.__init__(self, config)
        if not config.num_labels:
            raise ValueError("The stored network has no classifier; pass num_labels, or take AutoModel.")
        self.timm_model = stock_network(config, num_classes=config.num_labels)
        self.num_labels = config.num_labels
        self.post_init()


# The names of layers are those of the architecture, whatever a file says.
_LAYER_FIELDS = ("classifier", "first_conv")


def _classifiers(config: EpsResNetConfig) -> tuple[str, ...]:
    """Paths of the classifiers, by timm's own description of the architecture."""
    known = timm.get_pretrained_cfg(config.timm_architecture, allow_unregistered=True)
    named = (known.classifier if known is not None else None) or ()
    return (named,) if isinstance(named, str) else tuple(named)
