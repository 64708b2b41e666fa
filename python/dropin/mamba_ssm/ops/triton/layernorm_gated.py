"""LayerNorm and RMSNorm with a gate and groups of channels, as Mamba-2 has it (arXiv:2405.21060).

norm(x) * silu(z) with norm_before_gate, else norm(x * silu(z)); over each group of group_size
channels. Shapes: x, z (..., D); weight, bias (D,).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from krait.torch import GatedLayerNorm as LayerNorm
from krait.torch import GatedRMSNorm as RMSNorm
from krait.torch import functional as krait_ops
from torch import Tensor

__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_norm_ref(
    x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, upcast=True
):
    """``rmsnorm_fn`` in plain PyTorch, in float32 with upcast, else in its arguments' dtypes."""
    dtype = x.dtype
    if upcast:
        x, weight = _wide(x), _wide(weight)
        bias = None if bias is None else _wide(bias)
        z = None if z is None else _wide(z)
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, x.shape[-1] if group_size is None else group_size))
    rstd = torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)
    out = (groups * rstd).flatten(-2) * weight
    out = out if bias is None else out + bias
    if z is not None and norm_before_gate:
        out = out * F.silu(z)
    return out.to(dtype)


def _grouped(x: Tensor, group_size: Optional[int]) -> Tensor:
    """x (..., D) as float32 (M, G, D / G)."""
    width = x.shape[-1]
    return _wide(x).reshape(-1, width // (group_size or width), group_size or width)


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    z=None,
    out=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """The forward pass of ``layernorm_fn`` without autograd, into ``out`` where it is given.

    Returns (out, mean, rstd); mean (None for RMSNorm) and rstd are (G * M,) float32: group by
    group, the M rows of x.
    """
    with torch.no_grad():
        groups = _grouped(x, group_size)
        gate = None if z is None else F.silu(_grouped(z, group_size))
        if gate is not None and not norm_before_gate:
            groups = groups * gate
        mean = None if is_rms_norm else groups.mean(dim=-1)
        centred = groups if mean is None else groups - mean.unsqueeze(-1)
        rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
        y = centred * rstd.unsqueeze(-1) * _grouped(weight, group_size)
        if bias is not None:
            y = y + _grouped(bias, group_size)
        if gate is not None and norm_before_gate:
            y = y * gate
        y = y.reshape(x.shape).to(x.dtype)
        out = y if out is None else out.copy_(y)
        return out, None if mean is None else mean.T.flatten(), rstd.T.flatten()


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    z=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    recompute_output=False,
    dz=None,
    out=None,
):
    """The gradients that belong to ``_layer_norm_fwd``, from its mean and rstd.

    Returns (dx, dw, db, dz), None where there is no input, and with recompute_output the output
    too. dz and out are written into where they are given.
    """
    with torch.no_grad():
        grad, scale = _grouped(dy, group_size), _grouped(weight, group_size)
        raw = _grouped(x, group_size)
        rows, number = raw.shape[:2]
        groups, silu, slope = raw, None, None
        if z is not None:
            wide_z = _grouped(z, group_size)
            sigmoid = torch.sigmoid(wide_z)
            silu = wide_z * sigmoid
            slope = sigmoid * (1.0 + wide_z * (1.0 - sigmoid))
            if not norm_before_gate:
                groups = raw * silu
        if mean is not None:
            groups = groups - mean.reshape(number, rows).T.unsqueeze(-1)
        spread = rstd.reshape(number, rows).T.unsqueeze(-1)
        normed = groups * spread
        affine = normed * scale
        if bias is not None:
            affine = affine + _grouped(bias, group_size)
        gate_grad = None
        if silu is not None and norm_before_gate:
            gate_grad = grad * affine * slope
            grad = grad * silu
        dw = (grad * normed).sum(dim=0).reshape(weight.shape).to(weight.dtype)
        db = None if bias is None else grad.sum(dim=0).reshape(bias.shape).to(bias.dtype)
        dnormed = grad * scale
        dgroups = dnormed - normed * (normed * dnormed).mean(dim=-1, keepdim=True)
        if not is_rms_norm:
            dgroups = dgroups - dnormed.mean(dim=-1, keepdim=True)
        dgroups = dgroups * spread
        if silu is not None and not norm_before_gate:
            gate_grad = dgroups * raw * slope
            dgroups = dgroups * silu
        dx = dgroups.reshape(x.shape).to(x.dtype)
        if gate_grad is not None:
            gate_grad = gate_grad.reshape(z.shape).to(z.dtype)
            dz = gate_grad if dz is None else dz.copy_(gate_grad)
        if not recompute_output:
            return dx, dw, db, dz
        y = affine * silu if silu is not None and norm_before_gate else affine
        y = y.reshape(x.shape).to(x.dtype)
        return dx, dw, db, dz, y if out is None else out.copy_(y)


def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-06,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """The gated norm of x, in x's dtype; differentiable."""
    return krait_ops.norm(
        x,
        weight,
        bias,
        kind="rms" if is_rms_norm else "layer",
        z=z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
    )


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True):
    """``layernorm_fn`` with RMSNorm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)
