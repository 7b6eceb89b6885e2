"""Branches that cannot learn: none of their parameters needs a gradient."""

from __future__ import annotations

from torch import nn

from .branches import branch_parameters, gates, slots_by_block

__all__ = ["FrozenBranches"]


class FrozenBranches:
    """Finds frozen branches. Branches may be frozen and unfrozen while the model trains."""

    def __init__(self) -> None:
        self._parameters: dict[str, list[str]] = {}  # names, of branches in partly frozen blocks

    def of(self, body: nn.Module) -> set[str]:
        """The slots of branches whose parameters all need no gradient. Branches without parameters are not included."""
        frozen: set[str] = set()
        for path, slots in slots_by_block(body, gates(body)).items():
            trained = {parameter.requires_grad for parameter in body.get_submodule(path).parameters()}
            if trained == {False}:
                frozen.update(slots)
            elif False in trained:
                frozen.update(slot for slot in slots if self._is_frozen(body, slot))
        return frozen

    def _is_frozen(self, body: nn.Module, slot: str) -> bool:
        if slot not in self._parameters:
            self._parameters[slot] = list(branch_parameters(body, [slot]))
        parameters = [body.get_parameter(name) for name in self._parameters[slot]]
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
