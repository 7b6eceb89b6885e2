"""The shrunk networks: pretrained weights, images for fine-tuning, and recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

HARD = (2, 4, 6)  # pullover, coat and shirt: the classes of Fashion-MNIST that are confused most
OTHERS = tuple(label for label in range(10) if label not in HARD)


@dataclass(frozen=True)
class Recipe:
    """Training recipe of every network of a case: SGD with momentum 0.9, a short warm-up, then cosine to 0.

    Args:
        steps: Optimizer steps of one training.
        batch_size: Images per step.
        learning_rate: Highest learning rate.
        weight_decay: L2 coefficient, as ``timm_eps.param_groups`` applies it.
        periods: Number of pruner steps. The warm-up and the ramp of ε are shares of this number.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 0.05
    weight_decay: float = 1e-4
    periods: int = 50


@dataclass(frozen=True)
class Case:
    """One network on one task.

    Args:
        title: Heading of its tables.
        architecture: timm name of the gated network.
        weights: File of its pretrained weights under ``outputs/pretrained``, without suffix. With ``pretraining``, the
            comparison makes this file itself.
        side: Pixels per side of the network's input.
        keeps: Numbers of branches that stay. All rows use the first number.
        classes: Labels of Fashion-MNIST that belong to the task.
        recipes: Recipe by the number of training images.
        pretraining: Recipe and classes of the pretraining, if the comparison makes the weights itself.
        smaller: A smaller sibling with its own pretrained weights, if branches can be cut until both have one
            architecture.
        timed_batch: Images per pass where latency decides how much another method removes.
        analysed: Highest number of training images on which losses are compared.
    """

    title: str
    architecture: str
    weights: str
    side: int
    keeps: tuple[int, ...]
    recipes: dict[int, Recipe]
    classes: tuple[int, ...] = tuple(range(10))
    pretraining: tuple[Recipe, tuple[int, ...]] | None = field(default=None)
    smaller: Case | None = None
    timed_batch: int = 32
    analysed: int = 2_048


_RECIPES = {600: Recipe(400), 6_000: Recipe(1_200), 60_000: Recipe(2_400)}
_LITE0 = Case(
    title="EfficientNet-Lite0 with ImageNet weights, Fashion-MNIST at 96x96",
    architecture="eps_tf_efficientnet_lite0",
    weights="tf_efficientnet_lite0",
    side=96,
    keeps=(3, 5),
    recipes=_RECIPES,
)
CASES = {
    "lite0": _LITE0,
    "lite1": replace(
        _LITE0,
        title="EfficientNet-Lite1 with ImageNet weights, cut to Lite0's architecture, Fashion-MNIST at 96x96",
        architecture="eps_tf_efficientnet_lite1",
        weights="tf_efficientnet_lite1",
        keeps=(9,),
        smaller=_LITE0,
    ),
    "lite2": replace(
        _LITE0,
        title="EfficientNet-Lite2 with ImageNet weights, Fashion-MNIST at 96x96",
        architecture="eps_tf_efficientnet_lite2",
        weights="tf_efficientnet_lite2",
        keeps=(5,),
    ),
    # A residual network with room for depth: 27 blocks, 12 of which take half of the time.
    "resnet56": Case(
        title="ResNet-56 pretrained on seven classes of Fashion-MNIST, shrunk on the other three, at 32x32",
        architecture="eps_resnet56",
        weights="eps_resnet56",
        side=32,
        keeps=(12,),
        recipes={600: Recipe(400, learning_rate=0.02), 6_000: Recipe(1_200, learning_rate=0.02)},
        classes=HARD,
        pretraining=(Recipe(5_000, learning_rate=0.1, weight_decay=5e-4), OTHERS),
    ),
    # Takes seconds: a check that everything runs.
    "smoke": Case(
        title="A few steps",
        architecture="eps_resnet20",
        weights="eps_resnet20",
        side=16,
        keeps=(3,),
        recipes={48: Recipe(6, batch_size=16, periods=6)},
        classes=HARD,
        pretraining=(Recipe(4, batch_size=16), OTHERS),
    ),
}
# For two cores: fewer pixels and steps.
_QUICK_RECIPES = {600: Recipe(120, batch_size=32, periods=30), 6_000: Recipe(600, batch_size=32)}


def _quick(case: Case, **changes: Any) -> Case:
    settings = {
        "title": case.title.replace("96x96", "48x48"),
        "side": 48,
        "recipes": _QUICK_RECIPES,
        "analysed": 1_024,
        **changes,
    }
    settings["title"] += ", for two cores"
    return replace(case, **settings)


CASES |= {
    "quick": _quick(_LITE0),
    "lite1_quick": _quick(CASES["lite1"], smaller=_quick(_LITE0)),
    "lite2_quick": _quick(CASES["lite2"]),
    "resnet56_quick": _quick(
        CASES["resnet56"],
        title=CASES["resnet56"].title.replace("32x32", "16x16"),
        weights="eps_resnet56_quick",
        side=16,
        recipes={
            600: Recipe(200, batch_size=32, learning_rate=0.02, periods=40),
            6_000: Recipe(400, batch_size=48, learning_rate=0.02),
        },
        pretraining=(Recipe(2_000, batch_size=64, learning_rate=0.1, weight_decay=5e-4), OTHERS),
        # A pass of 32 images of 16x16 is mostly overhead of the operations: channels would hardly save time.
        timed_batch=128,
    ),
}
