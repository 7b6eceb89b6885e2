"""A callback that runs the pruner in ``transformers.Trainer``.

A callback gets the model, the optimizer and the state, but neither the checkpoint for resuming nor the wrapper for
distributed training. When Trainer loads a checkpoint, the smaller structure is found from the names of the weights. It
is compared with the pruner's state as soon as that is available.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..budget import Budget
from ..criteria import Criterion
from ..pruner import EpsilonPruner
from ..schedule import Schedule
from ..surgery.distributed import on_first_forward, wrap_again
from ..surgery.loading import LoadedStructure, keys_of
from ..surgery.optimizers import Optimizers, forget, innermost
from ..surgery.parameters import bounding_parameters
from ..surgery.removal import removed_slots, replay_removed
from ..surgery.sharding import NO_DEEPSPEED, NO_FSDP1
from .pretrained_eps_resnet import EpsResNetPreTrainedModel

__all__ = ["EpsilonCallback"]

_logger = logging.get_logger(__name__)


class _Resumed(LoadedStructure):
    """Removes the branches that are missing in the checkpoint from which Trainer resumes.

    Args:
        model_and_lose: Arguments of the base class.
        always: Whether to act on a strict ``load_state_dict``, too. Trainer's call is not strict. A model that may
            belong to another Trainer rejects weights without these branches as usual.
    """

    def __init__(self, *model_and_lose: Any, always: bool = True) -> None:
        super().__init__(*model_and_lose)
        self._always = always

    def __call__(self, body: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        model = None if self._model is None else self._model()
        if not (self._always or getattr(model, "loads_leniently", False)):
            return
        super().__call__(body, state_dict, prefix, *rest)
        names = {name for name in keys_of(state_dict, prefix) if not name.endswith(".closed")}
        if removed_slots(body) and (strangers := names - body.state_dict().keys()):
            raise ValueError(
                f"The weights contain {min(strangers)!r}, which is removed from this model. Give Trainer a model with "
                "all its blocks, or the model that from_pretrained loads from the checkpoint."
            )


class EpsilonCallback(TrainerCallback, ExportableState):
    """Removes residual branches from the network that a :class:`transformers.Trainer` trains.

    Example::

        from transformers import Trainer, TrainingArguments

        config = timm_eps.EpsResNetConfig(architecture="eps_resnet20", num_labels=10)
        callback = timm_eps.EpsilonCallback(keep=0.5, warmup_epochs=1, ramp_epochs=1, patience=1)
        trainer = Trainer(
            timm_eps.EpsResNetForImageClassification(config),
            TrainingArguments("out", num_train_epochs=3, weight_decay=5e-3),
            train_dataset=dataset,  # items with pixel_values (C, H, W) and labels
            callbacks=[callback],
        )
        trainer.train()

    At the end of each epoch it calls ``step`` of an :class:`~timm_eps.EpsilonPruner`, which removes blocks and updates
    ``model.config`` and the optimizer. Checkpoints contain the model in training form, with closed branches and the
    side head. ``trainer.train(resume_from_checkpoint=True)`` continues from them exactly, with a model that still has
    all its blocks or that was loaded from the checkpoint. ``trainer.save_model()`` saves the model without closed
    branches and side head. The gates need ``weight_decay``: set it in the TrainingArguments. Trainer does not decay
    biases and some norms. The callback decays those that bound a branch's response, decoupled from the gradient.

    Under DistributedDataParallel all processes make the same decisions, based on the responses of all processes. Under
    FSDP2 closed branches stay zero, and ``trainer.save_model()`` leaves them out.

    Args:
        epsilon: Threshold of the paper. Not allowed with a budget.
        keep: Fraction (float) or number (int) of branches to keep.
        warmup_epochs: Number of epochs at the beginning in which every gate is open.
        ramp_epochs: With a budget, number of epochs from the first closed branch to the full budget.
        patience: Number of epochs in a row that a branch must stay closed before it is removed.
        live_removal: Whether to remove branches during training. Otherwise closed branches stay until the model is
            saved.
        criterion: With a budget, ranking of the branches: ``'response'``, ``'importance'`` or an object of
            :mod:`timm_eps.criteria`, as for the pruner.
        target_params: Instead of ``keep``, fraction or number of the parameters, as for the pruner.
        target_macs: Instead of ``keep``, fraction or number of the multiply-adds for one image.
        target_latency: Instead of ``keep``, fraction or milliseconds of a forward pass.
        prune_frozen: Whether to remove branches without trainable parameters.
        schedule: Instead of ``epsilon`` or a budget, an object that returns ε for each epoch.
        measure_always: Whether to measure the responses of all branches in every epoch, for ``pruner.history``.

    Attributes:
        pruner (EpsilonPruner | None): The pruner; None before the training begins.
        followers (list): Copies of the model that are updated in place, such as averages of its weights. They are
            passed to the pruner.

    Raises:
        ValueError: Raised when the Trainer is created, or its training begins. The model is not one of this package's
            transformers classes, the arguments do not fit it, the run resumes from a checkpoint of another network or
            without the pruner's state, ``load_best_model_at_end`` is set, the parameters are sharded by FSDP1 or
            DeepSpeed, or Trainer would run the model on several GPUs in one process (``nn.DataParallel``).
    """

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        keep: float | int | None = None,
        warmup_epochs: int = 0,
        ramp_epochs: int = 0,
        patience: int = 3,
        live_removal: bool = True,
        criterion: str | Criterion = "response",
        prune_frozen: bool = False,
        target_params: float | Budget | None = None,
        target_macs: float | Budget | None = None,
        target_latency: float | Budget | None = None,
        schedule: Schedule | None = None,
        measure_always: bool = False,
    ) -> None:
        self.arguments: dict[str, Any] = {
            "epsilon": epsilon,
            "keep": keep,
            "warmup_epochs": warmup_epochs,
            "ramp_epochs": ramp_epochs,
            "patience": patience,
            "live_removal": live_removal,
            "criterion": criterion,
            "schedule": schedule,
            "target_params": target_params,
            "target_macs": target_macs,
            "target_latency": target_latency,
            "prune_frozen": prune_frozen,
            "measure_always": measure_always,
        }
        self.followers: list[Any] = []
        self.pruner: EpsilonPruner | None = None
        self._wrapper: DistributedDataParallel | None = None
        self._ended: tuple[int, dict[str, float]] = (-1, {})
        self._undecayed: set[nn.Parameter] = set()
        self._given: Optimizers = None
        self._parameters: set[nn.Parameter] = set()  # of the model, until the pruner is created
        self._expects_models = False

    def state(self) -> dict[str, Any]:
        """The state that Trainer saves in a checkpoint's ``trainer_state.json``."""
        plain = str | int | float | None
        # Objects are saved as their names, since a callback with objects cannot be made from a checkpoint.
        args = {name: v if isinstance(v, plain) else repr(v) for name, v in self.arguments.items()}
        return {"args": args, "attributes": {"saved": self.pruner.state_dict() if self.pruner else None}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.deepspeed:
            raise ValueError(NO_DEEPSPEED)
        if args.fsdp and args.fsdp_plugin_args["fsdp_version"] == 1:
            raise ValueError(NO_FSDP1)
        if args.n_gpu > 1:
            raise ValueError(
                f"Trainer would run the model on {args.n_gpu} GPUs with nn.DataParallel, which keeps only the "
                "responses of the first GPU. Start one process for each GPU with torchrun "
                f"--nproc_per_node={args.n_gpu} or accelerate launch, or use one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        model = _checked(kwargs["model"])
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end is not supported: the best checkpoint may have more blocks than the final "
                "model. Disable it, and let warmup_epochs + ramp_epochs end well before num_train_epochs, so that the "
                "network can recover."
            )
        if args.label_smoothing_factor and getattr(model, "side_head", None) is not None:
            _logger.warning(
                "label_smoothing_factor turns side supervision off, because Trainer computes that loss outside the "
                "model, from its logits. Set side_loss_weight to 0 in the model's config, or use a compute_loss_func "
                "with label smoothing that adds side_loss_weight times the same loss of outputs.side_logits."
            )
        self._given, self._parameters = kwargs["optimizer"], set(model.parameters())
        _Resumed(model, self.lose).install(model.timm_model)
        self._expect_models()

    def _expect_models(self) -> None:
        """Also install the hook on models made by Trainer's ``model_init``, before it loads their weights."""
        if self._expects_models:
            return
        self._expects_models = True
        reference = weakref.ref(self)

        def registered(owner: nn.Module, name: str, module: nn.Module | None) -> None:
            callback = reference()
            is_ours = name == "timm_model" and isinstance(owner, EpsResNetPreTrainedModel)
            if is_ours and module is not None and callback is not None:
                _Resumed(owner, callback.lose, always=False).install(module)

        weakref.finalize(self, register_module_module_registration_hook(registered).remove)

    def lose(self, model: EpsResNetPreTrainedModel, slots: list[str]) -> None:
        """Remove branches that a checkpoint lacks from a model, and from the optimizer that was passed to Trainer.

        The pruner of an earlier training updates that training's optimizer.
        """
        replay_removed(model, slots)  # none if a callback of another Trainer was called first
        forget(innermost(self._given), self._parameters.difference(model.parameters()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _checked(kwargs["model"])
        if not args.weight_decay:
            _logger.warning("weight_decay is 0 in the TrainingArguments, so closed branches do not become empty.")
        self.pruner = EpsilonPruner(model, **self.arguments, followers=self.followers)
        self.pruner.optimizer = kwargs["optimizer"]  # late: the callback decays the parameters that it exempts
        self.followers = self.pruner.followers  # the same list, so that users may append
        self._parameters = set()
        self._expect_models()
        self._ended = (-1, {})
        if state.global_step:
            self.pruner.load_state_dict(_saved_state(state, model))
        model.keeps_training_parts = "in checkpoints"
        bounding = bounding_parameters(model)
        self._undecayed = {
            parameter
            for group in kwargs["optimizer"].param_groups
            if not group.get("weight_decay")
            for parameter in group["params"]
            if parameter in bounding
        }
        self._check_epochs(state.num_train_epochs)
        if args.world_size > 1:
            on_first_forward(kwargs["model"], self._note_wrapper)

    def _check_epochs(self, epochs: int) -> None:
        if self.arguments["keep"] is None:
            return
        # With a budget all branches are open in the first epoch, because there are no responses yet.
        needed = max(1, self.arguments["warmup_epochs"]) + max(1, self.arguments["ramp_epochs"])
        if needed > epochs:
            _logger.warning(
                "The budget keep=%s cannot be reached: warmup_epochs=%d and ramp_epochs=%d need %d epochs, and the "
                "training has %d.",
                self.arguments["keep"], self.arguments["warmup_epochs"], self.arguments["ramp_epochs"], needed, epochs,
            )  # fmt: skip

    def _note_wrapper(self, wrapper: DistributedDataParallel) -> None:
        self._wrapper = wrapper

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with torch.no_grad():
            for group in kwargs["optimizer"].param_groups:
                for parameter in self._undecayed.intersection(group["params"]):
                    parameter.mul_(1 - group["lr"] * args.weight_decay)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.pruner is not None, "the training has begun"
        if state.epoch is not None and float(state.epoch).is_integer():
            # Not in on_epoch_end: a checkpoint of this step is written before that, and a run that resumes from it
            # begins with the next epoch.
            self._end_epoch(args, state)
        elif control.should_save:
            self.pruner.share_responses()  # one process saves the checkpoint for all

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self._ended[0]:  # for data without a length, the last step of an epoch is unknown
            self._end_epoch(args, state)

    def _end_epoch(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.pruner is not None, "the training has begun"
        self._ended = state.global_step, self._progress()  # logs of an epoch's last step belong to that epoch
        discarded = self.pruner.discarded
        removed = self.pruner.step()
        if removed and self._wrapper is not None:
            wrap_again(self._wrapper)
        if args.torch_compile and self.pruner.discarded != discarded:
            torch.compiler.reset()  # otherwise torch stops compiling after a number of structures

    def _progress(self) -> dict[str, float]:
        assert self.pruner is not None, "the training has begun"
        return {"epsilon": self.pruner.epsilon, "blocks": self.pruner.total - self.pruner.discarded}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.pruner is not None and "loss" in kwargs["logs"]:
            ended, before = self._ended
            added = before if state.global_step == ended else self._progress()
            kwargs["logs"] |= added
            state.log_history[-1] |= added  # Trainer copied the logs before calling the callbacks

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _checked(kwargs["model"]).keeps_training_parts = False
        if self.pruner is not None and (left := self.pruner.total - self.pruner.discarded) > self.pruner.wanted:
            _logger.warning(
                "The budget was not reached: %d branches were requested, %d of %d remain. Train for more epochs, or "
                "shorten warmup_epochs and ramp_epochs.",
                self.pruner.wanted, left, self.pruner.total,
            )  # fmt: skip


def _checked(model: nn.Module) -> EpsResNetPreTrainedModel:
    """The model, or the one backbone of this package in a transformers model around it."""
    if isinstance(model, EpsResNetPreTrainedModel):
        return model
    inside = [part for part in model.modules() if isinstance(part, EpsResNetPreTrainedModel)]
    if len(inside) != 1 or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"EpsilonCallback needs a model that saves its structure, not {type(model).__name__}. Wrap a timm model "
            "with EpsResNetForImageClassification.from_timm(model), or build a detector or segmenter of transformers "
            "with an EpsResNetConfig as its backbone_config."
        )
    return inside[0]


def _saved_state(state: TrainerState, model: EpsResNetPreTrainedModel) -> dict[str, Any]:
    """The pruner's state in the checkpoint from which Trainer has just loaded the weights."""
    callbacks: Any = state.stateful_callbacks  # by name if read from a checkpoint
    stored = callbacks.get(EpsilonCallback.__name__)
    if not isinstance(stored, dict) or not (saved := stored["attributes"]["saved"]):
        raise ValueError(
            f"The checkpoint of step {state.global_step} has no state of an EpsilonCallback, so the progress of "
            "pruning is unknown. Load its model with from_pretrained and start a new training."
        )
    if removed_slots(model) != saved["removed"]:
        raise ValueError(
            f"The weights of the checkpoint of step {state.global_step} lack {len(removed_slots(model))} branches, but "
            f"its pruner had removed {len(saved['removed'])}; they are from different runs."
        )
    return saved
