"""projection: a product with what stands around it in a block that takes one token."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import activation_name, require_ndim


class Projection(NamedTuple):
    """What projection makes; None for what was not asked for."""

    out: Array
    residual: Array | None
    convolved: Array | None


def projection(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    norm: str | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    residual: Array | None = None,
    z: Array | None = None,
    eps: float = 1e-5,
    group_size: int = 0,
    norm_before_gate: bool = True,
    return_residual: bool = False,
    conv_state: Array | None = None,
    conv_weight: Array | None = None,
    conv_bias: Array | None = None,
    conv_state_indices: Array | None = None,
    conv_first: int = 0,
    activation: str | None = "silu",
    out: Array | None = None,
) -> Projection:
    """What norm, linear and causal_conv1d_update give one after the other; on a GPU one kernel for a
    few rows beside 16-bit weights.

        r = x + residual;  out = norm(r) weight^T + bias
        convolved = causal_conv1d_update(out[:, conv_first : conv_first + D])

    Args:
        x: (B, in), real.
        weight: (out, in), real; bias: (out,), optional.
        norm: "rms", "layer" or None; norm_weight .. norm_before_gate as in ops.norm, none of them
            without a norm, and z not beside a residual.
        residual: (B, in), optional.
        return_residual: also return r in float32.
        conv_state .. conv_state_indices: as in causal_conv1d_update, optional; the state is updated
            in place.
        conv_first: the first of the D columns of out that are convolved.
        activation: of the convolution, "silu" or None.
        out: destination (B, out), real.

    Returns:
        out (B, out) in x's element type, residual (B, in) float32, convolved (B, D) in out's
        element type.
    """
    op = "projection"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "x", x, 2, "(B, in)")
    require_ndim(op, "weight", weight, 2, "(out, in)")
    inputs = (
        arrays("x", x),
        "none" if norm is None else str(norm),
        arrays("norm_weight", norm_weight),
        arrays("norm_bias", norm_bias),
        arrays("residual", residual),
        arrays("z", z),
        arrays.number("eps", eps),
        arrays.integer("group_size", group_size),
        bool(norm_before_gate),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays.destination("conv_state", conv_state),
        arrays("conv_weight", conv_weight),
        arrays("conv_bias", conv_bias),
        arrays("conv_state_indices", conv_state_indices),
        arrays.integer("conv_first", conv_first),
        activation_name(activation),
    )
    if out is None:
        out = arrays.empty((x.shape[0], weight.shape[0]), dtype_name(x))
    summed = arrays.empty(x.shape, "float32") if return_residual else None
    convolved = None
    if conv_state is not None:
        if conv_weight is None:
            raise ValueError(f"[{op}] conv_state is given without conv_weight, expected both")
        require_ndim(op, "conv_weight", conv_weight, 2, "(D, K)")
        convolved = arrays.empty((x.shape[0], conv_weight.shape[0]), dtype_name(out))
    library().projection(
        *inputs,
        arrays.destination("out", out),
        arrays.destination("residual_out", summed),
        arrays.destination("convolved", convolved),
    )
    return Projection(*map(arrays.result, (out, summed, convolved)))
