"""The pruner: once an epoch it reads the gates, freezes their decisions, and deletes what collapsed."""

from __future__ import annotations

import logging
import math
import numbers
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from .budget import Budget, budget_from
from .cost_schedule import CostEpsilon
from .criteria import Criterion, Response, Seen, criterion_from, ranked_by
from .gate import EpsilonGate
from .importance import note_step, sum_gradients
from .schedule import BudgetEpsilon, ConstantEpsilon
from .surgery.branches import check_input, gates, timm_body
from .surgery.checks import shortened, warn_of_silent, warn_of_undecayed
from .surgery.copies import note_copies
from .surgery.distributed import agreed
from .surgery.followers import follow, left_behind
from .surgery.frozen import FrozenBranches
from .surgery.loading import LoadedStructure
from .surgery.optimizers import Optimizers, forget, innermost
from .surgery.removal import add_gates, remove, removed_slots, replay_removed

_logger = logging.getLogger(__name__)

__all__ = ["EpsilonPruner"]

_STATE = {"epoch", "epsilon", "removed", "streaks", "closed", "responses", "importances", "history"}


class EpsilonPruner:
    """Makes a network shallower while it trains.

    Example::

        optimizer = torch.optim.SGD(timm_eps.param_groups(model, weight_decay=5e-3), lr=0.1, momentum=0.9)
        pruner = timm_eps.EpsilonPruner(model, optimizer, keep=0.25, warmup_epochs=1, ramp_epochs=2, patience=1)
        for epoch in range(6):
            train_one_epoch(model, optimizer)
            removed = pruner.step()

    Weights that are loaded into the model while it has a pruner may lack branches. These branches are first removed
    from the model, its optimizers and its followers. ``accelerator.register_for_checkpointing(pruner)`` with
    ``accelerator.load_state`` therefore resumes a run, and so does Lightning, in any order of loading.

    Args:
        model: Model with gates (any ``eps_*`` model). A timm model without gates gets them here. It must not be wrapped
            or compiled: wrap or compile it after the pruner was made, and give the pruner the model itself.
        optimizer: Optimizer, or a list of them. Parameters of removed blocks and their state are deleted from it; all
            others stay. timm's ``Lookahead`` and Accelerate's wrapper are supported.
        epsilon: The paper's threshold, in activation units, one for the whole network. Exclusive with a budget.
        keep: Fraction (float) or number (int) of branches to keep; ε then follows the responses.
        target_params: Instead of ``keep``, fraction (float up to 1) or number of the network's parameters.
        target_macs: Instead of ``keep``, fraction or number of the multiply-adds for one image of the model's input
            size.
        target_latency: Instead of ``keep``, fraction or milliseconds of a forward pass of 32 such images on the model's
            device. For another batch size pass a ``timm_eps.budget.TargetLatency``.
        warmup_epochs: Number of epochs at the beginning in which every gate is open.
        ramp_epochs: With a budget, number of epochs from the first closed branch to the full budget.
        patience: Number of epochs in a row that a branch must stay closed before it is removed.
        live_removal: Whether to remove branches during training. Otherwise closed branches stay until
            :func:`remove_closed` or a save.
        criterion: With a budget, ranking of the branches: ``'response'``, the largest of an epoch; ``'importance'``,
            the change of the loss without the branch (:meth:`EpsilonGate.measure_importance`); ``'last'``, the last
            branches of the network first; an object of :mod:`timm_eps.criteria`, or your own. With importance and
            ``keep``, each stage keeps its share of the budget, unless the budget has fewer branches than there are
            stages. With any criterion except the response, each branch that is due gets its own ε, twice its response.
            Importance is measured over the steps of the optimizer, only in the epochs after which branches are due:
            pass that optimizer.
        prune_frozen: Whether to remove branches that cannot learn, because none of their parameters needs a gradient.
            By default they stay and count as kept.
        followers: Copies of the model that are updated in place and must have its structure, such as averages of its
            weights: timm's ``ModelEmaV3``, torch's ``AveragedModel``, or the copy in it. After each step they have the
            same closed and removed branches as the model.

    Attributes:
        epoch (int): Number of finished epochs.
        epsilon (float): Threshold of the current epoch; with a budget, that of the branches that are due to close.
        total (int): Number of branches of the unpruned network.
        followers (list): Copies that follow the model; more may be appended.
        history (list[dict]): One record an epoch: ``epoch``, ``epsilon``, ``responses`` (slot to float), ``closed``
            (list of slots, those closed on every batch) and ``removed`` (those removed after it); also
            ``importances`` if they were measured.

    Raises:
        ValueError: Not exactly one of ``epsilon`` and the budgets is given, a value is out of range, the model has no
            residual branches, is wrapped or compiled, or does not take images of its configured size, parameters
            cannot be deleted from the optimizer, or a follower is not a copy of the model.
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
        prune_frozen: bool = False,
        followers: Iterable[Any] = (),
    ) -> None:
        targets = {"target_params": target_params, "target_macs": target_macs, "target_latency": target_latency}
        if sum(value is not None for value in (epsilon, keep, *targets.values())) != 1:
            given = {"epsilon": epsilon, "keep": keep} | {name: v for name, v in targets.items() if v is not None}
            raise ValueError(
                f"Give exactly one of epsilon and keep, or in place of keep one of {', '.join(targets)}; got "
                f"{' and '.join(f'{name}={value!r}' for name, value in given.items())}."
            )
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a whole number of epochs, at least 1, got {patience!r}.")
        self._ranking = criterion_from(criterion)
        if epsilon is not None and not isinstance(self._ranking, Response):
            raise ValueError(f"criterion={criterion!r} goes with keep; a constant epsilon is one for the responses.")
        if keep is not None:
            self.schedule: BudgetEpsilon | ConstantEpsilon = BudgetEpsilon(keep, warmup_epochs, ramp_epochs)
        elif epsilon is None:
            self.schedule = CostEpsilon(budget_from(**targets), warmup_epochs, ramp_epochs)
        elif ramp_epochs:
            raise ValueError(f"ramp_epochs={ramp_epochs} goes with keep; a constant epsilon has no ramp.")
        else:
            self.schedule = ConstantEpsilon(epsilon, warmup_epochs)  # type: ignore[arg-type]
        self.model = model
        self.patience = patience
        self.live_removal = live_removal
        self.criterion = criterion
        self.prune_frozen = prune_frozen
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
        self._stuck: set[str] = set()  # closed, but proven to be needed: not tried again until another one is ready
        self.total = len(self._streaks) + len(removed_slots(model))
        if isinstance(keep, numbers.Integral) and keep > self.total:
            raise ValueError(f"keep={keep} branches, but {type(timm_body(model)).__name__} has only {self.total}.")
        if isinstance(self.schedule, CostEpsilon):
            self.schedule.attach(model)
        # A budget needs responses to measure by, so its first epoch is open whatever the warm-up.
        self._set_thresholds(self.schedule(0, dict.fromkeys(self._streaks, math.inf), self.total))
        LoadedStructure(model, self._lose).install(timm_body(model))
        self._take_along()
        self._warn_of_frozen()
        warn_of_silent(model)
        if self._optimizers:
            warn_of_undecayed(model, self._optimizers)

    @property
    def optimizer(self) -> Optimizers:
        """What holds the model's parameters; it may be set later than the pruner is made."""
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
                self._measure(gate)

    def _measure(self, gate: EpsilonGate) -> None:
        """Measure a gate's importance, over the steps of the optimizer or, without one, over backward passes."""
        if self._optimizers:
            sum_gradients([gate])
        else:
            gate.measure_importance()

    def _note_step(self) -> None:
        if self._measuring:
            note_step(gates(self.model).values())

    @property
    def wanted(self) -> int:
        """Number of branches that the budget keeps; without a budget, all of them."""
        return self.schedule.kept(self.total) if isinstance(self.schedule, BudgetEpsilon) else self.total

    @property
    def discarded(self) -> int:
        """Number of branches that are closed or removed so far."""
        return self.total - sum(not gate.closed for gate in gates(self.model).values())

    def step(self) -> list[str]:
        """End an epoch: close, remove, and set ε for the next.

        A branch that did not run in training mode in this epoch stays as it is. A warning says so if no branch ran. A
        second warning names a copy of the model that is updated in place, such as an average of the weights, but is not
        among the followers.

        Under ``torch.distributed`` every process must call this. All processes decide on the largest response of all of
        them, so they take the same decision.

        Returns:
            The slot paths removed now.
        """
        found = gates(self.model)
        self._streaks = {slot: streak for slot, streak in self._streaks.items() if slot in found}  # see remove_closed
        is_ranked, is_measured = self._is_ranking, self._measuring  # asked now: branches that go change the answer
        staying = self._staying
        responses = self._collect_responses()
        if found and not responses and not self._warned_of_evaluation:
            self._warned_of_evaluation = True
            _logger.warning(
                "No branch saw a batch in training mode before this step(), so nothing can close. Call model.train() "
                "before the training batches, and model.eval() only to evaluate."
            )
        for slot, response in responses.items():
            # In the gate's own precision, or a response right at ε would be judged differently than in training.
            # NaN is not below ε: a diverged branch stays open.
            is_below = slot not in staying and response < found[slot].threshold.item()
            self._streaks[slot] = self._streaks[slot] + 1 if is_below else 0
            found[slot].closed = is_below
        self._keep_one_open(responses)
        closed = [slot for slot in responses if found[slot].closed]
        removed = self._remove([slot for slot in closed if self._streaks[slot] >= self.patience])
        record = {
            "epoch": self.epoch,
            "epsilon": self.epsilon,
            "responses": responses,
            "closed": closed,
            "removed": removed,
        }
        if is_measured:
            record["importances"] = {slot: float(found[slot].importance) for slot in responses}
        self.history.append(record)
        self.epoch += 1
        self._set_thresholds(self._next_thresholds(is_ranked))
        self._take_along()
        for copied in left_behind(self.model, self.followers):
            _logger.warning(
                "A copy of the model (%s) is updated in place, as an average of the weights is, but has not closed and "
                "removed the branches that the model has: what it computes, and what it is updated with, is wrong. "
                "Hand it over: EpsilonPruner(..., followers=[ema]), or pruner.followers.append(ema).",
                type(copied).__name__,
            )
        return removed

    def _keep_one_open(self, responses: Mapping[str, float]) -> None:
        """Open the branch of the largest response, if all branches are closed: a network of none learns nothing."""
        found = gates(self.model)
        if not responses or not all(gate.closed for gate in found.values()):
            return
        strongest = max(responses, key=responses.__getitem__)
        found[strongest].closed = False
        self._streaks[strongest] = 0
        _logger.warning(
            "epsilon=%g would close all %d branches that are left: %s, whose response (%g) is the largest, stays open. "
            "Lower epsilon to keep more.",
            self.epsilon,
            len(found),
            strongest,
            responses[strongest],
        )

    @property
    def _is_ranking(self) -> bool:
        """Whether branches are to be ranked after this epoch."""
        if not isinstance(self.schedule, BudgetEpsilon):
            return False
        return self.schedule.to_close(self.epoch + 1, self.total) > self.total - len(self._streaks)

    @property
    def _measuring(self) -> bool:
        """Whether importances are needed to rank the branches after this epoch."""
        return getattr(self._ranking, "measures_importance", False) and self._is_ranking

    def _next_thresholds(self, is_ranked: bool) -> dict[str, float]:
        """ε of each branch in the epoch that begins, by what the last one showed."""
        responses = self.history[-1]["responses"]
        staying = self._staying
        remaining = {slot: math.inf if slot in staying else responses.get(slot, math.inf) for slot in self._streaks}
        if isinstance(self._ranking, Response):
            thresholds = self.schedule(self.epoch, remaining, self.total)
            is_open = [slot for slot, gate in gates(self.model).items() if not gate.closed]
            # The last open branch is not closed on single batches either: its response may be under a constant ε.
            return {**thresholds, is_open[0]: 0.0} if len(is_open) == 1 else thresholds
        if not is_ranked:
            return dict.fromkeys(self._streaks, 0.0)
        assert isinstance(self.schedule, BudgetEpsilon), "a constant epsilon has no other criterion"
        kept = None if isinstance(self.schedule, CostEpsilon) else self.schedule.kept(self.total)
        removed = removed_slots(self.model)
        seen = Seen(timm_body(self.model), remaining, self._importances(responses), removed, staying, kept)
        ranks = ranked_by(self._ranking, seen)
        # A criterion may say something else in each process: what it says in the first one counts.
        ranks = dict(zip(ranks, agreed(list(ranks.values()), timm_body(self.model)), strict=True))
        due, _ = self.schedule.divide(self.epoch, ranks, self.total)
        found = gates(self.model)
        # Of an empty branch at least the smallest number there is: 0 is not below 0.
        least = {slot: torch.finfo(found[slot].threshold.dtype).tiny for slot in due}
        return {slot: max(2 * remaining[slot], least[slot]) if slot in due else 0.0 for slot in self._streaks}

    def _importances(self, responses: Mapping[str, float]) -> dict[str, float]:
        """The importance of each branch in the last epoch; infinite where it was not measured."""
        if "importances" not in self.history[-1]:
            return dict.fromkeys(self._streaks, math.inf)
        measured = {
            slot: importance
            for slot, importance in self.history[-1]["importances"].items()
            # What is open and responds but got no gradient was not measured: nobody called backward. And what diverged
            # stays open, as it does by its response.
            if slot in self._streaks
            and math.isfinite(responses[slot])
            and math.isfinite(importance)
            and (importance or self._streaks[slot] or not responses[slot])
        }
        if responses and not measured:
            _logger.warning(
                "Nothing closes: no branch has an importance after epoch %d. It is measured by loss.backward(), not by "
                "torch.autograd.grad, from finite gradients.",
                self.epoch - 1,
            )
        return dict.fromkeys(self._streaks, math.inf) | measured

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs, as plain numbers, strings, lists and dicts."""
        found = gates(self.model)
        return {
            "epoch": self.epoch,
            "epsilon": {slot: gate.epsilon for slot, gate in found.items()},
            "removed": removed_slots(self.model),
            "streaks": {slot: self._streaks[slot] for slot in found},
            "closed": [slot for slot, gate in found.items() if gate.closed],
            "responses": {slot: float(gate.response) for slot, gate in found.items()},
            "importances": {slot: float(gate.importance) for slot, gate in found.items()},
            "history": list(self.history),
        } | ({"budget": self.schedule.state_dict()} if isinstance(self.schedule, CostEpsilon) else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state. A model that still has all its blocks gets the saved structure first.

        Load the weights before or after this. Load the optimizer state after one of them, because it fits the smaller
        structure only.

        Raises:
            ValueError: The state belongs to another architecture, or the model lacks blocks that the state still has.
        """
        if missing := _STATE - state.keys():
            raise ValueError(f"Not the state of an EpsilonPruner: it lacks {sorted(missing)}.")
        already = set(removed_slots(self.model))
        if lost := already - set(state["removed"]):
            raise ValueError(f"The model has already lost {sorted(lost)[0]!r}, which the pruner's state still has.")
        if strangers := (gates(self.model).keys() | already) ^ (state["streaks"].keys() | set(state["removed"])):
            raise ValueError(f"The pruner's state is of another model: they differ at {min(strangers)!r}.")
        replay_removed(self.model, set(state["removed"]) - already)
        found = gates(self.model)
        if isinstance(self.schedule, CostEpsilon):
            self.schedule.load_state_dict(state.get("budget", {}))
        self._streaks = dict(state["streaks"])
        self.epoch = state["epoch"]
        self.history = list(state["history"])
        for slot, gate in found.items():
            gate.closed = slot in state["closed"]
        self._set_thresholds(state["epsilon"])
        for slot, gate in found.items():
            gate.response.fill_(state["responses"][slot])
            gate.importance.fill_(state["importances"][slot])
        self._take_along()

    def share_responses(self) -> None:
        """Under ``torch.distributed``, give every process the largest response of all processes, for each gate.

        :meth:`step` calls this. Call it yourself before saving in mid-epoch; otherwise the other processes' responses
        are lost. Every process must call it.
        """
        found = gates(self.model)
        if not (found and dist.is_available() and dist.is_initialized()):
            return
        # A gate that has not run yet may have its response elsewhere.
        device = next(iter(found.values())).threshold.device

        def share(name: str, op: Any, divisor: int = 1) -> None:
            values = torch.stack([getattr(gate, name).float().to(device) for gate in found.values()])
            # MAX does not carry NaN on every backend; infinity keeps a gate open just as well.
            values = torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)
            dist.all_reduce(values, op=op)
            for gate, value in zip(found.values(), values / divisor, strict=True):
                getattr(gate, name).copy_(value)

        share("response", dist.ReduceOp.MAX)
        if self._measuring:
            share("importance", dist.ReduceOp.SUM, dist.get_world_size())

    def _collect_responses(self) -> dict[str, float]:
        """The epoch's response of each branch that ran in training; one that is frozen in evaluation mode has none."""
        self.share_responses()
        found = {slot: float(gate.response) for slot, gate in gates(self.model).items()}
        return {slot: value for slot, value in found.items() if not value < 0}

    def _remove(self, slots: list[str]) -> list[str]:
        if not self.live_removal or self._stuck.issuperset(slots):
            return []
        removed = remove(self.model, slots)
        self._stuck = set(slots).difference(removed)
        for slot in removed:
            del self._streaks[slot]
        return removed

    def _set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        self.epsilon = max(thresholds.values(), default=0.0)
        measuring, staying = self._measuring, self._staying
        for slot, gate in gates(self.model).items():
            gate.epsilon = 0.0 if slot in staying else thresholds[slot]
            gate.reset_response()
            if measuring and gate.gain is None:
                self._measure(gate)
            elif not measuring:
                gate.gain = None

    @property
    def _staying(self) -> set[str]:
        """The slots of branches that must not close."""
        return set() if self.prune_frozen else self._frozen.of(timm_body(self.model))

    def _lose(self, model: nn.Module, slots: list[str]) -> None:
        """Take out of the model the branches that weights which are about to be loaded lack."""
        replay_removed(model, slots)
        self._take_along()

    def _take_along(self) -> None:
        """Let optimizers and followers lose what the model has lost, whoever took it out."""
        parameters = set(self.model.parameters())
        forget(self._optimizers, self._parameters - parameters)
        self._parameters = parameters
        for follower in self.followers:
            follow(self.model, follower)

    def _warn_of_frozen(self) -> None:
        if not (staying := self._staying):
            return
        free = self.total - len(staying)
        wanted = self.total - self.schedule.kept(self.total) if isinstance(self.schedule, BudgetEpsilon) else 1
        if wanted > free:
            _logger.warning(
                "%d of the %d branches are frozen and stay, as none of their parameters needs a gradient (%s): at most "
                "%d branches can go, and %d are to. Unfreeze some of them, raise keep, or pass prune_frozen=True.",
                len(staying),
                self.total,
                shortened(slot for slot in self._streaks if slot in staying),
                free,
                wanted,
            )
