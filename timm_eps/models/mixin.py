"""Gates for your own timm model class."""

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

default_cfgs: dict[str, DefaultCfg] = {}  # timm reads this when a name is registered


class _Gated(type):
    """Makes ``isinstance`` true for all networks with gates or removed branches."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        if cls is not EpsilonMixin or not isinstance(instance, nn.Module):
            return False
        has_gates = any(isinstance(module, EpsilonGate) for module in instance.modules())
        return has_gates or bool(getattr(instance, "removed", None))


class EpsilonMixin(nn.Module, metaclass=_Gated):
    """Adds gates, and the keywords ``removed`` and ``closed``, to a timm model class, the next base class.

    Example::

        class GatedResNet(timm_eps.EpsilonMixin, timm.models.ResNet):
            pass

        layers = {"first_conv": "conv1", "classifier": "fc"}
        GatedResNet.register("eps_small_resnet", layers, block=timm.models.resnet.BasicBlock, layers=(1, 2, 2, 1))
        model = timm.create_model("eps_small_resnet", num_classes=10)
        timm_eps.prune(model, ["layer2.1.drop_path"])
        timm_eps.save_pretrained(model, "small")
        again = timm.create_model("local-dir:small", pretrained=True)

    The ``forward``, the keys and the weights of the class do not change. timm's registered architectures have
    twins, such as ``timm.create_model('eps_resnet18')``. For ``isinstance``, twins and all other models with gates are
    instances of this class, too.

    Args:
        args: Arguments of the timm class.
        removed: Slot paths of removed branches, as returned by :func:`timm_eps.remove_closed`.
        closed: Slot paths of closed gates, whose branches are not removed.
        kwargs: Keyword arguments of the timm class.

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
        """Register networks of this class under a name, so that timm and transformers build, save, load and push them.

        Code that loads such a network must first import the code that registers it, as for any custom timm model.

        Args:
            name: Name that begins with ``eps_``.
            cfg: Fields of timm's description that differ from ImageNet's mean, deviation and 224x224, such as
                ``input_size``; and ``first_conv`` and ``classifier``, the paths of these layers.
            defaults: Keyword arguments of the class. Arguments of ``timm.create_model`` take precedence. They must be
                representable in JSON.

        Returns:
            The entrypoint that ``timm.create_model`` calls.

        Raises:
            ValueError: The name does not begin with ``eps_``, or timm already has a model with this name.
        """
        if not name.startswith(PREFIX) or not name.isidentifier():
            raise ValueError(f"name must be an identifier that begins with {PREFIX}, got {name!r}.")
        if is_model(name) and name not in default_cfgs:  # a notebook cell may run twice
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
