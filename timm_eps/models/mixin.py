"""Gates for a timm model class of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import nn

from ..gate import EpsilonGate
from ..names import PREFIX, note_original
from ..surgery.removal import add_gates, replay_removed
from .stored import create_stored, set_closed

__all__ = ["EpsilonMixin"]

default_cfgs: dict[str, DefaultCfg] = {}  # where timm looks when a name is registered


class _Gated(type):
    """Lets ``isinstance`` say of all networks with gates, or that have lost branches, that they have been gated."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        if cls is not EpsilonMixin or not isinstance(instance, nn.Module):
            return False
        has_gates = any(isinstance(module, EpsilonGate) for module in instance.modules())
        return has_gates or bool(getattr(instance, "removed", None))


class EpsilonMixin(nn.Module, metaclass=_Gated):
    """Adds gates, and the keywords ``removed`` and ``closed``, to a timm model class that stands behind it.

    Example::

        class GatedResNet(timm_eps.EpsilonMixin, timm.models.ResNet):
            pass

        layers = {"first_conv": "conv1", "classifier": "fc"}
        GatedResNet.register("eps_small_resnet", layers, block=timm.models.resnet.BasicBlock, layers=(1, 2, 2, 1))
        model = timm.create_model("eps_small_resnet", num_classes=10)
        timm_eps.prune(model, ["layer2.1.drop_path"])
        timm_eps.save_pretrained(model, "small")
        again = timm.create_model("local-dir:small", pretrained=True)

    Nothing else of the class changes: its ``forward``, its keys and its weights are timm's. For timm's registered
    architectures there are twins, such as ``timm.create_model('eps_resnet18')``; they, too, are instances of this class
    to ``isinstance``, as is every model with gates.

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

    @classmethod
    def register(cls, name: str, cfg: dict[str, Any] | None = None, **defaults: Any) -> Callable[..., nn.Module]:
        """Give networks of this class a name, by which timm and transformers build, save, load and push them.

        Who loads such a network must have imported the code that registers it, as with any model of one's own in timm.

        Args:
            name: Begins with ``eps_``.
            cfg: What timm is to know of the network besides ImageNet's mean, deviation and 224x224: fields such as
                ``input_size``, and ``first_conv`` and ``classifier``, the paths of these layers.
            defaults: Keyword arguments of the class. What ``timm.create_model`` is given wins over them. JSON must be
                able to hold it.

        Returns:
            The entrypoint that ``timm.create_model`` calls.

        Raises:
            ValueError: The name does not begin so, or timm has a model of that name.
        """
        if not name.startswith(PREFIX) or not name.isidentifier():
            raise ValueError(f"name must be an identifier that begins with {PREFIX}, got {name!r}.")
        if is_model(name) and name not in default_cfgs:  # a notebook's cell may run again
            raise ValueError(f"name {name!r} is taken; timm.list_models('{PREFIX}*') lists all of them.")

        def build(pretrained: bool, load: Callable[[nn.Module], None] | None, /, **kwargs: Any) -> nn.Module:
            def network(**arguments: Any) -> nn.Module:
                model = cls(**{**defaults, **arguments})
                if load is not None:
                    load(model)
                return model

            return build_model_with_cfg(network, name, pretrained, **kwargs)

        def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            return create_stored(name, build, pretrained, kwargs)

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__doc__ = f"A {cls.__name__}; takes its keywords, and ``removed``."
        note_original(name)
        known: dict[str, Any] = {"num_classes": 1000, "input_size": (3, 224, 224), "first_conv": None}
        known |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        default_cfgs.update(generate_default_cfgs({name: known | (cfg or {})}))
        register_model(entrypoint)
        return entrypoint
