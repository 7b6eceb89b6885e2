"""The transformers classes: a timm network with optional side supervision, saved in timm's format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    TimmWrapperModel,
)
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils import logging

from ..surgery.removal import closed_slots
from .configuration_eps_resnet import EpsResNetConfig
from .distillation import Distillation
from .pretrained_eps_resnet import KEY_CONVERSIONS, EpsResNetPreTrainedModel, classifier_paths
from .side_supervision import Tap, half_depth, new_side_head

__all__ = ["EpsResNetBackbone", "EpsResNetForImageClassification", "EpsResNetModel"]

_logger = logging.get_logger(__name__)


class _Headless(EpsResNetPreTrainedModel):
    """A network without a classifier."""

    is_headless = True

    def post_init(self) -> None:
        # A checkpoint of a classifier is loaded without its last layer, and without a warning. The patterns also apply
        # to a larger model around a backbone, so they match only that layer.
        names = (*classifier_paths(self), "side_head")
        self._keys_to_ignore_on_load_unexpected = [rf"(^|\.){re.escape(name)}\." for name in names]
        super().post_init()

    def _drop_training_parts(self) -> None:
        super()._drop_training_parts()
        if hasattr(self.timm_model, "reset_classifier"):  # an encoder has no classifier
            self.timm_model.reset_classifier(0)
        self.config.num_labels = 0  # otherwise timm would look for the missing classifier


class EpsResNetModel(_Headless, TimmWrapperModel):
    """ε-ResNet without a classifier: ``last_hidden_state`` (B, C, H, W) and ``pooler_output`` (B, C).

    Example::

        model = timm_eps.EpsResNetModel(timm_eps.EpsResNetConfig(architecture="eps_resnet20"))
        model(torch.randn(2, 3, 32, 32)).pooler_output.shape  # (2, 64)
    """


class EpsResNetBackbone(BackboneMixin, _Headless):
    """ε-ResNet as a backbone for detection and segmentation heads.

    ``feature_maps``, (B, C, H, W) each, are the features selected by ``config.out_features`` or ``config.out_indices``,
    by default those of the last stage. ``channels`` has their numbers of channels.

    In a larger model, pass ``model.backbone`` to the functions of this package. ``save_pretrained`` of the larger model
    writes which branches are removed and closed. It also writes the weights of closed branches; call
    ``timm_eps.remove_closed(model.backbone)`` first to leave them out.

    Raises:
        ValueError: timm has no ``forward_intermediates`` for the architecture.

    Example::

        config = timm_eps.EpsResNetConfig(architecture="eps_resnet20", out_features=["stage1", "stage3"])
        backbone = timm_eps.EpsResNetBackbone(config)
        backbone(torch.randn(2, 3, 32, 32)).feature_maps  # (2, 16, 32, 32) and (2, 64, 8, 8)
    """

    has_attentions = False

    def __init__(self, config: EpsResNetConfig) -> None:
        # The mixin reads the selection from the configuration, where it may be missing.
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.timm_model = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, **(config.model_args or {})
        )
        if not hasattr(self.timm_model, "forward_intermediates"):
            raise ValueError(f"{config.architecture!r} cannot be a backbone: timm returns no features of its stages.")
        self.num_features = [info["num_chs"] for info in self.timm_model.feature_info]
        self.register_load_state_dict_pre_hook(_to_own_names)
        self.post_init()
        config.describe(self)  # the larger model writes this configuration, and does not know gates

    def post_init(self) -> None:
        super().post_init()
        # Closed gates are built from the configuration. Weights that were saved with it note them again.
        notes = [rf"\.{re.escape(slot)}\.closed$" for slot in closed_slots(self)]
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *notes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.config.describe(self)  # a copied or unpickled configuration

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Images (B, C, H, W) to feature maps; ``hidden_states`` has the features of all stages."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = list(self.out_indices)
        stages = self.timm_model.forward_intermediates(
            pixel_values.to(self.device, self.dtype),
            indices=None if output_hidden_states else wanted,
            stop_early=True,
            intermediates_only=True,
        )
        output = BackboneOutput(
            feature_maps=tuple(stages[index] for index in wanted) if output_hidden_states else tuple(stages),
            hidden_states=tuple(stages) if output_hidden_states else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _to_own_names(backbone: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give weights that a larger model's file holds under timm's names, as transformers saves them, the names here."""
    if prefix and not any(key.startswith(f"{prefix}timm_model.") for key in state_dict):
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}timm_model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


@dataclass
class SupervisedOutput(ImageClassifierOutput):
    """Output in training without labels: ``side_logits`` (B, classes) are the logits of the side head at half depth."""

    side_logits: Tensor | None = None


