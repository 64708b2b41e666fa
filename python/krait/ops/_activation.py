"""Activations between the two products of an MLP, and that of Mamba's decay."""

from __future__ import annotations

from .._arrays import Array, Arrays, dtype_name
from .._library import library


def gated_silu(x: Array, gate: Array, *, out: Array | None = None) -> Array:
    """x * silu(gate), silu(g) = g / (1 + exp(-g)).

    Args:
        x, gate: (..., C), real.
        out: destination (..., C); may be x or gate itself.

    Returns:
        (..., C) in x's element type.
    """
    arrays = Arrays("gated_silu", "x", x)
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().gated_silu(arrays("x", x), arrays("gate", gate), arrays.destination("out", out))
    return arrays.result(out)


def gated_silu_backward(x: Array, gate: Array, dout: Array) -> tuple[Array, Array]:
    """The gradients (dx, dgate) of gated_silu, in the shapes and element types of x and gate.

    Args:
        x, gate: (..., C), as given to gated_silu.
        dout: (..., C), the gradient of the result.
    """
    arrays = Arrays("gated_silu_backward", "x", x)
    inputs = (arrays("x", x), arrays.given("gate", gate), arrays("dout", dout))
    dx = arrays.empty(x.shape, dtype_name(x))
    dgate = arrays.empty(gate.shape, dtype_name(gate))
    library().gated_silu_backward(
        *inputs,
        arrays.destination("dx", dx),
        arrays.destination("dgate", dgate),
    )
    return arrays.result(dx), arrays.result(dgate)


def gelu(x: Array, *, kind: str = "exact", out: Array | None = None) -> Array:
    """GELU (Hendrycks and Gimpel 2016).

    Args:
        x: (..., C), real.
        kind: "exact", x Phi(x), or "tanh", 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
        out: destination (..., C); may be x itself.

    Returns:
        (..., C) in x's element type.
    """
    arrays = Arrays("gelu", "x", x)
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().gelu(arrays("x", x), arrays.destination("out", out), str(kind))
    return arrays.result(out)


def gelu_backward(x: Array, dout: Array, *, kind: str = "exact") -> Array:
    """The gradient of gelu, in x's shape and element type.

    Args:
        x, kind: as given to gelu.
        dout: (..., C), the gradient of the result.
    """
    arrays = Arrays("gelu_backward", "x", x)
    dx = arrays.empty(x.shape, dtype_name(x))
    library().gelu_backward(
        arrays("x", x), arrays("dout", dout), arrays.destination("dx", dx), str(kind)
    )
    return arrays.result(dx)


def negative_exp(A_log: Array) -> Array:
    """A = -exp(A_log), as Mamba parameterises its decay.

    Args:
        A_log: any shape, float32, bfloat16 or float16.

    Returns:
        A in float32.
    """
    arrays = Arrays("negative_exp", "A_log", A_log)
    out = arrays.empty(A_log.shape, "float32")
    library().negative_exp(arrays("A_log", A_log), arrays.destination("out", out))
    return arrays.result(out)


def negative_exp_backward(A: Array, dA: Array) -> Array:
    """The gradient dA A of A_log.

    Args:
        A: as negative_exp returned it, float32, contiguous.
        dA: the gradient of A, float32, contiguous.
    """
    arrays = Arrays("negative_exp_backward", "A", A)
    dA_log = arrays.zeros(A.shape, "float32")
    library().negative_exp_backward(
        arrays("A", A), arrays("dA", dA), arrays.destination("dA_log", dA_log)
    )
    return arrays.result(dA_log)
