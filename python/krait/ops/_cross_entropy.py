"""cross_entropy, and the head fused with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import require_ndim


@dataclass(frozen=True)
class CrossEntropy:
    """What the loss functions return."""

    losses: Array
    """(T,) float32, in nats, 0 where ignored."""
    logsumexp: Array
    """(T,) float32."""
    mean: float
    """Over targets that are not ignored; 0 where there are none."""
    count: int
    """Of those targets."""


class LinearCrossEntropyGradients(NamedTuple):
    """Gradients of linear_cross_entropy's inputs, and the loss itself."""

    dx: Array
    dweight: Array
    dbias: Array | None
    loss: CrossEntropy


def cross_entropy(
    logits: Array, targets: Array, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> CrossEntropy:
    """Negative log likelihood of targets under softmax(logits), in nats.

    Args:
        logits: (T, V), real or float64.
        targets: (T,), int64 or int32, each in [0, V) or ignore_index, which has no loss.
        label_smoothing: in [0, 1): that share of the target is spread evenly over V.
    """
    op = "cross_entropy"
    arrays = Arrays(op, "logits", logits)
    require_ndim(op, "logits", logits, 2, "(T, V)")
    inputs = (arrays("logits", logits), arrays("targets", targets))
    losses = arrays.empty(logits.shape[:1], arrays.real)
    logsumexp = arrays.empty(logits.shape[:1], arrays.real)
    mean, count = library().cross_entropy(
        *inputs,
        arrays.integer("ignore_index", ignore_index),
        arrays.number("label_smoothing", label_smoothing),
        arrays.destination("losses", losses),
        arrays.destination("logsumexp", logsumexp),
    )
    return CrossEntropy(arrays.result(losses), arrays.result(logsumexp), float(mean), int(count))


def cross_entropy_backward(
    logits: Array,
    targets: Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logsumexp: Array | None = None,
    scale: float = 1.0,
) -> Array:
    """The gradient of cross_entropy, (T, V) in the element type of logits: scale (softmax -
    target), 0 where ignored.

    Args:
        logits, targets, ignore_index, label_smoothing: as given to cross_entropy.
        logsumexp: (T,), as cross_entropy returned it, optional.
        scale: the gradient of each loss: 1 / count for that of the mean.
    """
    arrays = Arrays("cross_entropy_backward", "logits", logits)
    dlogits = arrays.empty(logits.shape, dtype_name(logits))
    library().cross_entropy_backward(
        arrays("logits", logits),
        arrays("targets", targets),
        arrays.integer("ignore_index", ignore_index),
        arrays.number("label_smoothing", label_smoothing),
        arrays("logsumexp", logsumexp),
        arrays.number("scale", scale),
        arrays.destination("dlogits", dlogits),
    )
    return arrays.result(dlogits)


def linear_cross_entropy(
    x: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    block: int = 0,
) -> CrossEntropy:
    """cross_entropy(x weight^T + bias, targets): head and loss fused over blocks of tokens, so that
    no more than `block` rows of logits exist at a time.

    Args:
        x: (T, d), real.
        weight: (V, d).
        targets: (T,), int64 or int32.
        bias: (V,), optional.
        ignore_index, label_smoothing: as in cross_entropy.
        block: tokens; 0: chosen from V and the device.
    """
    op = "linear_cross_entropy"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "x", x, 2, "(T, d)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("bias", bias))
    losses = arrays.empty(x.shape[:1], arrays.real)
    logsumexp = arrays.empty(x.shape[:1], arrays.real)
    mean, count = library().linear_cross_entropy(
        *inputs,
        arrays("targets", targets),
        arrays.integer("ignore_index", ignore_index),
        arrays.number("label_smoothing", label_smoothing),
        arrays.integer("block", block),
        arrays.destination("losses", losses),
        arrays.destination("logsumexp", logsumexp),
    )
    return CrossEntropy(arrays.result(losses), arrays.result(logsumexp), float(mean), int(count))


def linear_cross_entropy_backward(
    x: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    block: int = 0,
    scale: float = 1.0,
) -> LinearCrossEntropyGradients:
    """Losses and gradients of linear_cross_entropy in one pass.

    Args:
        x .. block: as given to linear_cross_entropy.
        scale: the gradient of each loss.

    Returns:
        dx in x's shape and element type, dweight (V, d) and dbias (V,) in float32, and the loss.
    """
    op = "linear_cross_entropy_backward"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "x", x, 2, "(T, d)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("bias", bias))
    losses = arrays.empty(x.shape[:1], arrays.real)
    logsumexp = arrays.empty(x.shape[:1], arrays.real)
    dx = arrays.empty(x.shape, dtype_name(x))
    dweight = arrays.zeros(weight.shape, arrays.real)
    dbias = arrays.sums_like(bias)
    mean, count = library().linear_cross_entropy_backward(
        *inputs,
        arrays("targets", targets),
        arrays.integer("ignore_index", ignore_index),
        arrays.number("label_smoothing", label_smoothing),
        arrays.integer("block", block),
        arrays.number("scale", scale),
        arrays.destination("dx", dx),
        arrays.destination("dweight", dweight),
        arrays.destination("dbias", dbias),
        arrays.destination("losses", losses),
        arrays.destination("logsumexp", logsumexp),
    )
    loss = CrossEntropy(arrays.result(losses), arrays.result(logsumexp), float(mean), int(count))
    return LinearCrossEntropyGradients(
        arrays.result(dx), arrays.result(dweight), arrays.result(dbias), loss
    )
