"""The gate of ε-ResNet: it replaces a residual branch by zero if the whole response stays below ε.

"Learning Strict Identity Mappings in Deep Residual Networks", X. Yu, Z. Yu, S. Ramalingam, CVPR 2018,
https://arxiv.org/abs/1804.01661, section 3. A residual block computes ``x + F(x)``; an ε-residual block computes
``x + S(F(x))`` with

    S(F) = 0  if |F_i| < ε for every element i of the mini-batch,      S(F) = F  otherwise.

The paper builds S from four ReLUs and a large constant. Outside a band of width 1e-6 around the threshold, that
construction equals the indicator ``max|F| >= ε``, and its gradient is zero almost everywhere. S is therefore computed
here as a multiplication by the indicator. While the gate is closed, the product passes exact zeros back into the
branch, so only weight decay changes its weights.
"""

import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["EpsilonGate", "epsilon_gate", "max_response"]

# 0 means an empty branch, so a branch that has not run, or only on empty batches, needs a different value.
NOT_SEEN = -1.0


def max_response(x: Tensor) -> Tensor:
    """Largest absolute value of a tensor, in one pass and without a temporary the size of ``x``.

    Args:
        x: Residual branch output of any shape, in activation units.

    Returns:
        0-dimensional tensor of the dtype of ``x``, detached. NaN if any element is NaN; -1 if there is no element.
    """
    x = x.detach()
    if x.numel() == 0:
        return x.new_full((), -1.0)  # NOT_SEEN, which TorchScript cannot read
    if x.is_cuda:  # one kernel: its launch takes longer than reading x. On the CPU this is several times slower
        return torch.linalg.vector_norm(x, ord=torch.inf)
    if x.dim() == 4 and not x.is_contiguous():  # channels_last: the values in the order of memory are read much faster
        x = x.permute(0, 2, 3, 1)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def epsilon_gate(x: Tensor, epsilon: Tensor | float) -> Tensor:
    """The sparsity-promoting function S of the paper (section 3.1), one decision for the whole tensor.

    Args:
        x: Residual branch output F(x), shape (B, ...).
        epsilon: Threshold ε in activation units.

    Returns:
        ``x`` if any ``|x_i| >= epsilon`` or any element is NaN (so that the loss shows it), else zeros; same shape
        and dtype as ``x``.
    """
    # A product instead of detached zeros: optimizers skip a parameter whose gradient is None, including its weight
    # decay, so the branch would never become empty.
    return x * _is_open(max_response(x), torch.as_tensor(epsilon, dtype=torch.float32, device=x.device))


def _is_open(response: Tensor, epsilon: Tensor) -> Tensor:
    # "not below" instead of "at or above", because a NaN response must leave the gate open. The comparison is in
    # float32, the dtype of ε: in half precision a small ε would be 0.
    return torch.logical_not(response < epsilon)


