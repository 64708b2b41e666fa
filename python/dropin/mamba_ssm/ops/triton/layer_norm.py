"""LayerNorm (Ba et al., 2016) and RMSNorm (Zhang and Sennrich, 2019) with what stands before them
in a block.

r = dropout(rowscale x) + dropout(x1) + residual; out = norm(r) with weight and bias, and a second
output with weight1 and bias1. Shapes: x, x1, residual (..., D); weights and biases (D,); rowscale
(...).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from krait.torch import RMSNorm
from krait.torch import functional as krait_ops
from torch import Tensor

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


def _wide(tensor: Optional[Tensor]) -> Optional[Tensor]:
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_row(rowscale: Tensor, x: Tensor) -> Tensor:
    """rowscale, of any shape with one value for each row of x, to multiply x by."""
    return rowscale.reshape(*x.shape[:-1], 1)


def _check_scales(
    x: Tensor, x1: Optional[Tensor], rowscale: Optional[Tensor], dropout_p: float
) -> None:
    """What goes into r beside the residual: krait's operator checks the rest."""
    if x1 is not None and x1.shape != x.shape:
        raise ValueError(
            f"[layer_norm] x1 has shape {tuple(x1.shape)}, expected {tuple(x.shape)}: that of x"
        )
    if rowscale is not None and rowscale.numel() * x.shape[-1] != x.numel():
        raise ValueError(
            f"[layer_norm] rowscale has shape {tuple(rowscale.shape)}, expected "
            f"{tuple(x.shape[:-1])}: one value for each row of x"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"[layer_norm] dropout_p is {dropout_p}, expected a number in [0, 1)")
    if x1 is not None and rowscale is not None:
        raise ValueError("[layer_norm] rowscale was given with x1, expected one of the two at most")


