"""The CIFAR network of ε-ResNet as a timm model: depth 6n + 2, n pre-activation basic blocks in each of three stages.

"Learning Strict Identity Mappings in Deep Residual Networks", X. Yu, Z. Yu, S. Ramalingam, CVPR 2018,
https://arxiv.org/abs/1804.01661, section 4; the pre-activation network is that of "Identity Mappings in Deep Residual
Networks", K. He et al., ECCV 2016, https://arxiv.org/abs/1603.05027.

    x (B, 3, 32, 32) -> stem: conv 3x3, BN, ReLU -> (B, 16, 32, 32)
      -> stage 0: (B, 16, 32, 32) -> stage 1: (B, 32, 16, 16) -> stage 2: (B, 64, 8, 8) -> BN, ReLU, pool, linear

Every residual branch ends in a convolution without bias, so that weight decay can empty it, and in a gate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, get_norm_act_layer
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from ..files.config_checks import check_network
from ..gate import EpsilonGate
from ..names import CIFAR_DEPTHS
from ..surgery.feature_nets import features_without
from ..surgery.removal import replay_removed
from ..surgery.wrapping import guard_saving
from .cifar_blocks import PixelMean, PreActBasic, Stage, init_weights
from .stored import create_stored, set_closed

__all__ = ["EpsResNet"]  # register_model adds the entrypoints

# An fx trace would drop the response, which is not returned. As a leaf, the gate is kept as a module.
register_notrace_module(EpsilonGate)


class EpsResNet(nn.Module):
    """Pre-activation CIFAR ResNet whose residual branches end in gates.

    Args:
        layers: Number of blocks in each stage.
        channels: Width of each stage.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: Pooling before the classifier: 'avg', 'max', 'avgmax', 'catavgmax'; without a classifier also '',
            which keeps the feature map.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly to this rate in the last block.
        norm_layer: Normalisation with activation, by timm's name or class.
        act_layer: Activation, by timm's name or class.
        removed: Slot paths of removed blocks, as returned by :func:`timm_eps.remove_closed`.
        pixel_mean: Height and width of the images if the mean of each pixel is subtracted, see :class:`PixelMean`.
        closed: Slot paths of closed gates, whose blocks are not removed.

    Raises:
        ValueError: ``removed`` or ``closed`` names a slot that this architecture does not have, or a size is out of
            bounds, or there is a classifier without pooling.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] = "batchnorm2d",
        act_layer: str | Callable[..., nn.Module] = "relu",
        removed: Sequence[str] = (),
        pixel_mean: Sequence[int] | None = None,
        closed: Sequence[str] = (),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_network(layers, channels, in_chans, pixel_mean)
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.removed = list[str]()
        self.only_img_size = pixel_mean and tuple(pixel_mean)
        norm_act: Any = get_norm_act_layer(norm_layer, act_layer=act_layer)

        self.stem = nn.Sequential()
        if pixel_mean is not None:
            self.stem.add_module("pixel_mean", PixelMean(in_chans, *pixel_mean, **dd))
        self.stem.add_module("conv", nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd))
        self.stem.add_module("norm", norm_act(channels[0], **dd))
        feature_info: list[dict[str, Any]] = [dict(num_chs=channels[0], reduction=1, module="stem.norm")]

        self.stages = nn.Sequential()
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        prev_chs, reduction = channels[0], 1
        for index, (depth, width, rates) in enumerate(zip(layers, channels, drop_path_rates, strict=True)):
            stride = 1 if index == 0 else 2
            reduction *= stride
            self.stages.append(
                Stage(
                    [
                        PreActBasic(
                            prev_chs if k == 0 else width,
                            width,
                            norm_act,
                            stride=stride if k == 0 else 1,
                            # The stem already applies BN-ReLU to the input of the first block.
                            preact=(index, k) != (0, 0),
                            drop_path_rate=rates[k],
                            **dd,
                        )
                        for k in range(depth)
                    ]
                )
            )
            prev_chs = width
            feature_info.append(dict(num_chs=width, reduction=reduction, module=f"stages.{index}"))

        self.feature_info = feature_info
        self.num_features = prev_chs
        self.norm = norm_act(self.num_features, **dd)
        _check_pooling(num_classes, global_pool)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        # timm sets the configuration later, but removing blocks needs the image size now.
        self.pretrained_cfg = {"input_size": (in_chans, *(self.only_img_size or (32, 32)))}
        sizes = tuple(layers), tuple(channels), num_classes, in_chans, self.only_img_size
        replay_removed(self, removed, (sizes, global_pool, drop_rate, drop_path_rate, norm_layer, act_layer))
        set_closed(self, closed)
        guard_saving(self)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation over the fan-out for convolutions, as in the paper; small values for the classifier."""
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of further parameters without weight decay: none."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or remove it for 0 classes.

        Raises:
            ValueError: The network would have a classifier without pooling.
        """
        _check_pooling(num_classes, self.head.global_pool.pool_type if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and the outputs of the stem and the stages.

        Args:
            x: Images (B, C, H, W).
            indices: Number of last intermediates, or list of indices, or None for all four; 0 is the stem.
            norm: Whether to apply the final norm to the last stage's features.
            stop_early: Whether to stop after the last requested intermediate.
            output_fmt: Output format; only 'NCHW'.
            intermediates_only: Whether to leave out the final features.

        Raises:
            ValueError: ``output_fmt`` is not 'NCHW', or an index is out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take = _wanted_indices(len(self.stages) + 1, indices)
        last = max(take)
        intermediates = []
        x = self.stem(x)
        if 0 in take:
            intermediates.append(x)
        for index, stage in enumerate(self.stages, start=1):
            if stop_early and index > last:
                break
            x = stage(x)
            if index in take:
                intermediates.append(self.norm(x) if norm and index == len(self.stages) else x)
        if intermediates_only:
            return intermediates
        if not stop_early or last == len(self.stages):
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop all layers after the last requested intermediate. The arguments are those of timm's models."""
        take = _wanted_indices(len(self.stages) + 1, indices)
        last = max(take)
        shortened = last < len(self.stages)
        self.stages = self.stages[:last]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to normalised features (B, 64, H / 4, W / 4)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, classes), or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


