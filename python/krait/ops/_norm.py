"""norm: RMSNorm, LayerNorm and the gated norms."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import several


class NormGradients(NamedTuple):
    """Gradients of norm's inputs; None for those that were not given."""

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dz: Array | None


def norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    kind: str = "rms",
    residual: Array | None = None,
    z: Array | None = None,
    eps: float = 1e-6,
    group_size: int = 0,
    norm_before_gate: bool = True,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    out: Array | None = None,
    residual_out: Array | None = None,
) -> Array:
    """Normalisation over the last dimension, with the residual addition and Mamba-2's gate fused.

        r = x + residual
        rms (Zhang and Sennrich 2019):   r / sqrt(mean(r^2) + eps) * weight + bias
        layer (Ba et al. 2016):          (r - mean(r)) / sqrt(var(r) + eps) * weight + bias
        with a gate z: norm(r) * silu(z) if norm_before_gate, else norm(r * silu(z))

    Args:
        x: (..., C), real.
        weight, bias: (C,), optional.
        kind: "rms" or "layer".
        residual, z: (..., C), optional.
        group_size: channels that are normalised together; 0: all C. Must divide C.
        prenorm: also return r.
        residual_in_fp32: r in float32, whatever the element type of x.
        out, residual_out: destinations (..., C); residual_out may be residual itself.

    Returns:
        out (..., C) in x's element type, or with prenorm (out, r); r is float32 with
        residual_in_fp32, else of the element type of residual where that is given, else of x's.
    """
    arrays = Arrays("norm", "x", x)
    inputs = (
        arrays("x", x),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays("residual", residual),
        arrays("z", z),
    )
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    if residual_out is None and prenorm:
        dtype = dtype_name(x if residual is None else residual)
        residual_out = arrays.empty(x.shape, "float32" if residual_in_fp32 else dtype)
    library().norm(
        str(kind),
        *inputs,
        arrays.number("eps", eps),
        arrays.integer("group_size", group_size),
        bool(norm_before_gate),
        bool(residual_in_fp32),
        arrays.destination("out", out),
        arrays.destination("residual_out", residual_out),
    )
    return several(*map(arrays.result, (out, residual_out)))


def rms_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, **options: Array
) -> Array:
    """norm with kind="rms"."""
    return norm(x, weight, bias, kind="rms", **options)


def layer_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, **options: Array
) -> Array:
    """norm with kind="layer"."""
    return norm(x, weight, bias, kind="layer", **options)


def norm_backward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    dout: Array,
    dresidual: Array | None = None,
    kind: str = "rms",
    z: Array | None = None,
    eps: float = 1e-6,
    group_size: int = 0,
    norm_before_gate: bool = True,
) -> NormGradients:
    """The gradients of norm.

    Args:
        x: (..., C), what was normalised: x, or the r that prenorm returns.
        weight, bias, kind, z, eps, group_size, norm_before_gate: as given to norm.
        dout: (..., C), the gradient of out.
        dresidual: (..., C), the gradient of r where prenorm returned it, optional.

    Returns:
        dx, that of x and of residual alike, in dout's element type; dweight and dbias (C,) in
        float32; dz in z's.
    """
    arrays = Arrays("norm_backward", "x", x)
    inputs = (
        arrays("x", x),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays("z", z),
        arrays.number("eps", eps),
        arrays.integer("group_size", group_size),
        bool(norm_before_gate),
        arrays.given("dout", dout),
        arrays("dresidual", dresidual),
    )
    result = NormGradients(
        dx=arrays.empty(x.shape, dtype_name(dout)),
        dweight=arrays.sums_like(weight),
        dbias=arrays.sums_like(bias),
        dz=arrays.like(z),
    )
    library().norm_backward(
        str(kind),
        *inputs,
        arrays.destination("dx", result.dx),
        None,
        arrays.destination("dz", result.dz),
        arrays.destination("dweight", result.dweight),
        arrays.destination("dbias", result.dbias),
    )
    return NormGradients(*map(arrays.result, result))