def _masked(x: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    return x.masked_fill(~mask, 0.0) / (1.0 - dropout_p)


def _ref(
    is_rms_norm: bool,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    x1: Optional[Tensor],
    weight1: Optional[Tensor],
    bias1: Optional[Tensor],
    eps: float,
    dropout_p: float,
    rowscale: Optional[Tensor],
    prenorm: bool,
    dropout_mask: Optional[Tensor],
    dropout_mask1: Optional[Tensor],
    upcast: bool,
):
    _check_scales(x, x1, rowscale, dropout_p)
    dtype = x.dtype
    if upcast:
        x, weight, bias, residual = _wide(x), _wide(weight), _wide(bias), _wide(residual)
        x1, weight1, bias1 = _wide(x1), _wide(weight1), _wide(bias1)
    if rowscale is not None:
        x = x * _by_row(rowscale, x)
    if dropout_p > 0.0:
        x = F.dropout(x, dropout_p) if dropout_mask is None else _masked(x, dropout_mask, dropout_p)
        if x1 is not None:
            x1 = (
                F.dropout(x1, dropout_p)
                if dropout_mask1 is None
                else _masked(x1, dropout_mask1, dropout_p)
            )
    if x1 is not None:
        x = x + x1
    if residual is not None:
        x = (x + residual).to(x.dtype)

    def norm(weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        if not is_rms_norm:
            bias = None if bias is None else bias.to(weight.dtype)
            return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(dtype)
        out = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
        return (out if bias is None else out + bias).to(dtype)

    outputs = [norm(weight, bias)]
    if weight1 is not None:
        outputs.append(norm(weight1, bias1))
    if prenorm:
        outputs.append(x)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-06,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """``layer_norm_fn`` in plain PyTorch, in the dtypes of its arguments or, with upcast, in
    float32.

    dropout_mask and dropout_mask1 (bool, True where kept) stand in for a drawn mask.
    """
    return _ref(
        False, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        dropout_mask, dropout_mask1, upcast,
    )  # fmt: skip


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-06,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """``rms_norm_fn`` in plain PyTorch; see ``layer_norm_ref``."""
    return _ref(
        True, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        dropout_mask, dropout_mask1, upcast,
    )  # fmt: skip


def _drawn_masks(
    x: Tensor, x1: Optional[Tensor], dropout_p: float, seeds: Tensor
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The masks that belong to seeds (1 or 2,) int64, one for x and one for x1."""

    def draw(like: Tensor, seed: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(int(seed))
        return torch.rand(like.shape, generator=generator, device=like.device) >= dropout_p

    return draw(x, seeds[0]), None if x1 is None else draw(x1, seeds[1])


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    dropout_p=0.0,
    rowscale=None,
    out_dtype=None,
    residual_dtype=None,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """The forward pass of ``layer_norm_fn``, without autograd.

    Returns (y, y1, mean, rstd, residual_out, seeds, dropout_mask, dropout_mask1): mean, rstd (...)
    float32 (mean None for RMSNorm), residual_out is r in residual_dtype (that of residual, else of
    x), seeds are what ``_layer_norm_bwd`` draws the masks from again. What was not asked for is
    None.
    """
    _check_scales(x, x1, rowscale, dropout_p)
    with torch.no_grad():
        seeds = dropout_mask = dropout_mask1 = None
        total = _wide(x)
        if rowscale is not None:
            total = total * _by_row(rowscale, total)
        if dropout_p > 0.0:
            seeds = torch.randint(2**62, (1 if x1 is None else 2,), dtype=torch.int64)
            dropout_mask, dropout_mask1 = _drawn_masks(x, x1, dropout_p, seeds)
            total = _masked(total, dropout_mask, dropout_p)
        if x1 is not None:
            wide1 = _wide(x1)
            total = total + (wide1 if seeds is None else _masked(wide1, dropout_mask1, dropout_p))
        if residual is not None:
            total = total + _wide(residual)
        if residual_dtype is None:
            residual_dtype = x.dtype if residual is None else residual.dtype
        mean = None if is_rms_norm else total.mean(dim=-1)
        centred = total if mean is None else total - mean.unsqueeze(-1)
        rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
        normed = centred * rstd.unsqueeze(-1)

        def affine(weight: Tensor, bias: Optional[Tensor]) -> Tensor:
            out = normed * _wide(weight)
            out = out if bias is None else out + _wide(bias)
            return out.to(x.dtype if out_dtype is None else out_dtype)

        y = affine(weight, bias)
        y1 = None if weight1 is None else affine(weight1, bias1)
        if not return_dropout_mask:
            dropout_mask = dropout_mask1 = None
        return y, y1, mean, rstd, total.to(residual_dtype), seeds, dropout_mask, dropout_mask1


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    dresidual=None,
    dy1=None,
    weight1=None,
    bias1=None,
    seeds=None,
    dropout_p=0.0,
    rowscale=None,
    has_residual=False,
    has_x1=False,
    is_rms_norm=False,
    x_dtype=None,
    recompute_output=False,
):
    """The gradients that belong to ``_layer_norm_fwd``; x is its residual_out, dresidual the
    gradient of that.

    Returns (dx, dw, db, dresidual_in, dx1, dw1, db1), and with recompute_output y too. What does
    not exist is None.
    """
    with torch.no_grad():
        centred = _wide(x) if mean is None else _wide(x) - mean.unsqueeze(-1)
        normed = centred * rstd.unsqueeze(-1)

        def parameters(
            grad: Tensor, weight: Tensor, bias: Optional[Tensor]
        ) -> tuple[Tensor, Optional[Tensor]]:
            flat = grad.reshape(-1, grad.shape[-1])
            dw = (flat * normed.reshape(flat.shape)).sum(dim=0).to(weight.dtype)
            return dw, None if bias is None else flat.sum(dim=0).to(bias.dtype)

        grad = _wide(dy)
        dnormed = grad * _wide(weight)
        dw, db = parameters(grad, weight, bias)
        dw1 = db1 = None
        if weight1 is not None:
            grad1 = _wide(dy1)
            dnormed = dnormed + grad1 * _wide(weight1)
            dw1, db1 = parameters(grad1, weight1, bias1)
        dtotal = dnormed - normed * (normed * dnormed).mean(dim=-1, keepdim=True)
        if not is_rms_norm:
            dtotal = dtotal - dnormed.mean(dim=-1, keepdim=True)
        dtotal = dtotal * rstd.unsqueeze(-1)
        if dresidual is not None:
            dtotal = dtotal + _wide(dresidual)
        x_dtype = x.dtype if x_dtype is None else x_dtype
        dx, dx1 = dtotal, dtotal if has_x1 else None
        if dropout_p > 0.0:
            mask, mask1 = _drawn_masks(x, x if has_x1 else None, dropout_p, seeds)
            dx = _masked(dx, mask, dropout_p)
            dx1 = None if dx1 is None else _masked(dx1, mask1, dropout_p)
        if rowscale is not None:
            dx = dx * _by_row(rowscale, dx)
        gradients = (
            dx.to(x_dtype),
            dw,
            db,
            dtotal.to(x.dtype) if has_residual else None,
            None if dx1 is None else dx1.to(x_dtype),
            dw1,
            db1,
        )
        if not recompute_output:
            return gradients
        y = normed * _wide(weight)
        y = y if bias is None else y + _wide(bias)
        return (*gradients, y.to(dy.dtype))


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-06,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """Scale, dropout, sum and norm in one; differentiable.

    Returns out in x's dtype; then the second output where weight1 is given; then, with prenorm, r
    in residual's dtype (without a residual: float32 with residual_in_fp32, else x's); then, with
    return_dropout_mask, the masks of x and x1 (bool, True where kept, of x's shape, None without
    dropout). A tuple as soon as there is more than one.
    """
    _check_scales(x, x1, rowscale, dropout_p)
    kind = "rms" if is_rms_norm else "layer"
    dropout_mask = dropout_mask1 = None
    if x1 is None and weight1 is None and rowscale is None and dropout_p == 0.0:
        result = krait_ops.norm(
            x,
            weight,
            bias,
            kind=kind,
            residual=residual,
            eps=eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32 and residual is None,
        )
        outputs = list(result) if prenorm else [result]
    else:
        total = _wide(x)
        if rowscale is not None:
            total = total * _by_row(rowscale, total)
        if dropout_p > 0.0:
            dropout_mask = torch.rand(x.shape, device=x.device) >= dropout_p
            total = _masked(total, dropout_mask, dropout_p)
        if x1 is not None:
            wide1 = _wide(x1)
            if dropout_p > 0.0:
                dropout_mask1 = torch.rand(x1.shape, device=x1.device) >= dropout_p
                wide1 = _masked(wide1, dropout_mask1, dropout_p)
            total = total + wide1
        if residual is not None:
            total = total + _wide(residual)
        outputs = [krait_ops.norm(total, weight, bias, kind=kind, eps=eps).to(x.dtype)]
        if weight1 is not None:
            outputs.append(krait_ops.norm(total, weight1, bias1, kind=kind, eps=eps).to(x.dtype))
        if prenorm:
            if residual is not None:
                outputs.append(total.to(residual.dtype))
            else:
                outputs.append(total if residual_in_fp32 else total.to(x.dtype))
    if return_dropout_mask:
        outputs += [dropout_mask, dropout_mask1]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-06,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """``layer_norm_fn`` with RMSNorm."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        eps=eps,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-06,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """A linear layer (E, D) on the norm of r = x + residual: out, with prenorm (out, r)."""
    result = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual=residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    y = result[0] if prenorm else result
    if not torch.is_autocast_enabled(x.device.type):
        y = y.to(linear_weight.dtype)
    out = F.linear(y, linear_weight, linear_bias)
    return (out, result[1]) if prenorm else out
