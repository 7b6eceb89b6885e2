"""The transformers classes: timm's network inside, side supervision beside it, one format on disk.

They are transformers' own timm wrapper with three changes. Weights are initialised as timm does, pruned structures
save and load, and the classification loss has the paper's side term.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
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
    TimmWrapperPreTrainedModel,
)
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files.weight_checks import check_numbers
from ..models.eps_resnet import init_weights
from ..models.stored import set_closed
from ..surgery.branches import gates, timm_body
from ..surgery.removal import add_gates, closed_slots, collapsed_copy, record_structure, removed_slots
from ..surgery.wrapping import recorded
from .configuration_eps_resnet import EpsResNetConfig
from .distillation import Distillation
from .model_files import TransformersFiles, bind_weights, check_outputs, check_rebuilt, staged
from .side_supervision import Tap, half_depth, new_side_head

__all__ = [
    "EpsResNetBackbone",
    "EpsResNetForImageClassification",
    "EpsResNetModel",
    "EpsResNetPreTrainedModel",
    "unshared",
]


_logger = logging.get_logger(__name__)


def _key_conversions() -> list[WeightConverter | WeightRenaming]:
    """Checkpoints hold timm's keys; the wrapper's begin with ``timm_model.``, but for the side head's."""
    return [WeightRenaming(r"^(?!timm_model\.|side_head\.)(.+)", r"timm_model.\1")]


