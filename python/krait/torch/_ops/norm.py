"""RMSNorm and LayerNorm, with a fused residual addition or a gate, as a differentiable PyTorch
operator.
"""

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
    sum_dtype,
    wants_grad,
)


def _residual_dtype(x: Tensor, residual: Optional[Tensor], residual_in_fp32: bool) -> torch.dtype:
    if residual_in_fp32:
        # A float64 stream keeps what it has.
        return sum_dtype((x, residual))
    return x.dtype if residual is None else residual.dtype


def _forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    z: Optional[Tensor],
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    residual_dtype: Optional[torch.dtype],
) -> tuple[Tensor, Optional[Tensor]]:
    """Also returns x + residual where its dtype is given."""
    inputs = (x, weight, bias, residual, z)
    options = (kind, eps, group_size, norm_before_gate)
    if x.is_cuda and sum_dtype(inputs) is torch.float64:  # of GPUs alone: it costs time
        return on_host(_forward, *inputs, *options, residual_dtype)
    out = torch.empty_like(x)
    summed = None if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype)
    native("norm")(kind, *inputs, eps, group_size, norm_before_gate, False, out, summed)
    return out, summed


def _backward(
    wanted: list[bool],
    dout: Optional[Tensor],
    dsummed: Optional[Tensor],
    summed: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    z: Optional[Tensor],
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of those of (x, weight, bias, residual, z) that are wanted, in this order. `summed`
    is x + residual.
    """
    inputs = (summed, weight, bias, z)
    options = (kind, eps, group_size, norm_before_gate)
    sums = sum_dtype(inputs)
    if summed.is_cuda and sums is torch.float64:
        return on_host(_backward, wanted, dout, dsummed, *inputs, *options, x_dtype, residual_dtype)
    if dout is None:
        dout = torch.zeros_like(summed)
    want_x, want_weight, want_bias, want_residual, want_z = wanted
    # The gradients of x and of residual differ in dtype alone.
    dx = torch.empty_like(summed, dtype=x_dtype) if want_x else None
    dresidual = torch.empty_like(summed, dtype=residual_dtype) if want_residual else None
    dweight = dbias = dz = None
    if want_weight and weight is not None:
        dweight = torch.zeros_like(weight, dtype=sums)
    if want_bias and bias is not None:
        dbias = torch.zeros_like(bias, dtype=sums)
    if want_z and z is not None:
        dz = torch.empty_like(z)
    first, second = (dx, dresidual) if dresidual is None else (dresidual, dx)
    native("norm_backward")(
        kind, *inputs, eps, group_size, norm_before_gate, dout, dsummed, first, second,
        dz, dweight, dbias,
    )  # fmt: skip
    if dweight is not None and weight is not None:
        dweight = like(dweight, weight)
    if dbias is not None and bias is not None:
        dbias = like(dbias, bias)
    return [g for g in (dx, dweight, dbias, dresidual, dz) if g is not None]


def _op(*args: Any) -> tuple[Tensor, Tensor]:
    out, summed = _forward(*args)
    return out, out.new_empty(0) if summed is None else summed


def _op_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, residual_dtype = args[0], args[9]
    out = torch.empty_like(x)
    if residual_dtype is None:
        return out, out.new_empty(0)
    return out, torch.empty_like(x, dtype=residual_dtype)


def _op_backward_fake(
    wanted: list[bool],
    dout: Optional[Tensor],
    dsummed: Optional[Tensor],
    summed: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    z: Optional[Tensor],
    *options: Any,
) -> list[Tensor]:
    x_dtype, residual_dtype = options[-2:]
    like_inputs = (
        (summed, x_dtype),
        (weight, None),
        (bias, None),
        (summed, residual_dtype),
        (z, None),
    )
    return [
        torch.empty_like(t, dtype=dtype)
        for want, (t, dtype) in zip(wanted, like_inputs)
        if want and t is not None
    ]


_OPTIONS = "str kind, float eps, SymInt group_size, bool norm_before_gate"
define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? z, "
    f"{_OPTIONS}, ScalarType? residual_dtype) -> (Tensor, Tensor)",
    _op,
    _op_fake,
)
define_backward(
    "norm_backward(bool[] wanted, Tensor? dout, Tensor? dsummed, Tensor summed, Tensor? weight, "
    f"Tensor? bias, Tensor? z, {_OPTIONS}, ScalarType x_dtype, ScalarType residual_dtype) "
    "-> Tensor[]",
    _backward,
    _op_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Optional[Tensor]]) -> None:
    x, weight, bias, residual, z = inputs[:5]
    summed = x if inputs[9] is None else output[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, weight, bias, z)
    ctx.options = inputs[5:9]
    ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)


def _gradients(
    ctx: Any, dout: Optional[Tensor], dsummed: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    if dout is None and dsummed is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    wanted = list(needed)
    # One tensor serves both where they are of one dtype.
    shared = needed[0] and needed[3] and ctx.dtypes[0] is ctx.dtypes[1]
    if shared:
        wanted[3] = False
    eager = not torch.is_grad_enabled() and examine((*saved, dout, dsummed))
    compute: Any = _backward if eager else torch.ops.krait.norm_backward
    grads = iter(compute(wanted, dout, dsummed, *saved, *ctx.options, *ctx.dtypes))
    results = [next(grads) if want else None for want in wanted]
    if shared:
        results[3] = results[0]
    return (*results, *(None,) * 5)


torch.library.register_autograd("krait::norm", _gradients, setup_context=_save)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Optional[Tensor]]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor] = None,
    *,
    kind: str = "rms",
    residual: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    eps: float = 1e-6,
    group_size: Optional[int] = None,
    norm_before_gate: bool = True,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension::

        r = x + residual                                  (where residual is given)
        rms:   norm(r) = r / sqrt(mean(r^2) + eps) * weight + bias
        layer: norm(r) = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias
        with z: norm_before_gate ? norm(r) silu(z) : norm(r silu(z))

    Differentiable once in every floating input; the returned residual carries gradients too. Sums
    are float32, float64 where any input is (on the reference path).

    Args:
        x: (..., C), any strides; float32, bfloat16, float16 or float64.
        weight: (C), or None for 1.
        bias: (C), or None for 0.
        kind: "rms" or "layer".
        residual: (..., C), added to x first.
        z: (..., C), gate.
        eps: added to the mean square or variance.
        group_size: channels normalised together, a divisor of C; None: all C.
        norm_before_gate: whether the gate multiplies the normalised values or what is normalised.
        prenorm: also return r.
        residual_in_fp32: return r in float32, whatever the dtype of x.

    Returns:
        out (..., C) in x's dtype, or (out, r) with prenorm; r has float32 with residual_in_fp32,
        else residual's dtype where it is given, else x's.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"[norm] kind is {kind!r}, expected 'rms' or 'layer'")
    if group_size is not None and group_size <= 0:
        raise ValueError(f"[norm] group_size is {group_size}, expected a divisor of the channels")
    tensors = (x, weight, bias, residual, z)
    how = examine(tensors)
    grad = how & GRAD if how else wants_grad(tensors)
    residual_dtype: Optional[torch.dtype] = None
    if prenorm or (residual is not None and grad):
        residual_dtype = _residual_dtype(x, residual, residual_in_fp32)
        if residual is None and residual_dtype is x.dtype:
            residual_dtype = None  # r is x itself
    options = (kind, eps, group_size or 0, norm_before_gate, residual_dtype)
    if not how:
        out, summed = torch.ops.krait.norm(*tensors, *options)
    elif grad:
        out, summed = _Norm.apply(*tensors, *options)
    else:
        out, summed = _forward(*tensors, *options)
    if not prenorm:
        return out
    return out, x if residual_dtype is None else summed