class EpsilonGate(nn.Module):
    """:func:`epsilon_gate` as a module at the end of a residual branch, in its stochastic-depth slot.

    In training the gate decides on every batch, as in the paper, and ``response`` accumulates the largest response
    since the last reset. A gate with ε = 0 that is not measured is the identity: it computes nothing. In evaluation
    ``closed`` alone decides, so the output for one image cannot depend on the other images of its batch.

    The gate has no parameters. An open gate has no entry in the state dict. A closed gate has the entry ``closed``, so
    a network without gates rejects the weights because of the unknown name.

    The threshold and the measurements stay in float32 when the model is converted to another dtype, because a small ε
    could become 0 there. Empty batches are ignored. A graph of ``torch.fx`` calls the gate as a module, so a change of
    ``closed`` affects the graph, too.

    Args:
        epsilon: Threshold ε in activation units. With 0 the gate never closes.
        drop_path: Previous module of the slot; it runs after the gate.
        single_zero: Whether a closed gate outputs a single zero in evaluation instead of a tensor of zeros. This costs
            nothing, and the shortcut alone determines the memory layout of the sum. For blocks that broadcast.

    Attributes:
        epsilon (float): Threshold in activation units. A new value is checked when it is set.
        measures_response (bool): Whether ``response`` is also updated while ε is 0. The pruner sets this for the epochs
            whose responses it reads.
        response (Tensor): Largest ``max|F|`` seen in training since :meth:`reset_response`, 0-dimensional float;
            -1 if the gate has seen no training batch since then, or was the identity.
        importance (Tensor): Sum over the batches since :meth:`reset_response` of the squared first-order change in the
            loss if the branch were removed, 0-dimensional float. Only updated while :meth:`measure_importance` is on.
        closed (bool): Whether the branch is zero in evaluation.

    Raises:
        ValueError: ``epsilon`` is negative, NaN or infinite.

    Example::

        gate = timm_eps.EpsilonGate(epsilon=2.5)
        gate(torch.full((2, 16, 8, 8), 2.0))  # training: every |F| is below 2.5, so all zeros
        gate(torch.full((2, 16, 8, 8), 3.0))  # unchanged
        gate.response                         # 3.0
    """

    threshold: Tensor

    # By default TorchScript compiles properties. A script does not need to set ε.
    __jit_unused_properties__: ClassVar = ["epsilon"]

    def __init__(self, epsilon: float = 0.0, drop_path: nn.Module | None = None, *, single_zero: bool = False) -> None:
        super().__init__()
        self.drop_path = nn.Identity() if drop_path is None else drop_path
        self.single_zero = single_zero
        self.closed = False
        self.measures_response = False
        # The forward pass reads ε from a buffer, because a compiled graph is specialised on a Python float and would be
        # recompiled at every change of ε. The float restores the buffer after construction on the meta device, where
        # buffers have no values.
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32), persistent=False)
        # Not a buffer: before each step DistributedDataParallel replaces the buffers of every process by those of the
        # first one, so the responses of the other processes would be overwritten.
        self.response = torch.full((), NOT_SEEN, dtype=torch.float32)
        self.importance = torch.zeros((), dtype=torch.float32)
        self.gain: Tensor | None = None
        self._epsilon = 0.0
        self.epsilon = epsilon

    @property
    def epsilon(self) -> float:
        return self._epsilon

    @epsilon.setter
    def epsilon(self, value: float) -> None:
        self._epsilon = check_epsilon(value)
        self._can_close = self._epsilon > 0  # a compiled graph depends on this, but not on the value
        self.threshold.fill_(self._epsilon)

    def is_active(self) -> bool:
        """Whether the gate looks at its branch in training. Otherwise it is the identity."""
        return self._can_close or self.measures_response or self.gain is not None

    def reset_response(self) -> None:
        """Reset the response and the importance."""
        device = self.threshold.device
        if self.response.device != device:
            self.response = torch.empty_like(self.response, device=device)
            self.importance = torch.empty_like(self.importance, device=device)
        self.response.fill_(NOT_SEEN)
        self.importance.zero_()

    @torch.jit.ignore
    def measure_importance(self, measure: bool = True) -> None:
        """Start or stop measuring ``importance`` in training.

        The branch is multiplied by a gain of one. If the branch is removed, the loss L changes to first order by
        ``dL/dgain``, the sum of F dL/dF over a batch ("Importance Estimation for Neural Network Pruning", P. Molchanov
        et al., CVPR 2019, https://arxiv.org/abs/1906.10771, equation 8). The cost is one pass over F in the backward
        pass. A closed gate has no importance.
        """
        self.gain = None
        if measure:
            device = self.threshold.device
            self.gain = torch.ones((), dtype=torch.float32, device=device, requires_grad=True)
            self.gain.register_post_accumulate_grad_hook(self._note_importance)

    def _note_importance(self, gain: Tensor) -> None:
        assert gain.grad is not None, "the hook runs after the gradient is accumulated"
        if self.importance.device != gain.device:
            self.importance = self.importance.to(gain.device)
        change = gain.grad.detach().square()
        # GradScaler skips a step with an overflow, which contains no information about the branch.
        self.importance += change.where(change.isfinite(), 0.0)
        gain.grad = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.gain is not None:
            self.measure_importance()  # copies have no hooks

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # On the meta device there are no weights to note it with; transformers asks there which tensors to expect.
        if self.closed and not self.threshold.is_meta:
            destination[f"{prefix}closed"] = torch.ones((), dtype=torch.bool, device=self.threshold.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}closed"
        if key in state_dict:
            self.closed = bool(state_dict[key])
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        elif local_metadata:
            self.closed = False  # torch's metadata lists the modules of a whole model, in which this gate was open
        elif self.closed:
            missing_keys.append(key)  # a plain dict may contain only a part of the weights, without this gate
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _replicate_for_data_parallel(self) -> Any:
        if self.training:
            raise ValueError(
                "nn.DataParallel trains copies of the model and keeps the responses of one copy only. Start one "
                "process for each GPU: torchrun --nproc_per_node N, or accelerate launch --multi_gpu."
            )
        return super()._replicate_for_data_parallel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EpsilonGate":
        """Keep float32 in ``to``, ``half`` and similar calls. torch's recurrent layers override this method, too."""
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            self.threshold = torch.full_like(self.threshold, self._epsilon, dtype=torch.float32)
        return self

    def init_non_persistent_buffers(self) -> None:
        """Set the buffers after the model has moved from the meta device (timm's convention)."""
        self.threshold.fill_(self._epsilon)
        self.reset_response()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles the right side of an "and"
            if isinstance(x, Proxy) and getattr(x.tracer, "root", self) is not self:
                # The following code depends on values, which torch.fx does not have, so its graph calls this module.
                return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        if self.training:
            if self.is_active():
                x = self._decide(x)
        elif self.closed:
            x = x.new_zeros(()) if self.single_zero else torch.zeros_like(x)
        return self.drop_path(x)

    def _decide(self, x: Tensor) -> Tensor:
        """The output of a training batch: ``x``, or zeros."""
        response = max_response(x)
        if self.response.device != x.device:
            self.response = self.response.to(x.device)
        torch.maximum(self.response, response, out=self.response)
        weight = _is_open(response, self.threshold)
        gain = self.gain
        if gain is not None:
            weight = weight * gain.to(x.device)
        elif _may_read(x) and bool(weight):
            return x  # one pass over x less, here and in the backward pass
        return x * weight  # a product, as in epsilon_gate; a 0-dimensional factor keeps the dtype of x

    def fuse(self) -> nn.Module:
        """The module that computes the same in evaluation: for an open gate, the previous module of the slot.

        ``timm.utils.reparameterize_model`` replaces the gate by it. A closed gate stays, because its branch still
        exists.
        """
        return self if self.closed else self.drop_path

    def extra_repr(self) -> str:
        return f"epsilon={self._epsilon:g}, closed={self.closed}"


def _may_read(x: Tensor) -> bool:
    """Whether Python may branch on values of ``x``: on the CPU nothing waits for them. Graphs hold no values."""
    if torch.jit.is_scripting() or x.device.type != "cpu":
        return False
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def check_epsilon(value: float) -> float:
    """Return ``value`` as a float, or raise ValueError if it cannot be a threshold."""
    # A number too large for float32 would become infinity and close every gate. The comparison also rejects NaN.
    largest = torch.finfo(torch.float32).max
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= largest:
        raise ValueError(
            f"epsilon must be a number of at least 0 (0 keeps every gate open), at most {largest:.1e}, got {value!r}."
        )
    return float(value)