class EpsResNetPreTrainedModel(TimmWrapperPreTrainedModel):
    """What the ε-ResNet classes share: initialisation, loading and saving.

    Attributes:
        keeps_training_parts (bool | str): Save the model as it trains, with closed branches and the side head, not what
            it evaluates to: True, or ``"in checkpoints"``, only into directories that are called as Trainer's
            checkpoints. To resume from; transformers loads what is saved so, timm does not.
        loads_leniently (bool): True while ``load_state_dict(..., strict=False)`` runs, which torch does not tell hooks.
    """

    config_class = EpsResNetConfig
    config: EpsResNetConfig
    timm_model: Any
    _weight_conversions: list[WeightConverter | WeightRenaming]
    keeps_training_parts: bool | str = False
    is_headless = False
    records_structure = True  # in its configuration; a stock wrapper does not, and may not save a pruned network
    loads_leniently: bool = False
    _no_split_modules = ["PreActBasic"]  # noqa: RUF012  the parent's declaration

    def post_init(self) -> None:
        # Known from the config alone when loading: a probe or an image processor must see this model's input.
        described = {name: v for name, v in (self.config.pretrained_cfg or {}).items() if name not in _OF_ARCHITECTURE}
        self.timm_model.pretrained_cfg = {**self.timm_model.pretrained_cfg, **described}
        if not any(parameter.is_meta for parameter in self.timm_model.parameters()):
            for module in self.timm_model.modules():
                module._is_hf_initialized = True  # by timm, each architecture in its way
        super().post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As :meth:`transformers.PreTrainedModel.from_pretrained`, but strict about the weights.

        Only the classifier may differ from what the file holds, and only with ``ignore_mismatched_sizes=True`` or where
        the stored network has none.

        Raises:
            ValueError: The file does not fit what ``config.json`` says, or holds NaN. transformers alone would give
                random weights to what is missing, with a warning.
        """
        gives_side_loss_weight = "side_loss_weight" in kwargs
        kwargs.setdefault("use_safetensors", True)  # other formats can hold code
        stored = None
        if kwargs.get("state_dict") is None and pretrained_model_name_or_path is not None:
            stored = TransformersFiles.of(cls.config_class, pretrained_model_name_or_path, kwargs)
        asked = bool(kwargs.get("ignore_mismatched_sizes")) or (stored is not None and not stored.num_classes)
        if stored is not None:
            stored.check(replaces_classifier=asked or cls.is_headless)
            kwargs = stored.with_open_gates(kwargs)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if kwargs.get("state_dict") is None:
            _check_blocks(model, info, replaces_classifier=asked)
        if stored is not None and stored.asks_for_side_head and not (gives_side_loss_weight or cls.is_headless):
            _check_side_head(info)
        if stored is not None:
            set_closed(model, stored.closed)
            record_structure(model)
        # transformers leaves CPU weights in the mapped file, at odd addresses, where kernels for single images sum in
        # another order than at aligned ones: logits would differ from timm's and the live model's in the last bits.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes this class's own keys, those of its files, and timm's for the network alone."""
        if any(key.startswith("side_head.") for key in state_dict):
            own = ("timm_model.", "side_head.")
            state_dict = {key if key.startswith(own) else f"timm_model.{key}": v for key, v in state_dict.items()}
        whole = any(key.startswith("timm_model.") for key in state_dict)
        if not strict and not hasattr(state_dict, "_metadata"):
            # A checkpoint's file says nothing of closed gates, its configuration does: they stay as they are.
            prefix = "timm_model." if whole else ""
            notes = {f"{prefix}{slot}.closed": torch.ones((), dtype=torch.bool) for slot in closed_slots(self)}
            state_dict = {**notes, **state_dict}
        self.loads_leniently = not strict
        try:
            return nn.Module.load_state_dict(self if whole else self.timm_model, state_dict, strict, assign)
        finally:
            self.loads_leniently = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`torch.nn.Module.state_dict`; a closed gate has an entry of its own."""
        with recorded(self.timm_model):
            return super().state_dict(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init_weights(module)
        else:
            super()._init_weights(module)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save what the model evaluates to: without closed branches and without the side head.

        The files are written to the side first. They are moved into place when the network that the configuration
        describes has been built again, has the names and shapes of the weights, and computes the same. Arguments are
        those of :meth:`transformers.PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: The configuration cannot say what the network is, as after modules were replaced by hand; or
                weights are NaN or infinite, or of several precisions.
        """
        is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(save_directory).name)
        keeps_parts = self.keeps_training_parts is True or bool(self.keeps_training_parts and is_checkpoint)
        if keeps_parts:
            written = copy.copy(self)
            written.config = copy.deepcopy(self.config)
        else:
            written = collapsed_copy(self)
            written._drop_training_parts()
        # By itself transformers saves the keys it loaded, which may have been the wrapper's; timm reads its own alone.
        written._weight_conversions = _key_conversions()
        # The network knows its structure best, also if it was pruned on its own.
        record_structure(written)
        weights = {name: tensor for name, tensor in written.state_dict().items() if not name.endswith(".closed")}
        if state_dict is not None:
            if missing := sorted(weights.keys() - state_dict.keys()):
                raise ValueError(f"state_dict lacks {missing[0]!r} and {len(missing) - 1} more keys of the model.")
            weights = {name: state_dict[name] for name in weights}
        for name, tensor in weights.items():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"{name} is a {type(tensor).__name__}, which config.json cannot describe: save the model before it "
                    "is quantized or sharded."
                )
        check_numbers(weights, source="the model")
        kinds = {str(tensor.dtype) for tensor in weights.values() if tensor.is_floating_point()}
        if len(kinds) > 1:
            raise ValueError(f"The weights are of several precisions, {', '.join(sorted(kinds))}; use model.to(dtype).")
        if not is_main_process:
            return
        with staged(save_directory) as staging:
            super(EpsResNetPreTrainedModel, written).save_pretrained(staging, state_dict=unshared(weights), **kwargs)
            check_rebuilt(type(self), staging)
            if not keeps_parts:  # a checkpoint is written often, and begins with a network that was proven
                check_outputs(written, staging)
            bind_weights(staging)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _drop_training_parts(self) -> None:
        self.config.side_loss_weight = 0.0

    @classmethod
    def from_timm(cls, model: nn.Module, **config_fields: Any) -> Any:
        """Wrap an existing timm model; nothing is copied.

        ::

            stock = AutoModelForImageClassification.from_pretrained("timm/resnet18.a1_in1k")
            model = EpsResNetForImageClassification.from_timm(stock)  # the same weights, with gates and class names

        Args:
            model: A model made by ``timm.create_model``, gated or not, or a stock ``TimmWrapper`` model around one.
            config_fields: Further fields of :class:`EpsResNetConfig`, such as ``id2label`` or ``side_loss_weight``.

        Raises:
            ValueError: The model cannot be built again from a name and arguments.
        """
        config = EpsResNetConfig.from_timm(model, **config_fields)
        model = timm_body(model)
        if not gates(model) and not removed_slots(model):
            add_gates(model)
        with torch.device("meta"):
            wrapper: Any = cls(config)
        wrapper.timm_model = model
        if getattr(wrapper, "side_head", None) is not None:
            wrapper.follow_structure()
            wrapper.side_head = new_side_head(model)
            wrapper.side_head.apply(wrapper._init_weights)
        return wrapper


