"""The pruner: after each epoch it reads the responses, closes branches, and removes long-closed ones."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .budget import Budget
from .cost_schedule import CostEpsilon, schedule_from
from .criteria import Criterion
from .importance import measure, note_step
from .schedule import BudgetEpsilon, Schedule
from .surgery.branches import check_input, gates, timm_body
from .surgery.checks import warn_of_evaluation, warn_of_frozen, warn_of_silent, warn_of_undecayed
from .surgery.copies import note_copies
from .surgery.distributed import share_measured
from .surgery.followers import follow, warn_of_left_behind
from .surgery.frozen import FrozenBranches
from .surgery.holding import ALWAYS, free_gates, held_slots, hold
from .surgery.loading import LoadedStructure, lost_since
from .surgery.optimizers import Optimizers, forget, innermost
from .surgery.removal import add_gates, remove, removed_slots, replay_removed
from .surgery.sharding import check_optimizers, is_sharded, reshard
from .thresholds import Thresholds, keep_one_open, ranking_for

__all__ = ["EpsilonPruner"]


class EpsilonPruner:
    """Removes residual branches from a network while it trains.

    Example::

        optimizer = torch.optim.SGD(timm_eps.param_groups(model, weight_decay=5e-3), lr=0.1, momentum=0.9)
        pruner = timm_eps.EpsilonPruner(model, optimizer, keep=0.25, warmup_epochs=1, ramp_epochs=2, patience=1)
        for epoch in range(6):
            train_one_epoch(model, optimizer)
            removed = pruner.step()

    Weights that are loaded into the model while it has a pruner may lack branches. These branches are first removed
    from the model, its optimizers and its followers. ``accelerator.register_for_checkpointing(pruner)`` with
    ``accelerator.load_state`` therefore resumes a run. Lightning works as well. The order of loading does not matter.

    Args:
        model: Model with gates (any ``eps_*`` model). A timm model without gates gets them here. It must not be wrapped
            or compiled: create the pruner first, with the model itself, and wrap or compile it afterwards.
        optimizer: Optimizer, or a list of them. Parameters of removed blocks and their state are deleted from it; all
            others stay. timm's ``Lookahead`` and Accelerate's wrapper are supported.
        epsilon: Threshold of the paper, in activation units, one for the whole network. Not allowed with a budget.
        keep: Fraction (float) or number (int) of branches to keep; ε then follows the responses.
        target_params: Instead of ``keep``, fraction (float up to 1) or number of the network's parameters.
        target_macs: Instead of ``keep``, fraction or number of the multiply-adds for one image.
        target_latency: Instead of ``keep``, fraction or milliseconds of a forward pass of 32 such images on the model's
            device. For another batch size pass a ``timm_eps.budget.TargetLatency``.
        warmup_epochs: Number of epochs at the beginning in which every gate is open.
        ramp_epochs: With a budget, number of epochs from the first closed branch to the full budget.
        patience: Number of epochs in a row that a branch must stay closed before it is removed.
        live_removal: Whether to remove branches during training. Otherwise, and if FSDP2 shards the model, closed
            branches stay until :func:`remove_closed` or a save.
        criterion: With a budget, ranking of the branches: ``'response'``, the largest of an epoch; ``'importance'``,
            the change of the loss without the branch, measured over the steps of the optimizer; ``'stage_ends'``, the
            last branches of each stage first; ``'last'``, those of the network; an object of
            :mod:`timm_eps.criteria`, or your own. With any criterion except the response, each branch due to close gets
            its own ε, twice its response. Importance needs the optimizer.
            With ``keep`` and importance, each stage keeps its share.
        schedule: Instead of ``epsilon`` or a budget, an object that returns ε for each epoch: one of
            :mod:`timm_eps.schedule`, or your own.
        prune_frozen: Whether to remove branches without trainable parameters. By default they are kept.
        followers: Averages of the model's weights: timm's ``ModelEmaV3``, torch's ``AveragedModel``, or the copy in it.
            After each step they have the same closed and removed branches as the model.
        measure_always: Whether to measure the responses of all branches in every epoch, for ``history``. By default
            they are measured only in epochs after which they decide, since a gate that is not measured costs nothing.

    Attributes:
        epoch (int): Number of finished epochs.
        epsilon (float): Threshold of the current epoch; with a budget, threshold of the branches due to close.
        total (int): Number of branches of the unpruned network.
        followers (list): Copies that follow the model; more may be appended.
        history (list[dict]): One record per epoch: ``epoch``, ``epsilon``, ``responses`` (slot to float, of the
            measured branches), ``closed`` (list of slots, those closed on every batch) and ``removed`` (those removed
            after it); also ``importances`` if they were measured, and ``held`` (those held closed after it) if FSDP2
            shards the model.

    Raises:
        ValueError: Not exactly one of ``epsilon``, the budgets and ``schedule`` is given, a value is out of range, the
            model has no residual branches, is wrapped or compiled, or does not take images of its configured size,
            parameters cannot be deleted from the optimizer, or a follower is not a copy of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers = None,
        *,
        epsilon: float | None = None,
        keep: float | int | None = None,
        target_params: float | Budget | None = None,
        target_macs: float | Budget | None = None,
        target_latency: float | Budget | None = None,
        warmup_epochs: int = 0,
        ramp_epochs: int = 0,
        patience: int = 3,
        live_removal: bool = True,
        criterion: str | Criterion = "response",
        schedule: Schedule | None = None,
        prune_frozen: bool = False,
        followers: Iterable[Any] = (),
        measure_always: bool = False,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a whole number of epochs, at least 1, got {patience!r}.")
        targets = {"target_params": target_params, "target_macs": target_macs, "target_latency": target_latency}
        schedule = schedule_from(epsilon, keep, targets, warmup_epochs, ramp_epochs, schedule)
        ranking = ranking_for(schedule, criterion)
        self.model = model
        self.patience = patience
        self.live_removal = live_removal
        self.criterion = criterion
        self.prune_frozen = prune_frozen
        self.measure_always = measure_always
        self.followers = list(followers)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self._frozen = FrozenBranches()
        self._handles: list[RemovableHandle] = []
        self._warned_of_evaluation = False
        self.optimizer = optimizer
        if gates(model) or removed_slots(model):
            check_input(timm_body(model))
            note_copies(timm_body(model))
        else:
            add_gates(model)
        self._parameters = set(model.parameters())
        self._streaks = dict.fromkeys(gates(model), 0)
        self._stuck: set[str] = set()  # closed, but the output needs them: retried when another one is ready
        self.total = len(self._streaks) + len(removed_slots(model))
        self._thresholds = Thresholds(model, schedule, ranking, self.total)
        if isinstance(keep, numbers.Integral) and keep > self.total:
            raise ValueError(f"keep={keep} branches, but {type(timm_body(model)).__name__} has only {self.total}.")
        if isinstance(schedule, CostEpsilon):
            schedule.attach(model)
        self._set_thresholds(self._thresholds.first())
        LoadedStructure(model, self._lose).install(timm_body(model))
        self._take_along()
        staying, to_go = self._staying, self.total - self.wanted if isinstance(schedule, BudgetEpsilon) else 1
        warn_of_frozen([slot for slot in self._streaks if slot in staying], self.total, to_go)
        warn_of_silent(model)
        if self._optimizers:
            warn_of_undecayed(model, self._optimizers)

    @property
    def optimizer(self) -> Optimizers:
        """Optimizer of the model's parameters. It may be set after the pruner was created."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizers) -> None:
        self._optimizers = innermost(optimizer)
        self._optimizer = optimizer
        for handle in self._handles:
            handle.remove()
        note = weakref.WeakMethod(self._note_step)

        def before_step(*_: Any) -> None:
            if (noting := note()) is not None:
                noting()

        self._handles = [one.register_step_pre_hook(before_step) for one in self._optimizers]
        for gate in gates(self.model).values():
            if gate.gain is not None:
                measure(gate, over_steps=bool(self._optimizers))

    def _note_step(self) -> None:
        if self._is_measuring:
            note_step(gates(self.model).values())

    @property
    def _done(self) -> list[str]:
        """Slots of the branches that are closed for good, but not removed before the training ends."""
        return [] if self.live_removal else [slot for slot, n in self._streaks.items() if n >= self.patience]

    @property
    def schedule(self) -> Schedule:
        """Schedule that returns ε for each epoch."""
        return self._thresholds.schedule

    @property
    def wanted(self) -> int:
        """Number of branches that the budget keeps; without a budget, all of them."""
        return self._thresholds.wanted

    @property
    def discarded(self) -> int:
        """Number of branches that are closed or removed so far."""
        return self.total - sum(not gate.closed for gate in gates(self.model).values())

    def step(self) -> list[str]:
        """End an epoch: close, remove, and set ε for the next.

        A branch that did not run in training mode in this epoch, or was not measured, stays as it is. A warning is
        logged if no branch ran, and another one if a copy of the model is updated in place but is not among the
        followers.

        Under ``torch.distributed`` every process must call this. All processes use the largest response of all
        processes, so they make the same decision.

        Returns:
            The slot paths removed now.
        """
        found = free_gates(self.model)
        self._streaks = {slot: streak for slot, streak in self._streaks.items() if slot in found}  # see remove_closed
        is_ranked, is_measured, staying = self._is_ranking, self._is_measuring, self._staying  # in the finished epoch
        responses = {slot: value for slot, value in self._collect_responses().items() if slot in found}
        is_looking = any(gate.is_active() for gate in found.values())
        if is_looking and not responses and not self._warned_of_evaluation:
            self._warned_of_evaluation = True
            warn_of_evaluation()
        for slot, response in responses.items():
            # In the gate's precision: otherwise a response equal to ε would be treated differently than in training.
            # NaN is not below ε: a diverged branch stays open.
            is_below = slot not in staying and response < found[slot].threshold.item()
            self._streaks[slot] = self._streaks[slot] + 1 if is_below else 0
            found[slot].closed = is_below
        if opened := keep_one_open(self.model, responses, self.epsilon):
            self._streaks[opened] = 0
        closed = [slot for slot in responses if found[slot].closed]
        removed = self._remove([slot for slot in closed if self._streaks[slot] >= self.patience])
        record = {"epoch": self.epoch, "epsilon": self.epsilon, "responses": responses}
        record |= {"closed": closed, "removed": removed}
        if held := found.keys() & held_slots(self.model):
            record["held"] = sorted(held)
        if is_measured:
            record["importances"] = {slot: float(found[slot].importance) for slot in responses}
        self.history.append(record)
        self.epoch += 1
        self._set_thresholds(self._thresholds.following(record, self._streaks, self._staying, is_ranked, self._done))
        self._take_along()
        warn_of_left_behind(self.model, self.followers)
        return removed

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs, as plain numbers, strings, lists and dicts."""
        found = gates(self.model)
        return {
            "epoch": self.epoch,
            "epsilon": {slot: gate.epsilon for slot, gate in found.items()},
            "removed": removed_slots(self.model),
            "streaks": {slot: self._streaks.get(slot, self.patience) for slot in found},
            "closed": [slot for slot, gate in found.items() if gate.closed],
            "responses": {slot: float(gate.response) for slot, gate in found.items()},
            "importances": {slot: float(gate.importance) for slot, gate in found.items()},
            "history": list(self.history),
        } | ({"budget": self.schedule.state_dict()} if isinstance(self.schedule, CostEpsilon) else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state. A model that still has all its blocks gets the saved structure first.

        Load the weights before or after this. Load the optimizer state afterwards, because it fits only the smaller
        structure.

        Raises:
            ValueError: The state belongs to another architecture, or the model lacks blocks that the state still has.
        """
        replay_removed(self.model, lost_since(self.model, state))
        found = gates(self.model)
        if isinstance(self.schedule, CostEpsilon):
            self.schedule.load_state_dict(state.get("budget", {}))
        for slot, gate in found.items():
            gate.closed, gate.epsilon = slot in state["closed"], state["epsilon"][slot]
        self._streaks = {slot: state["streaks"][slot] for slot in free_gates(self.model)}
        self.epoch = state["epoch"]
        self.history = list(state["history"])
        self._set_thresholds(state["epsilon"])
        for slot, gate in found.items():
            gate.response.fill_(state["responses"][slot])
            gate.importance.fill_(state["importances"][slot])
        self._take_along()

    def share_responses(self) -> None:
        """Under ``torch.distributed``, give every process the largest response of all processes, for each gate.

        :meth:`step` calls this. Call it yourself before saving in mid-epoch; otherwise the checkpoint does not contain
        the responses of the other processes. Every process must call it.
        """
        share_measured(gates(self.model).values(), with_importance=self._is_measuring)

    def _collect_responses(self) -> dict[str, float]:
        """The epoch's response of each branch that ran in training mode."""
        self.share_responses()
        found = {slot: float(gate.response) for slot, gate in gates(self.model).items()}
        return {slot: value for slot, value in found.items() if not value < 0}

    def _remove(self, slots: list[str]) -> list[str]:
        if not self.live_removal or self._stuck.issuperset(slots):
            return []
        if is_sharded(self.model):
            hold(self.model, slots)
            self._streaks = {slot: self._streaks[slot] for slot in free_gates(self.model)}
            return []
        removed = remove(self.model, slots)
        self._stuck = set(slots).difference(removed)
        for slot in removed:
            del self._streaks[slot]
        return removed

    def _set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        found, staying, when = free_gates(self.model), self._staying, (self.epoch, self._done)
        self._is_ranking = self._thresholds.is_ranking(*when)
        self._is_measuring = measuring = self._thresholds.is_measuring(*when)
        reading = self.measure_always or self._thresholds.reads_responses(*when)
        if lacking := found.keys() - thresholds.keys():
            raise ValueError(f"The schedule returned no epsilon for {min(lacking)!r}; each branch needs one.")
        self.epsilon = max((value for value in thresholds.values() if value < ALWAYS), default=0.0)
        for slot, gate in found.items():
            gate.epsilon = 0.0 if slot in staying else thresholds[slot]
            gate.reset_response()
            # A closed branch that may open again is measured, too.
            gate.measures_response = reading or gate.closed
            if measuring and gate.gain is None:
                measure(gate, over_steps=bool(self._optimizers))
            elif not measuring:
                gate.gain = None

    @property
    def _staying(self) -> set[str]:
        """The slots of branches that must not close."""
        return set() if self.prune_frozen else self._frozen.of(timm_body(self.model))

    def _lose(self, model: nn.Module, slots: list[str]) -> None:
        """Remove the branches that are missing in the weights to be loaded."""
        replay_removed(model, slots)
        self._take_along()

    def _take_along(self) -> None:
        """Remove from optimizers and followers whatever was removed from the model."""
        reshard(self.model)
        parameters = set(self.model.parameters())
        # From a sharded model nothing is removed, but sharding has replaced its parameters.
        take_out = check_optimizers if is_sharded(self.model) else forget
        take_out(self._optimizers, self._parameters - parameters)
        self._parameters = parameters
        for follower in self.followers:
            follow(self.model, follower)
