"""linear, embedding and dropout."""

from __future__ import annotations

from typing import NamedTuple

from .._arguments import unsigned
from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import require_ndim


class LinearGradients(NamedTuple):
    """Gradients of linear's inputs; None for those that were not given."""

    dx: Array
    dweight: Array
    dbias: Array | None


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    accumulate: bool = False,
) -> Array:
    """x weight^T + bias.

    Args:
        x: (..., in), real.
        weight: (out, in), real.
        bias: (out,), optional.
        out: destination (..., out), real.
        accumulate: add to out instead.

    Returns:
        (..., out) in x's element type, or out.
    """
    op = "linear"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "weight", weight, 2, "(out, in)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("bias", bias))
    if out is None:
        if accumulate:
            raise ValueError("[linear] accumulate is given without out, expected both")
        out = arrays.empty((*x.shape[:-1], weight.shape[0]), dtype_name(x))
    library().linear(*inputs, arrays.destination("out", out), bool(accumulate))
    return arrays.result(out)


def linear_backward(
    x: Array, weight: Array, dout: Array, *, has_bias: bool = False
) -> LinearGradients:
    """The gradients of linear.

    Args:
        x: (..., in); weight: (out, in), as given to linear.
        dout: (..., out), the gradient of the result.
        has_bias: whether there was a bias.

    Returns:
        dx in x's shape and element type; dweight (out, in) and dbias (out,) in float32.
    """
    arrays = Arrays("linear_backward", "x", x)
    require_ndim("linear_backward", "weight", weight, 2, "(out, in)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("dout", dout))
    result = LinearGradients(
        dx=arrays.empty(x.shape, dtype_name(x)),
        dweight=arrays.zeros(weight.shape, arrays.real),
        dbias=arrays.zeros((weight.shape[0],), arrays.real) if has_bias else None,
    )
    library().linear_backward(
        *inputs,
        arrays.destination("dx", result.dx),
        False,
        arrays.destination("dweight", result.dweight),
        arrays.destination("dbias", result.dbias),
    )
    return LinearGradients(*map(arrays.result, result))


def embedding(ids: Array, weight: Array, *, out: Array | None = None) -> Array:
    """Rows of a table by id.

    Args:
        ids: (...), int64 or int32, each in [0, vocabulary). One outside raises ValueError on the
            CPU, and gives zeros on a GPU.
        weight: (vocabulary, d), float32, float64, bfloat16 or float16.
        out: destination (..., d), real.

    Returns:
        weight[ids], (..., d), in weight's element type, or out.
    """
    op = "embedding"
    arrays = Arrays(op, "weight", weight)
    require_ndim(op, "weight", weight, 2, "(vocabulary, d)")
    inputs = (arrays.given("ids", ids), arrays("weight", weight))
    if out is None:
        out = arrays.empty((*ids.shape, weight.shape[1]), dtype_name(weight))
    library().embedding(*inputs, arrays.destination("out", out))
    return arrays.result(out)


def embedding_backward(ids: Array, dout: Array, vocab_size: int) -> Array:
    """The gradient of embedding's weight, (vocab_size, d) in float32 (float64 beside such a dout):
    dout summed for each id in the order of positions.

    Args:
        ids: (...), as given to embedding.
        dout: (..., d), the gradient of the result.
    """
    op = "embedding_backward"
    arrays = Arrays(op, "dout", dout)
    inputs = (arrays("ids", ids), arrays("dout", dout))
    rows = arrays.integer("vocab_size", vocab_size)
    if rows < 0:
        raise ValueError(f"[{op}] vocab_size is {rows}, expected 0 or more")
    if len(dout.shape) == 0:
        raise ValueError(f"[{op}] dout has shape (), expected (..., d)")
    dweight = arrays.zeros((rows, dout.shape[-1]), arrays.real)
    library().embedding_backward(*inputs, arrays.destination("dweight", dweight))
    return arrays.result(dweight)


def dropout(
    x: Array,
    probability: float,
    *,
    seed: int,
    stream: int = 0,
    offset: int = 0,
    out: Array | None = None,
) -> Array:
    """Each element is kept with probability 1 - p, and then scaled by 1 / (1 - p) (Srivastava et
    al. 2014). The same call on a gradient is the backward.

    Args:
        x: any shape, real.
        probability: p, in [0, 1).
        seed, stream, offset: which elements are dropped depends on these and the element's place in
            row-major order alone (Philox4x32-10); 0 to 2^64 - 1.
        out: destination like x; may be x itself.

    Returns:
        x's shape and element type.
    """
    arrays = Arrays("dropout", "x", x)
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().dropout(
        arrays("x", x),
        arrays.number("probability", probability),
        unsigned("[dropout] seed", seed),
        unsigned("[dropout] stream", stream),
        unsigned("[dropout] offset", offset),
        arrays.destination("out", out),
    )
    return arrays.result(out)
