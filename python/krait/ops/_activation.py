"""Activations between the two products of an MLP."""

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
    """The gradients (dx, dgate) of gated_silu, in the shapes and element types of x and gate."""
    arrays = Arrays("gated_silu_backward", "x", x)
    dx = arrays.empty(x.shape, dtype_name(x))
    dgate = arrays.empty(gate.shape, dtype_name(gate))
    library().gated_silu_backward(
        arrays("x", x),
        arrays("gate", gate),
        arrays("dout", dout),
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
    """The gradient of gelu, in x's shape and element type."""
    arrays = Arrays("gelu_backward", "x", x)
    dx = arrays.empty(x.shape, dtype_name(x))
    library().gelu_backward(
        arrays("x", x), arrays("dout", dout), arrays.destination("dx", dx), str(kind)
    )
    return arrays.result(dx)
