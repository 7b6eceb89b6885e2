"""The gated twins of timm's residual architectures: ``eps_resnet50``, ``eps_convnext_tiny``, ``eps_vit_base_…``.

timm's entrypoint builds a twin, so it has timm's class and keywords, and loads timm's published weights by their tags
and Hub ids. Then gates are added, without new keys. ``removed`` lists the removed branches. ``eps_resnetv2_101`` and
``eps_resnetv2_152`` are the ImageNet networks of the paper.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    FeatureDictNet,
    FeatureGraphNet,
    FeatureHookNet,
    FeatureListNet,
    PretrainedCfg,
    build_model_with_cfg,
    load_pretrained,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ..names import twin_name
from ..surgery.branches import branch_ends, branch_parameters
from ..surgery.checks import is_zero_scale, silent_branches
from ..surgery.feature_nets import features_without
from ..surgery.removal import add_gates, removed_slots, replay_removed
from .stored import create_stored, set_closed

__all__: list[str] = []  # register_model adds the entrypoints

# Families without a residual branch for a gate; docs/coverage.md has the reason for each.
_NO_BRANCHES = (
    "convmixer", "densenet", "dla", "dpn", "efficientvit_mit", "efficientvit_msra", "ghostnet", "inception_resnet_v2",
    "inception_v3", "inception_v4", "lcnetv2", "nasnet", "pnasnet", "rdnet", "repghost", "repvit", "resnest",
    "selecsls", "senet", "shvit", "vgg", "xception",
)  # fmt: skip
# Networks of other families without a shortcut.
_NO_BRANCHES_EITHER = [
    "ese_vovnet19b_dw", "ese_vovnet19b_slim*", "lcnet_*", "mobilenetv1_*", "test_efficientnet*", "vovnet39a",
    "vovnet57a",
]  # fmt: skip

default_cfgs: dict[str, DefaultCfg] = {}


def _create(base: str, pretrained: bool, /, **kwargs: Any) -> nn.Module:
    """Build the twin of a timm architecture.

    Args:
        base: timm's name of the architecture.
        pretrained: Whether to load weights: timm's, or those of a saved twin if ``pretrained_cfg`` describes one.
        kwargs: Keyword arguments of timm, ``removed`` and ``closed``.
    """
    filter_fn = getattr(sys.modules[model_entrypoint(base).__module__], "checkpoint_filter_fn", None)
    return create_stored(twin_name(base), partial(_build, base, filter_fn), pretrained, kwargs, filter_fn)


def _build(
    base: str,
    filter_fn: Callable[..., Any] | None,
    pretrained: bool,
    load: Callable[[nn.Module], None] | None,
    /,
    **kwargs: Any,
) -> nn.Module:
    entrypoint = model_entrypoint(base)
    removed, closed = kwargs.pop("removed", ()), kwargs.pop("closed", ())
    features: dict[str, Any] = {
        name: kwargs.pop(name) for name in ("features_only", "out_indices", "feature_cls") if name in kwargs
    }
    # A tag means weights published by timm. A configuration may describe a network with fewer branches.
    is_described = isinstance(kwargs.get("pretrained_cfg"), dict | PretrainedCfg)
    given = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(twin_name(base), *given)
    if pretrained and is_described and removed:
        pretrained, load = (
            False,
            partial(
                load_pretrained,
                pretrained_cfg=cfg.to_dict(),
                num_classes=kwargs.get("num_classes", cfg.num_classes),
                in_chans=kwargs.get("in_chans", 3),
                filter_fn=filter_fn,
                cache_dir=kwargs.get("cache_dir"),
            ),
        )
    model = entrypoint(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    add_gates(model)
    if not pretrained and load is None:
        _revive(model)
    replay_removed(model, removed, _key(entrypoint, cfg, kwargs))
    set_closed(model, closed)
    if load is not None:
        load(model)
    elif pretrained:
        model.base_model = cfg.hf_hub_id  # type: ignore[assignment]
    return _features(model, entrypoint, cfg, kwargs, features) if features.get("features_only") else model


def _key(entrypoint: Callable[..., nn.Module], cfg: PretrainedCfg, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """A key that is equal for twins of the same structure; None if the keywords cannot be compared."""
    try:
        return entrypoint, repr(cfg), json.dumps(kwargs, sort_keys=True)
    except TypeError:
        return None


def _revive(model: nn.Module) -> None:
    """Initialise branches that start at zero, because a gate would close them before they have learnt anything.

    timm initialises the last norm scale, gain or layer of many branches with zero.
    """
    if not (silent := silent_branches(model)):
        return
    scales = {parameter for name, parameter in model.named_parameters() if is_zero_scale(name, parameter)}
    last_layers = {m for ends in branch_ends(model).values() for m in ends if isinstance(m, nn.Linear | nn.Conv2d)}
    for name, parameter in branch_parameters(model, silent).items():
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        if parameter in scales and max(parameter.shape, default=1) == parameter.numel():
            nn.init.ones_(parameter)
        elif parameter in scales and layer in last_layers:
            layer.reset_parameters()


def _features(
    model: nn.Module,
    entrypoint: Callable[..., nn.Module],
    cfg: PretrainedCfg,
    kwargs: dict[str, Any],
    wanted: dict[str, Any],
) -> nn.Module:
    """Wrap a twin for feature extraction in the same way as timm wraps the architecture."""
    with torch.device("meta"):
        plain: Any = entrypoint(pretrained_cfg=cfg, **kwargs, **wanted)
    # A few families build a special network instead of a wrapper. The extracted features are the same.
    wraps = isinstance(plain, FeatureDictNet | FeatureGraphNet | FeatureHookNet | FeatureListNet)
    nested_names = any("." in info["module"] for info in plain.feature_info)
    feature_cfg = {
        "feature_cls": type(plain) if wraps else "getter",
        "out_indices": plain.feature_info.out_indices,
        "flatten_sequential": nested_names and not hasattr(plain, "body"),  # hooks may leave it as it is
    }
    wrapper = build_model_with_cfg(
        lambda **_: model,
        str(cfg.architecture),
        False,
        pretrained_cfg=cfg.to_dict(),
        feature_cfg=feature_cfg,
        features_only=True,
        **kwargs,
    )
    return features_without(wrapper, removed_slots(model))


def _register(base: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(base, pretrained, **kwargs)

    name = twin_name(base)
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"timm's {base} with gates; takes its keywords, and ``removed``."
    known = getattr(sys.modules[model_entrypoint(base).__module__], "default_cfgs", {}).get(base)
    if isinstance(known, DefaultCfg):
        default_cfgs[name] = DefaultCfg(
            deque(known.tags), {tag: _cfg(cfg, base, tag) for tag, cfg in known.cfgs.items()}
        )
    register_model(entrypoint)


def _cfg(cfg: PretrainedCfg, base: str, tag: str) -> PretrainedCfg:
    """Set the Hub id explicitly: timm would use the registered name, but the weights have the base name."""
    if cfg.hf_hub_id != "timm/":
        return cfg
    return replace(cfg, hf_hub_id=f"timm/{base}.{tag}" if tag else f"timm/{base}")


def _register_all(architectures: Iterable[str]) -> None:
    for base in architectures:
        module = model_entrypoint(base).__module__
        if module.startswith("timm.") and module.rpartition(".")[2] not in _NO_BRANCHES:
            _register(base)


_register_all(timm.list_models(exclude_filters=["eps_*", *_NO_BRANCHES_EITHER]))
