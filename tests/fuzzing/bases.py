"""The saved networks that the fuzzer changes: small, each tensor full of numbers that no initialisation gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# By name: the timm architecture, its arguments, the size of its images, and what is closed before it is saved.
_SLOT = "stages.{}.blocks.{}.drop_path"
# Rebuilding a pruned network traces it, so those have few blocks.
_CIFAR = dict(layers=(1, 2, 2))
_NARROW = dict(layers=(1, 2, 2), channels=(8, 8, 16), pixel_mean=(8, 8))
_VIT = dict(img_size=32, depth=2)
_HALF_AND_WHOLE = ["blocks.0.drop_path2", "blocks.1.drop_path1", "blocks.1.drop_path2"]
_CONVNEXT = dict(depths=(1, 2, 1, 1))
NETWORKS: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "cifar": ("eps_resnet20", dict(num_classes=5), 8, []),
    "cifar_pruned": ("eps_resnet20", dict(num_classes=5, **_CIFAR), 8, [_SLOT.format(1, 1), _SLOT.format(2, 0)]),
    "cifar_sibling": ("eps_resnet20", dict(num_classes=5, **_CIFAR), 8, [_SLOT.format(1, 1), _SLOT.format(2, 0)]),
    "cifar_narrow": ("eps_resnet20", dict(num_classes=5, **_NARROW), 8, [_SLOT.format(1, 0)]),
    "cifar_headless": ("eps_resnet20", dict(num_classes=0, **_CIFAR), 8, [_SLOT.format(1, 1)]),
    "cifar_training": ("eps_resnet20", dict(num_classes=5), 8, [_SLOT.format(1, 1)]),
    "convnext": ("eps_test_convnext", dict(num_classes=5, **_CONVNEXT), 32, []),
    "convnext_pruned": ("eps_test_convnext", dict(num_classes=5, **_CONVNEXT), 32, ["stages.1.blocks.0.drop_path"]),
    "resnet_pruned": ("eps_test_resnet", dict(num_classes=5), 32, ["layer2.0.drop_path"]),
    "vit": ("eps_test_vit", dict(num_classes=5, **_VIT), 32, []),
    "vit_pruned": ("eps_test_vit", dict(num_classes=5, **_VIT), 32, _HALF_AND_WHOLE),
    "vit_training": ("eps_test_vit", dict(num_classes=5, **_VIT), 32, ["blocks.1.drop_path1"]),
}  # fmt: skip
LABELS = ["ape", "bee", "cat", "dog", "eel"]


def build(root: Path, names: Sequence[str] = ()) -> None:
    """Save networks below a directory, each as ``root / name`` with its sizes in ``root / name.json``.

    Args:
        root: The directory.
        names: Networks to save; all by default.
    """
    import timm
    import torch

    import timm_eps
    from timm_eps.surgery.branches import gates

    for number, (name, (architecture, arguments, size, slots)) in enumerate(NETWORKS.items()):
        if names and name not in names:
            continue
        torch.manual_seed(number)
        kwargs = {} if "img_size" in arguments else {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
        model: Any = timm.create_model(architecture, **arguments, **kwargs).eval()
        _fill(model)
        found = gates(model)
        for slot in slots:
            found[slot].closed = True
        labels = LABELS[::-1] if name == "cifar_sibling" else LABELS
        if name.endswith("_training"):
            side = 0.1 if name.startswith("cifar") else 0.0
            wrapper = timm_eps.EpsResNetForImageClassification.from_timm(model, side_loss_weight=side)
            wrapper.keeps_training_parts = True
            wrapper.save_pretrained(root / name)
        else:
            label_names = labels if arguments["num_classes"] else None
            is_cifar = name.startswith("cifar")
            timm_eps.save_pretrained(model, root / name, label_names=label_names, remote_code=is_cifar)
        facts = {"size": size, "slots": sorted(found), "closed": slots if name.endswith("_training") else []}
        (root / f"{name}.json").write_text(json.dumps(facts))


def _fill(model: Any) -> None:
    import torch

    for number, (name, tensor) in enumerate(_tensors(model)):
        with torch.no_grad():
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor)
                tensor.copy_(0.5 + noise if name.endswith("running_var") else tensor + 0.1 * (noise - 0.5))
            else:
                tensor.fill_(number + 2)


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.state_dict(keep_vars=True).items()
