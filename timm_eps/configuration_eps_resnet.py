"""Configuration of the transformers classes: timm's config.json plus what side supervision needs."""

from __future__ import annotations

from typing import Any

import timm
from huggingface_hub.dataclasses import strict
from transformers import TimmWrapperConfig

from .names import twin_name
from .surgery import removed_slots

__all__ = ["EpsResNetConfig"]


@strict
class EpsResNetConfig(TimmWrapperConfig):
    """Configuration of :class:`EpsResNetModel` and :class:`EpsResNetForImageClassification`.

    One ``config.json`` serves timm and transformers. The structure of a pruned network is data in it:
    ``model_args["removed"]`` lists the slots of the branches that are gone.

    Args:
        architecture: A timm model name that this package registers, such as ``eps_resnet110`` or ``eps_resnet50``.
        model_args: Keyword arguments for ``timm.create_model``; ``removed`` among them.
        pretrained_cfg: timm's description of weights and input (input size, mean, std, ...). By default that of
            the architecture.
        side_loss_weight: Weight of the side head's cross-entropy in the training loss. 0 leaves the side head out. By
            default the paper's 0.1 for the CIFAR networks, and 0 for others, which have no place for one. Saved models
            carry 0, and a stored config without the field means 0.
    """

    model_type = "eps_resnet"

    architecture: str = "eps_resnet110"
    pretrained_cfg: dict[str, Any] | None = None
    side_loss_weight: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.side_loss_weight is None:
            is_cifar_network = timm.models.is_model_in_modules(self.architecture, ["eps_resnet"])
            self.side_loss_weight = 0.1 if is_cifar_network else 0.0
        known = timm.get_pretrained_cfg(self.architecture, allow_unregistered=True)
        if self.pretrained_cfg is None and known is not None:
            self.pretrained_cfg = _carried(known.to_dict())
        if not self.side_loss_weight >= 0:
            raise ValueError(f"side_loss_weight must be at least 0, got {self.side_loss_weight!r}.")
        self.model_args = dict(self.model_args or {})  # timm cannot read a null here
        super().__post_init__(**kwargs)

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
        return {**super().to_dict(), "label_names": [labels[number] for number in sorted(labels)]}

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


# Where weights came from is not true of weights that were trained on; the others stand at the root of config.json.
_NOT_CARRIED = {
    "architecture", "custom_load", "file", "hf_hub_filename", "hf_hub_id", "label_descriptions", "label_names",
    "label_offset", "num_classes", "source", "state_dict", "tag", "url",
}  # fmt: skip


def _carried(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """What of timm's description holds for any weights of the architecture: the input and the names of layers."""
    return {name: value for name, value in pretrained_cfg.items() if name not in _NOT_CARRIED}
