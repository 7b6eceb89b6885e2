"""Base of the transformers classes: initialisation, strict loading, and saving in evaluation form.

The classes are transformers' timm wrapper with three changes. Weights are initialised as in timm, pruned structures
can be saved and loaded, and the classification loss has the paper's side term.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TimmWrapperPreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files.edits import restore_constants
from ..files.strict_loading import align_weights
from ..files.weight_checks import check_numbers
from ..models.cifar_blocks import init_weights
from ..models.stored import set_closed
from ..surgery.branches import gates, slots_by_block, timm_body
from ..surgery.removal import add_gates, closed_slots, collapsed_copy, removed_slots, structure_of
from ..surgery.sharding import filled, gathered, is_sharded
from ..surgery.wrapping import recorded
from .configuration_eps_resnet import EpsResNetConfig
from .model_files import TransformersFiles, bind_weights, check_outputs, check_rebuilt, staged
from .side_supervision import new_side_head

__all__ = ["KEY_CONVERSIONS", "EpsResNetPreTrainedModel", "classifier_paths", "unshared"]

# Checkpoints have timm's keys. The wrapper's keys begin with ``timm_model.``, except those of the side head.
KEY_CONVERSIONS: list[WeightConverter | WeightRenaming] = [
    WeightRenaming(r"^(?!timm_model\.|side_head\.)(.+)", r"timm_model.\1")
]


class EpsResNetPreTrainedModel(TimmWrapperPreTrainedModel):
    """Base of the ε-ResNet classes: initialisation, loading and saving.

    Attributes:
        keeps_training_parts (bool | str): Whether to save the model in its training form, with closed branches and the
            side head, so that a run can resume: False, True, or ``"in checkpoints"`` (only in directories named like
            Trainer's checkpoints). transformers can load this form, timm cannot.
        loads_leniently (bool): True while ``load_state_dict(..., strict=False)`` runs, because torch's hooks do not get
            ``strict``.
    """

    config_class = EpsResNetConfig
    config: EpsResNetConfig
    timm_model: Any
    _weight_conversions: list[WeightConverter | WeightRenaming]
    keeps_training_parts: bool | str = False
    is_headless = False
    loads_leniently: bool = False

    def post_init(self) -> None:
        # When loading, only the config knows the input of this model, which probes and image processors need.
        described = {name: v for name, v in (self.config.pretrained_cfg or {}).items() if name not in _OF_ARCHITECTURE}
        self.timm_model.pretrained_cfg = {**self.timm_model.pretrained_cfg, **described}
        if not any(parameter.is_meta for parameter in self.timm_model.parameters()):
            for module in self.timm_model.modules():
                module._is_hf_initialized = True  # timm has initialised it
        # The blocks are what device_map="auto" keeps on one device, and what FSDP shards one by one.
        paths = slots_by_block(self.timm_model, gates(self.timm_model))
        self._no_split_modules = sorted({type(self.timm_model.get_submodule(path)).__name__ for path in paths})
        super().post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Like :meth:`transformers.PreTrainedModel.from_pretrained`, but strict about the weights.

        Only the classifier may differ from the file, and only with ``ignore_mismatched_sizes=True`` or if the stored
        network has no classifier.

        Raises:
            ValueError: The file does not fit ``config.json``, or contains NaN. transformers alone would initialise
                missing weights randomly, with a warning.
        """
        gives_side_loss_weight = "side_loss_weight" in kwargs
        kwargs.setdefault("use_safetensors", True)  # other formats can contain code
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
            model._record_structure()
        restore_constants(model.timm_model)
        align_weights(model)
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict with the keys of this class, of its files, or of the timm network alone."""
        if any(key.startswith("side_head.") for key in state_dict):
            own = ("timm_model.", "side_head.")
            state_dict = {key if key.startswith(own) else f"timm_model.{key}": v for key, v in state_dict.items()}
        whole = any(key.startswith("timm_model.") for key in state_dict)
        if not strict and not hasattr(state_dict, "_metadata"):
            # Closed gates are in the configuration of a checkpoint, not in its weights, so they stay as they are.
            prefix = "timm_model." if whole else ""
            notes = {f"{prefix}{slot}.closed": torch.ones((), dtype=torch.bool) for slot in closed_slots(self)}
            state_dict = {**notes, **state_dict}
        self.loads_leniently = not strict
        try:
            return nn.Module.load_state_dict(self if whole else self.timm_model, state_dict, strict, assign)
        finally:
            self.loads_leniently = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like :meth:`torch.nn.Module.state_dict`, with an entry for each closed gate."""
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
        """Save the model in evaluation form: without closed branches and without the side head.

        The files are written to a temporary directory first. Then the network is rebuilt from the configuration, and
        its names, shapes and outputs are compared. Only then the files are moved into place. The arguments are those of
        :meth:`transformers.PreTrainedModel.save_pretrained`. Every process must call this for a model sharded by FSDP2,
        unless the whole ``state_dict`` is passed; the first process writes.

        Raises:
            ValueError: The configuration cannot describe the network, for example after modules were replaced by hand;
                or weights are NaN or infinite, or have several precisions.
        """
        if is_sharded(self):
            whole = gathered(self, on_main=True) if state_dict is None else filled(self, state_dict)
            if whole is not None and is_main_process:
                whole.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(save_directory).name)
        keeps_parts = self.keeps_training_parts is True or bool(self.keeps_training_parts and is_checkpoint)
        if keeps_parts:
            written = copy.copy(self)
            written.config = copy.deepcopy(self.config)
        else:
            written = collapsed_copy(self)
            written._drop_training_parts()
        # transformers would save the keys that it loaded, maybe with the wrapper's prefix, but timm needs its own keys.
        written._weight_conversions = KEY_CONVERSIONS
        # The structure is read from the network, which may have been pruned directly.
        written._record_structure()
        weights = {name: tensor for name, tensor in written.state_dict().items() if not name.endswith(".closed")}
        if state_dict is not None:
            if missing := sorted(weights.keys() - state_dict.keys()):
                raise ValueError(f"state_dict lacks {missing[0]!r} and {len(missing) - 1} more keys of the model.")
            weights = {name: state_dict[name] for name in weights}
        for name, tensor in weights.items():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"{name} is a {type(tensor).__name__}, which config.json cannot describe. Save the model before "
                    "quantizing or sharding it."
                )
        check_numbers(weights, source="the model")
        kinds = {str(tensor.dtype) for tensor in weights.values() if tensor.is_floating_point()}
        if len(kinds) > 1:
            raise ValueError(f"The weights have several precisions, {', '.join(sorted(kinds))}; use model.to(dtype).")
        if not is_main_process:
            return
        with staged(save_directory) as staging:
            super(EpsResNetPreTrainedModel, written).save_pretrained(staging, state_dict=unshared(weights), **kwargs)
            check_rebuilt(type(self), staging)
            if not keeps_parts:  # checkpoints are frequent, and the network was checked at the start
                check_outputs(written, staging)
            bind_weights(staging)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _drop_training_parts(self) -> None:
        self.config.side_loss_weight = 0.0

    def on_structure_change(self) -> None:
        """Update the model after branches were removed. Code that removes a branch calls this."""
        self._record_structure()

    def _record_structure(self) -> None:
        """Write the removed branches and closed gates to the configuration."""
        self.config.note_structure(structure_of(self))

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
            ValueError: The model cannot be rebuilt from a name and arguments.
        """
        config = EpsResNetConfig.from_timm(model, **config_fields)
        model = timm_body(model)
        if not gates(model) and not removed_slots(model):
            add_gates(model)
        with torch.device("meta"):
            wrapper: Any = cls(config)
        wrapper.timm_model = model
        if getattr(wrapper, "side_head", None) is not None:
            wrapper.on_structure_change()
            wrapper.side_head = new_side_head(model)
            wrapper.side_head.apply(wrapper._init_weights)
        return wrapper


def unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies shared tensors so that every name has its own: timm requires all keys."""
    seen: set[int] = set()
    result = {}
    for key, tensor in state_dict.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return result