class _Headless(EpsResNetPreTrainedModel):
    """A network without a classifier."""

    is_headless = True

    def post_init(self) -> None:
        # A classifier's checkpoint loads here as it is meant to: silently without its last layer.
        self._keys_to_ignore_on_load_unexpected = [re.escape(name) for name in (*_classifiers(self), "side_head")]
        super().post_init()

    def _drop_training_parts(self) -> None:
        super()._drop_training_parts()
        if hasattr(self.timm_model, "reset_classifier"):  # an encoder has none
            self.timm_model.reset_classifier(0)
        self.config.num_labels = 0  # or timm would look for the classifier that is not there


class EpsResNetModel(_Headless, TimmWrapperModel):
    """ε-ResNet without a classifier: ``last_hidden_state`` (B, C, H, W) and ``pooler_output`` (B, C).

    Example::

        model = timm_eps.EpsResNetModel(timm_eps.EpsResNetConfig(architecture="eps_resnet20"))
        model(torch.randn(2, 3, 32, 32)).pooler_output.shape  # (2, 64)
    """


class EpsResNetBackbone(BackboneMixin, _Headless):
    """ε-ResNet as a backbone for detection and segmentation heads.

    ``feature_maps`` are those of the stages that ``config.out_features`` or ``config.out_indices`` name, (B, C, H, W)
    each, by default the last stage's; ``channels`` has their numbers of channels.

    In a larger model, prune ``model.backbone``, and call ``timm_eps.remove_closed(model.backbone)`` before the whole
    model is saved. Its file lists removed branches, but not closed ones.

    Raises:
        ValueError: timm has no ``forward_intermediates`` for the architecture.

    Example::

        config = timm_eps.EpsResNetConfig(architecture="eps_resnet20", out_features=["stage1", "stage3"])
        backbone = timm_eps.EpsResNetBackbone(config)
        backbone(torch.randn(2, 3, 32, 32)).feature_maps  # (2, 16, 32, 32) and (2, 64, 8, 8)
    """

    has_attentions = False

    def __init__(self, config: EpsResNetConfig) -> None:
        # The mixin reads the choice as it stands in the configuration, where it may have been left open.
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.timm_model = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, **(config.model_args or {})
        )
        if not hasattr(self.timm_model, "forward_intermediates"):
            raise ValueError(f"{config.architecture!r} cannot be a backbone: timm gives no features of its stages.")
        self.num_features = [info["num_chs"] for info in self.timm_model.feature_info]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Images (B, C, H, W) to feature maps; ``hidden_states`` are those of all stages."""
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


@dataclass
class SupervisedOutput(ImageClassifierOutput):
    """Output in training without labels: ``side_logits`` (B, classes) are those of the side head, at half depth."""

    side_logits: Tensor | None = None


class EpsResNetForImageClassification(EpsResNetPreTrainedModel, TimmWrapperForImageClassification):
    """ε-ResNet with a classifier, and in training with the paper's side supervision.

    The training loss is ``cross-entropy + side_loss_weight * side cross-entropy`` (paper, section 4); the side head
    (BN-ReLU, global average pool, linear) reads the network at half depth. In evaluation the loss is the cross-entropy
    alone. The side head is saved in checkpoints of a training that goes on only.

    A loss that is computed elsewhere, from the logits, has no side term of its own. In training without ``labels`` the
    output has ``side_logits`` (B, classes) for it, and a warning comes if they get no gradient.

    Example::

        config = timm_eps.EpsResNetConfig(architecture="eps_resnet20", num_labels=10)
        model = timm_eps.EpsResNetForImageClassification(config).train()
        loss = model(images, labels=labels).loss  # with the side loss

        outputs = model(images)  # or a loss of your own
        loss = F.cross_entropy(outputs.logits, labels)
        loss += model.config.side_loss_weight * F.cross_entropy(outputs.side_logits, labels)

    That is also how a ``compute_loss_func`` of Trainer adds it, of ``outputs, labels, num_items_in_batch``; by
    ``label_smoothing_factor`` there is none.

    With ``model.distillation = timm_eps.Distillation(teacher)`` the training loss is ``(1 - weight) * cross-entropy +
    weight * divergence from the teacher + side_loss_weight * side cross-entropy``. The teacher is not saved.
    """

    side_head: nn.Module | None
    _warned_of_unused_side = False

    @property
    def distillation(self) -> Distillation | None:
        """The teacher whose answers are a part of the training loss; None for the labels alone. It is not saved."""
        return getattr(self, "_distillation", None)

    @distillation.setter
    def distillation(self, value: Distillation | None) -> None:
        if value is not None:
            value.check_student(self)
        self._distillation = value

    def post_init(self) -> None:
        # The parent's __init__ calls this when the network is there and before weights are initialised.
        self.side_head = None
        if self.config.side_loss_weight:
            self.side_head = new_side_head(self.timm_model)
            self._tap = Tap(half_depth(self.timm_model))
            self.follow_structure()
        super().post_init()

    def follow_structure(self) -> None:
        """Let the side head read what is at half depth now; whoever changes the structure calls this.

        Not left to the forward pass: torch cannot compile that a hook is registered.
        """
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
            self.follow_structure()  # the network inside may have been pruned on its own
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
        """Warn once if, in the backward pass, the side head's input gets a gradient and its output has got none."""
        if self._warned_of_unused_side or torch.compiler.is_compiling() or not side.requires_grad:
            return
        used: list[bool] = []

        def note(gradient: Tensor) -> None:
            used.append(True)

        def check(gradient: Tensor) -> None:  # after all that depends on it
            if not used and not self._warned_of_unused_side:
                self._warned_of_unused_side = True
                _logger.warning(
                    "Side supervision is off: the loss was computed outside of the model, from its logits. Add "
                    "side_loss_weight times the same loss of outputs.side_logits to it, pass labels to the model, or "
                    "set side_loss_weight to 0 in its config."
                )

        side_logits.register_hook(note)
        side.register_hook(check)

    def _warn_of_unused_teacher(self) -> None:
        """Warn once that a loss which is computed elsewhere does not hold the teacher's part."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _logger.warning_once(
                "The teacher is not in the loss: the model was called for training without labels. Trainer keeps them "
                "for itself under label_smoothing_factor and compute_loss_func; leave both out."
            )

    def _drop_training_parts(self) -> None:
        super()._drop_training_parts()
        self.side_head = None


def unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those that stand under several names as often as that: timm asks for every name."""
    seen: set[int] = set()
    result = {}
    for key, tensor in state_dict.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return result


