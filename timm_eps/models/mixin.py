"""Gates for a timm model class of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..surgery.removal import add_gates, replay_removed
from .stored import set_closed

__all__ = ["EpsilonMixin"]


class EpsilonMixin(nn.Module):
    """Adds gates, and the keywords ``removed`` and ``closed``, to a timm model class that stands behind it.

    Example::

        class GatedResNet(timm_eps.EpsilonMixin, timm.models.ResNet):
            pass

        model = GatedResNet(timm.models.resnet.BasicBlock, (2, 2, 2, 2), num_classes=10)

    Nothing else of the class changes: its ``forward``, its keys and its weights are timm's. For timm's registered
    architectures there are twins, such as ``timm.create_model('eps_resnet18')``.

    Args:
        args: Those of the class behind.
        removed: Slot paths of removed branches, as :func:`timm_eps.remove_closed` returns them.
        closed: Slot paths of closed gates, whose branches are still there.
        kwargs: Those of the class behind.

    Raises:
        ValueError: The class has no residual branches, or ``removed`` or ``closed`` names one that it does not have.
    """

    def __init__(self, *args: Any, removed: Iterable[str] = (), closed: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_gates(self)
        replay_removed(self, removed)
        set_closed(self, closed)