# Layer names come from the architecture, because a file with other names could disable checks.
_OF_ARCHITECTURE = ("classifier", "first_conv")


def classifier_paths(model: EpsResNetPreTrainedModel) -> tuple[str, ...]:
    """Paths of the last layers in the timm model; networks with a distillation token have two."""
    named = model.timm_model.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _check_blocks(model: Any, info: Mapping[str, Iterable[str]], *, replaces_classifier: bool) -> None:
    """Raise ValueError if loading had missing or unexpected tensors that the caller did not ask to replace."""
    side_head = ("side_head.",)
    fresh = tuple(f"timm_model.{name}." for name in classifier_paths(model)) if replaces_classifier else ()
    for verb, keys in (("lack", info["missing_keys"]), ("also hold", info["unexpected_keys"])):
        if strangers := sorted(key for key in keys if not key.startswith((*side_head, *fresh))):
            raise ValueError(
                f"The weights do not fit the {model.config.architecture} that config.json describes with "
                f"{len(removed_slots(model))} removed branches: they {verb} {strangers[0]!r} and {len(strangers) - 1} "
                'more. Use the list model_args["removed"] that was saved with these weights.'
            )


def _check_side_head(info: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError if the file requests a side head, but its weights are incomplete."""
    if missing := sorted(key for key in info["missing_keys"] if key.startswith("side_head.")):
        raise ValueError(
            f"config.json has a side_loss_weight, but the weights lack {missing[0]!r} and {len(missing) - 1} more of "
            "the side head. Delete the field, or pass it to from_pretrained for a new side head."
        )
