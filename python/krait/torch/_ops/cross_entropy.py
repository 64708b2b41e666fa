"""Cross-entropy over a vocabulary, also fused with the product that makes the logits."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import Function

from .._operator import (
    GRAD,
    define,
    define_backward,
    examine,
    like,
    native,
    on_host,
    shape_of,
    sum_dtype,
    wants_grad,
)


def _forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """losses (T), logsumexp (T)."""
    if logits.is_cuda and logits.dtype is torch.float64:
        return on_host(_forward, logits, targets, ignore_index, label_smoothing)
    losses, logsumexp = _empty_losses(logits)
    native("cross_entropy")(logits, targets, ignore_index, label_smoothing, losses, logsumexp)
    return losses, logsumexp


def _empty_losses(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    if logits.dim() != 2:
        raise ValueError(f"[cross_entropy] logits has shape {shape_of(logits)}, expected (T, V)")
    sums = sum_dtype((logits,))
    return logits.new_empty(logits.shape[0], dtype=sums), logits.new_empty(
        logits.shape[0], dtype=sums
    )


def _backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    if logits.is_cuda and logits.dtype is torch.float64:
        return on_host(
            _backward, dlosses, logits, targets, logsumexp, ignore_index, label_smoothing
        )
    dlogits = torch.empty_like(logits)
    # A sum or mean hands one number to all tokens, which the host may read where it is.
    one_for_all = logits.is_cpu and logits.shape[0] > 0 and dlosses.stride(0) == 0
    scale = dlosses[0].item() if one_for_all else 1.0
    native("cross_entropy_backward")(
        logits, targets, ignore_index, label_smoothing, logsumexp, scale, dlogits
    )
    return dlogits if one_for_all else dlogits.mul_(dlosses.unsqueeze(1))


define(
    "cross_entropy(Tensor logits, Tensor targets, SymInt ignore_index, float label_smoothing) "
    "-> (Tensor, Tensor)",
    _forward,
    _empty_losses,
)
define_backward(
    "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor targets, Tensor logsumexp, "
    "SymInt ignore_index, float label_smoothing) -> Tensor",
    _backward,
    lambda dlosses, logits, *_: torch.empty_like(logits),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options = inputs[2:]


def _gradients(ctx: Any, dlosses: Optional[Tensor], _: Any) -> tuple[Optional[Tensor], ...]:
    if dlosses is None:
        return (None,) * 4
    saved = ctx.saved_tensors
    eager = not torch.is_grad_enabled() and examine((*saved, dlosses))
    compute: Any = _backward if eager else torch.ops.krait.cross_entropy_backward
    return compute(dlosses, *saved, *ctx.options), None, None, None


torch.library.register_autograd("krait::cross_entropy", _gradients, setup_context=_save)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Negative log likelihood of targets under softmax(logits), in nats. Differentiable once in
    logits.

    Args:
        logits: (..., V), any strides; float32, bfloat16, float16 or float64. Sums are float64.
        targets: (...) int32 or int64.
        ignore_index: the target of tokens without a loss.
        label_smoothing: in [0, 1): that share of the target is spread evenly over V (Szegedy et al.
            2016).
        reduction: "mean" (over targets that are not ignored), "sum" or "none".

    Returns:
        a scalar, or (...) with reduction "none"; float32, float64 for float64 logits.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a target that is neither ignore_index
            nor below V.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"[cross_entropy] reduction is {reduction!r}, expected 'mean', 'sum' or 'none'"
        )
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"[cross_entropy] targets has shape {shape_of(targets)}, expected "
            f"{tuple(logits.shape[:-1])}"
        )
    flat, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    args = (flat, flat_targets, ignore_index, label_smoothing)
    how = examine((flat, flat_targets))
    if not how:
        losses = torch.ops.krait.cross_entropy(*args)[0]
    else:
        losses = (_CrossEntropy.apply if how & GRAD else _forward)(*args)[0]
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (flat_targets != ignore_index).sum().clamp(min=1)


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: list[bool],
) -> list[Tensor]:
    """The mean loss, and its gradients to those of (x, weight, bias) that are wanted."""
    inputs = (x, weight, bias)
    if x.is_cuda and sum_dtype(inputs) is torch.float64:
        return on_host(_linear_forward, *inputs, targets, ignore_index, label_smoothing, wanted)
    sums = sum_dtype((x,))
    losses = x.new_empty(x.shape[0], dtype=sums)
    if not any(wanted):
        _, count = native("linear_cross_entropy")(
            *inputs, targets, ignore_index, label_smoothing, 0, losses, None
        )
        return [losses.sum() / max(count, 1)]
    count = max(int((targets != ignore_index).sum()), 1)
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None
    dbias = torch.zeros_like(bias, dtype=sums) if wanted[2] and bias is not None else None
    native("linear_cross_entropy_backward")(
        *inputs, targets, ignore_index, label_smoothing, 0, 1.0 / count, dx, dweight, dbias,
        losses, None,
    )  # fmt: skip
    grads = [
        like(g, t) for g, t in zip((dx, dweight, dbias), inputs) if g is not None and t is not None
    ]
    return [losses.sum() / count, *grads]


def _linear_fake(x: Tensor, weight: Tensor, bias: Optional[Tensor], *options: Any) -> list[Tensor]:
    wanted = options[-1]
    grads = [
        torch.empty_like(t) for want, t in zip(wanted, (x, weight, bias)) if want and t is not None
    ]
    return [x.new_empty((), dtype=sum_dtype((x,))), *grads]


define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, "
    "SymInt ignore_index, float label_smoothing, bool[] wanted) -> Tensor[]",
    _linear_forward,
    _linear_fake,
)


def _scale(dloss: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
    return gradient * dloss


define_backward(
    "linear_cross_entropy_backward(Tensor dloss, Tensor gradient, Tensor of) -> Tensor",
    _scale,
    _scale,
)


class _LinearCrossEntropy(Function):
    """Gradients are made beside the loss, while a block of logits exists, and scaled in the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, wanted = args[:3], args[-1]
        compute: Any = (
            _linear_forward if examine(args[:4]) else torch.ops.krait.linear_cross_entropy
        )
        loss, *grads = compute(*args)
        ctx.wanted = wanted
        ctx.save_for_backward(*grads, *(t for t, want in zip(inputs, wanted) if want))
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Optional[Tensor], ...]:
        saved = ctx.saved_tensors
        half = len(saved) // 2
        scale = torch.ops.krait.linear_cross_entropy_backward
        grads = iter([scale(dloss, g, of) for g, of in zip(saved[:half], saved[half:])])
        return (*(next(grads) if want else None for want in ctx.wanted), *(None,) * 4)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Optional[Tensor] = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of logits = x weight^T + bias, which never exist for more than a block of
    tokens.

    Differentiable once in x, weight and bias; their gradients are computed in the forward pass. A
    product, which autocast runs in its dtype.

    Args:
        x: (..., d).
        weight: (V, d).
        targets: (...) int32 or int64.
        bias: (V).
        ignore_index: the target of tokens without a loss.
        label_smoothing: in [0, 1): that share of the target is spread evenly over V.

    Returns:
        the mean over targets that are not ignored, in nats, float32 (float64 for float64 x).

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a target that is neither ignore_index
            nor below V.
    """
    if x.dim() == 0 or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"[linear_cross_entropy] targets has shape {shape_of(targets)}, expected "
            f"{tuple(x.shape[:-1])}"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    flat, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    args = (flat, weight, bias, flat_targets, ignore_index, label_smoothing)
    inputs = (flat, weight, bias)
    if wants_grad(inputs):
        wanted = [t is not None and t.requires_grad for t in inputs]
        return _LinearCrossEntropy.apply(*args, wanted)
    none = [False, False, False]
    if examine(args[:4]):
        return _linear_forward(*args, none)[0]
    return torch.ops.krait.linear_cross_entropy(*args, none)[0]