class EpsResNetForImageClassification(EpsResNetPreTrainedModel, TimmWrapperForImageClassification):
    """ε-ResNet with a classifier, and with the paper's side supervision in training.

    The training loss is ``cross-entropy + side_loss_weight * side cross-entropy`` (paper, section 4). The side head
    (BN-ReLU, global average pool, linear) reads the features at half depth. In evaluation the loss is the cross-entropy
    alone. The side head is saved only in checkpoints of a training.

    A loss computed outside the model, from the logits, has no side term. For such a loss, the output in training
    without ``labels`` has ``side_logits`` (B, classes). A warning is logged if they get no gradient.

    Example::

        config = timm_eps.EpsResNetConfig(architecture="eps_resnet20", num_labels=10)
        model = timm_eps.EpsResNetForImageClassification(config).train()
        loss = model(images, labels=labels).loss  # with the side loss

        outputs = model(images)  # or a loss of your own
        loss = F.cross_entropy(outputs.logits, labels)
        loss += model.config.side_loss_weight * F.cross_entropy(outputs.side_logits, labels)

    A ``compute_loss_func(outputs, labels, num_items_in_batch)`` of Trainer can add the side term in the same way.
    ``label_smoothing_factor`` cannot.

    With ``model.distillation = timm_eps.Distillation(teacher)`` the training loss is ``(1 - weight) * cross-entropy +
    weight * divergence from the teacher + side_loss_weight * side cross-entropy``. The teacher is not saved.
    """

    side_head: nn.Module | None
    _warned_of_unused_side = False

    @property
    def distillation(self) -> Distillation | None:
        """The teacher in the training loss, or None. It is not saved."""
        return getattr(self, "_distillation", None)

    @distillation.setter
    def distillation(self, value: Distillation | None) -> None:
        if value is not None:
            value.check_student(self)
        self._distillation = value

    def post_init(self) -> None:
        # The parent's __init__ calls this after the network was built and before the weights are initialised.
        self.side_head = None
        if self.config.side_loss_weight:
            self.side_head = new_side_head(self.timm_model)
            self._tap = Tap(half_depth(self.timm_model))
            self._connect()
        super().post_init()

    def on_structure_change(self) -> None:
        """Also connect the side head to the module that is at half depth now.

        This is not done in the forward pass, because torch cannot compile the registration of a hook.
        """
        super().on_structure_change()
        self._connect()

    def _connect(self) -> None:
        if self.side_head is not None:
            self._tap.connect(self.timm_model)

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Images (B, C, H, W) and labels (B,) to loss and logits (B, classes)."""
        distillation = self.distillation
        if distillation is not None and labels is None:
            self._warn_of_unused_teacher()
        has_teacher = distillation is not None and labels is not None
        has_side = self.side_head is not None and (labels is not None or torch.is_grad_enabled())
        if not self.training or not (has_teacher or has_side):
            return super().forward(
                pixel_values,
                labels=labels,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **kwargs,
            )
        if has_side and not torch.compiler.is_compiling():
            self._connect()  # the inner network may have been pruned directly
        if has_side:
            self._tap.listen()
        try:
            output: Any = super().forward(
                pixel_values, labels=labels, output_hidden_states=output_hidden_states, return_dict=True, **kwargs
            )
        finally:
            side: Any = self._tap.take() if has_side else None
        if distillation is not None and labels is not None:
            output.loss = distillation.loss(output.logits, output.loss, pixel_values)
        if self.side_head is not None and has_side:
            side_logits = self.side_head(side)
            if labels is not None:
                output.loss += self.config.side_loss_weight * self.loss_function(labels, side_logits, self.config)
            else:
                output = SupervisedOutput(**output, side_logits=side_logits)
                self._warn_if_unused(side, side_logits)
        if self.config.return_dict if return_dict is None else return_dict:
            return output
        return tuple(value for name, value in output.items() if name != "side_logits")

    def _warn_if_unused(self, side: Tensor, side_logits: Tensor) -> None:
        """Warn once if the side head's input gets a gradient in the backward pass, but its output does not."""
        if self._warned_of_unused_side or torch.compiler.is_compiling() or not side.requires_grad:
            return
        used: list[bool] = []

        def note(gradient: Tensor) -> None:
            used.append(True)

        def check(gradient: Tensor) -> None:  # called after everything that depends on it
            if not used and not self._warned_of_unused_side:
                self._warned_of_unused_side = True
                _logger.warning(
                    "Side supervision is off, because the loss was computed outside the model, from its logits. Add "
                    "side_loss_weight times the same loss of outputs.side_logits, pass labels to the model, or "
                    "set side_loss_weight to 0 in its config."
                )

        side_logits.register_hook(note)
        side.register_hook(check)

    def _warn_of_unused_teacher(self) -> None:
        """Warn once that a loss computed outside the model does not contain the teacher's part."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _logger.warning_once(
                "The teacher is not in the loss, because the model was called in training without labels. Trainer does "
                "not pass labels with label_smoothing_factor or compute_loss_func; use neither."
            )

    def _drop_training_parts(self) -> None:
        super()._drop_training_parts()
        self.side_head = None


AutoConfig.register(EpsResNetConfig.model_type, EpsResNetConfig, exist_ok=True)
AutoModel.register(EpsResNetConfig, EpsResNetModel, exist_ok=True)
AutoModelForImageClassification.register(EpsResNetConfig, EpsResNetForImageClassification, exist_ok=True)
AutoBackbone.register(EpsResNetConfig, EpsResNetBackbone, exist_ok=True)
AutoImageProcessor.register(
    EpsResNetConfig,
    image_processor_classes={"pil": TimmWrapperImageProcessor, "torchvision": TimmWrapperImageProcessor},
    exist_ok=True,
)
register_checkpoint_conversion_mapping(EpsResNetConfig.model_type, KEY_CONVERSIONS, overwrite=True)
