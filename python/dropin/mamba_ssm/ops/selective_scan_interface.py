"""The scan of Mamba (Gu and Dao, 2023, arXiv:2312.00752), by upstream's interface.

Shapes: B sequences, D channels, L tokens, N states, G groups, K taps, R the rank of delta.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
from krait.torch import functional as krait_ops
from torch import Tensor

__all__ = [
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_forward",
    "selective_scan_fn",
    "selective_scan_ref",
]


def rms_norm_forward(x, weight, bias, eps=1e-06, is_rms_norm=True):
    """Norm of x (..., D) with weight (D,) and bias (D,) or None; differentiable."""
    return krait_ops.norm(x, weight, bias, kind="rms" if is_rms_norm else "layer", eps=eps)


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t; y_t = C_t h_t + D u_t; out = y * silu(z).
    Differentiable.

    u, delta, z (B, D, L); A (D, N) float32 or complex64; B and C (D, N), (B, N, L) or (B, G, N, L),
    with complex A of length 2 L, real and imaginary part in turns; D, delta_bias (D,). delta_bias
    is added to delta before the softplus. Returns out (B, D, L) in u's dtype, and with
    return_last_state h_L (B, D, N) float32 or complex64, which is differentiable too.
    """
    return krait_ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )


def _by_channel(matrix: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """B or C as (B or 1, D, N, L or 1), complex where dtype is."""
    if matrix.dim() == 2:
        return matrix.to(dtype)[None, :, :, None]
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)
    if dtype.is_complex:
        pairs = matrix.to(dtype.to_real()).unflatten(-1, (-1, 2))
        matrix = torch.view_as_complex(pairs.contiguous())
    return matrix.to(dtype).repeat_interleave(channels // matrix.shape[1], dim=1)


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """``selective_scan_fn`` in plain PyTorch, one token after the other, in float32 or float64."""
    wide = torch.promote_types(u.dtype, torch.float32)
    state_dtype = torch.promote_types(wide, A.dtype)
    batch, channels, length = u.shape
    x, step = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        step = step + delta_bias.to(wide).unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step.unsqueeze(-1) * A.to(state_dtype)[:, None])
    drive = (step * x).unsqueeze(2) * _by_channel(B, channels, state_dtype)
    readout = _by_channel(C, channels, state_dtype).expand(-1, -1, -1, length)
    state = torch.zeros((batch, channels, A.shape[1]), dtype=state_dtype, device=u.device)
    outputs = []
    # Taken apart at once: the gradient of an indexed token would be as long as the sequence.
    for decay_t, drive_t, readout_t in zip(decay.unbind(2), drive.unbind(3), readout.unbind(3)):
        state = decay_t * state + drive_t
        out = (state * readout_t).sum(dim=-1)
        outputs.append(2.0 * out.real if state_dtype.is_complex else out)
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + x * D.to(wide).unsqueeze(-1)
    if z is not None:
        y = y * F.silu(z.to(wide))
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def _projected(
    x: Tensor,
    x_proj_weight: Tensor,
    rank: int,
    A: Tensor,
    B: Optional[Tensor],
    C: Optional[Tensor],
    B_proj_bias: Optional[Tensor],
    C_proj_bias: Optional[Tensor],
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """x (B, D, L) to what gives delta (B, L, R) and, if they are None, B and C (B, L, N or 2 N)."""
    width = A.shape[-1] * (2 if A.is_complex() else 1)
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    made_B = made_C = None
    if B is None:
        made_B = projected[..., rank : rank + width]
        if B_proj_bias is not None:
            made_B = made_B + B_proj_bias.to(made_B.dtype)
    if C is None:
        made_C = projected[..., projected.shape[-1] - width :]
        if C_proj_bias is not None:
            made_C = made_C + C_proj_bias.to(made_C.dtype)
    return projected[..., :rank], made_B, made_C


def _over_time(matrix: Tensor, A: Tensor) -> Tensor:
    """(B, L, N) as the scan's (B, 1, N, L); (B, L, 2 N) of a complex A as (B, 1, N, 2 L)."""
    if A.is_complex():
        return matrix.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2).unsqueeze(1)
    return matrix.transpose(1, 2).unsqueeze(1)


def _out_projected(y: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """y (B, D, L) to (B, L, E); transformers passes a float32 bias to weights of any dtype."""
    return F.linear(y.transpose(1, 2), weight, None if bias is None else bias.to(weight.dtype))


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-06,
):
    """A Mamba block between its input and output projections, both sides of the gate in xz;
    differentiable.

    xz (B, 2 D, L); conv1d_weight (D, 1, K), conv1d_bias (D,); x_proj_weight (R + 2 N, D);
    delta_proj_weight (D, R); out_proj_weight (E, D), out_proj_bias (E,); A, B, C, D, delta_bias as
    in ``selective_scan_fn``, where B and C are projected from x unless given. b_rms_weight,
    c_rms_weight (N,) norm B and C, and dt_rms_weight (D,) norms delta after its projection.
    checkpoint_lvl does not change the result. Returns (B, L, E).
    """
    rank = delta_proj_weight.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = krait_ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    delta, made_B, made_C = _projected(x, x_proj_weight, rank, A, B, C, B_proj_bias, C_proj_bias)
    delta = F.linear(delta, delta_proj_weight)
    if dt_rms_weight is not None:
        delta = rms_norm_forward(delta, dt_rms_weight, None, eps=b_c_dt_rms_eps)
    if made_B is not None:
        if b_rms_weight is not None:
            made_B = rms_norm_forward(made_B, b_rms_weight, None, eps=b_c_dt_rms_eps)
        B = _over_time(made_B, A)
    if made_C is not None:
        if c_rms_weight is not None:
            made_C = rms_norm_forward(made_C, c_rms_weight, None, eps=b_c_dt_rms_eps)
        C = _over_time(made_C, A)
    y = selective_scan_fn(
        x,
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
    )
    return _out_projected(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """``mamba_inner_fn`` without its norms, composed of the public operators as upstream's is.

    In plain PyTorch the convolution would round otherwise, and step sizes in the hundreds, as
    unscaled weights make them, blow that up beyond any tolerance.
    """
    rank = delta_proj_weight.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    delta, made_B, made_C = _projected(x, x_proj_weight, rank, A, B, C, B_proj_bias, C_proj_bias)
    y = selective_scan_fn(
        x,
        F.linear(delta, delta_proj_weight).transpose(1, 2),
        A,
        B if made_B is None else _over_time(made_B, A),
        C if made_C is None else _over_time(made_C, A),
        D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
    )
    return _out_projected(y, out_proj_weight, out_proj_bias)