# The names of layers are those of the architecture; a file that says otherwise would switch checks off.
_OF_ARCHITECTURE = ("classifier", "first_conv")


def _classifiers(model: EpsResNetPreTrainedModel) -> tuple[str, ...]:
    """Paths of the last layers in the timm model; networks with a distillation token have two."""
    named = model.timm_model.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _check_blocks(model: Any, info: Mapping[str, Iterable[str]], *, replaces_classifier: bool) -> None:
    """Raise ValueError if loading left out, or found too much, of what the caller did not ask to replace."""
    side_head = ("side_head.",)
    fresh = tuple(f"timm_model.{name}." for name in _classifiers(model)) if replaces_classifier else ()
    for verb, keys in (("lack", info["missing_keys"]), ("also hold", info["unexpected_keys"])):
        if strangers := sorted(key for key in keys if not key.startswith((*side_head, *fresh))):
            raise ValueError(
                f"The weights do not fit the {model.config.architecture} that config.json describes with "
                f"{len(removed_slots(model))} removed branches: they {verb} {strangers[0]!r} and {len(strangers) - 1} "
                'more. Keep the list model_args["removed"] with the weights that it was saved with.'
            )


def _check_side_head(info: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError if loading did not find all of a side head that the file asks for."""
    if missing := sorted(key for key in info["missing_keys"] if key.startswith("side_head.")):
        raise ValueError(
            f"config.json has a side_loss_weight, but the weights lack {missing[0]!r} and {len(missing) - 1} more of "
            "the side head. Delete the field; passed to from_pretrained it makes a new side head."
        )


AutoConfig.register(EpsResNetConfig.model_type, EpsResNetConfig, exist_ok=True)
AutoModel.register(EpsResNetConfig, EpsResNetModel, exist_ok=True)
AutoModelForImageClassification.register(EpsResNetConfig, EpsResNetForImageClassification, exist_ok=True)
AutoBackbone.register(EpsResNetConfig, EpsResNetBackbone, exist_ok=True)
AutoImageProcessor.register(
    EpsResNetConfig,
    image_processor_classes={"pil": TimmWrapperImageProcessor, "torchvision": TimmWrapperImageProcessor},
    exist_ok=True,
)
register_checkpoint_conversion_mapping(EpsResNetConfig.model_type, _key_conversions(), overwrite=True)