def _check_pooling(num_classes: int, global_pool: str) -> None:
    if num_classes and not global_pool:
        raise ValueError(
            f"global_pool='' keeps the feature map, but a classifier with num_classes={num_classes} needs pooling. Use "
            "num_classes=0, or a pooling such as 'avg'."
        )


def _wanted_indices(total: int, indices: int | Sequence[int] | None) -> list[int]:
    """Positions of the requested intermediates: all for None, the last n for a number; may be negative."""
    if indices is None:
        indices = total
    if isinstance(indices, int):
        wanted = list(range(total - indices, total))
    else:
        wanted = [index + total if index < 0 else index for index in indices]
    if not wanted or min(wanted) < 0 or max(wanted) >= total:
        raise ValueError(f"indices must select from the {total} intermediates (stem and stages), got {indices!r}.")
    return wanted


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:1804.01661",
        "paper_name": "Learning Strict Identity Mappings in Deep Residual Networks",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"eps_resnet{depth}": _cfg() for depth in CIFAR_DEPTHS})


def _create_eps_resnet(variant: str, depth: int, pretrained: bool = False, /, **kwargs: Any) -> nn.Module:
    blocks, remainder = divmod(depth - 2, 6)
    assert remainder == 0, "two convolutions per block, three stages, a stem and a classifier"
    kwargs.setdefault("layers", (blocks,) * 3)
    known = list(inspect.signature(EpsResNet).parameters)

    def build(pretrained: bool, load: Callable[[nn.Module], None] | None, /, **kwargs: Any) -> nn.Module:
        removed: list[str] = []

        def network(**arguments: Any) -> EpsResNet:
            if unknown := sorted(arguments.keys() - known):
                raise ValueError(f"{unknown[0][:64]!r} is not an argument of {variant}; these are {', '.join(known)}.")
            model = EpsResNet(**arguments)
            removed.extend(model.removed)
            if load is not None:
                load(model)
            return model

        built = build_model_with_cfg(
            network,
            variant,
            pretrained,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
            **kwargs,
        )
        return features_without(built, removed)

    return create_stored(variant, build, pretrained, kwargs)


def _register(depth: int) -> None:
    name = f"eps_resnet{depth}"

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_eps_resnet(name, depth, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"The network of depth {depth}; takes the keywords of :class:`EpsResNet`."
    globals()[name] = register_model(entrypoint)


for _depth in CIFAR_DEPTHS:
    _register(_depth)
