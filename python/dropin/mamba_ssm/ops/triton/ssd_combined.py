"""SSD, the scan of Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060), by upstream's interface.

Shapes: B sequences, L tokens in C chunks of Q, H heads of P channels, G groups, N states, K taps.
d_t = clamp(softplus(dt_t + dt_bias), dt_limit); S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T; out =
(S_t C_t + D x_t) silu(z_t).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
from krait.torch import functional as krait_ops
from krait.torch._operator import check_offsets
from torch import Tensor

from ..selective_scan_interface import selective_scan_fn
from ._chunks import per_head
from .layernorm_gated import rms_norm_ref
from .ssd_bmm import _bmm_chunk_fwd
from .ssd_chunk_scan import _chunk_scan_fwd, chunk_scan, chunk_scan_ref
from .ssd_chunk_state import (
    _chunk_cumsum_fwd,
    _chunk_state_fwd,
    chunk_state,
    chunk_state_ref,
    chunk_state_varlen,
)
from .ssd_state_passing import _state_passing_fwd, state_passing, state_passing_ref

__all__ = [
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "selective_scan_bwd",
    "ssd_chunk_scan_combined_ref",
    "ssd_selective_scan",
]

_NO_LIMIT = (0.0, float("inf"))


def _mamba_chunk_scan_combined_fwd(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    state_dtype=None,
):
    """The forward pass of ``mamba_chunk_scan_combined`` step by step, with what each step leaves.

    Returns (out (B, L, H, P), out before the gate or None, dt and dA_cumsum (B, H, C, Q), states
    before each chunk (B, C, H, P, N), final_states (B, H, P, N)) and, with cu_seqlens,
    varlen_states (n, H, P, N). seq_idx counts from 0 here. Differentiable.
    """
    if seq_idx is None and cu_seqlens is not None:
        seq_idx = _numbered(cu_seqlens, x.shape[1])
    dA_cumsum, dt = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, dt_softplus, dt_limit)
    left = _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=seq_idx)
    before, final_states = _state_passing_fwd(
        left.flatten(-2),
        dA_cumsum[..., -1],
        None if initial_states is None else initial_states.flatten(-2),
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        out_dtype=state_dtype,
    )
    states = before.unflatten(-1, left.shape[-2:])
    final_states = final_states.unflatten(-1, left.shape[-2:])
    cb = _bmm_chunk_fwd(C, B, chunk_size, seq_idx=seq_idx, output_dtype=dt.dtype)
    out, out_x = _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, states, D=D, z=z, seq_idx=seq_idx)
    results = (out, out_x, dt, dA_cumsum, states, final_states)
    if cu_seqlens is None:
        return results
    varlen_states = chunk_state_varlen(
        B.squeeze(0),
        x.squeeze(0),
        dt.squeeze(0),
        dA_cumsum.squeeze(0),
        cu_seqlens,
        states.squeeze(0),
    )
    return (*results, varlen_states)


def _numbered(cu_seqlens: Tensor, length: int) -> Tensor:
    """The number (1, L) int32 of the packed sequence that each token belongs to."""
    places = torch.arange(length, device=cu_seqlens.device)
    numbers = torch.searchsorted(cu_seqlens.long(), places, right=True) - 1
    return numbers.to(torch.int32).unsqueeze(0)


def _leaf(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.detach().requires_grad_()


def _mamba_chunk_scan_combined_bwd(
    dout,
    x,
    dt,
    A,
    B,
    C,
    out,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    dfinal_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    dx=None,
    ddt=None,
    dB=None,
    dC=None,
    dz=None,
    recompute_output=False,
    state_dtype=None,
):
    """The gradients of ``mamba_chunk_scan_combined`` for dout (B, L, H, P) and dfinal_states (B, H,
    P, N).

    Returns (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states), None where there is no input,
    and with recompute_output the output too. dx, ddt, dB, dC and dz are written into where they are
    given. ``out`` is not needed.
    """
    inputs = [_leaf(t) for t in (x, dt, A, B, C, D, z, dt_bias, initial_states)]
    with torch.enable_grad():
        result = krait_ops.ssd(
            *inputs[:8],
            initial_states=inputs[8],
            seq_idx=seq_idx,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            return_final_states=dfinal_states is not None,
        )
    there = [t for t in inputs if t is not None]
    if dfinal_states is None:
        again, gradients = result, torch.autograd.grad(result, there, dout)
    else:
        again, gradients = result[0], torch.autograd.grad(result, there, (dout, dfinal_states))
    found = iter(gradients)
    ordered = [None if t is None else next(found) for t in inputs]
    for place, destination in zip((0, 1, 3, 4, 6), (dx, ddt, dB, dC, dz)):
        if destination is not None:
            ordered[place] = destination.copy_(ordered[place])
    return (*ordered, again.detach()) if recompute_output else tuple(ordered)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
):
    """SSD over whole sequences; differentiable.

    x, z (B, L, H, P); dt (B, L, H); A, dt_bias (H,); B, C (B, L, G, N); D (H,) or (H, P);
    initial_states (B, H, P, N); seq_idx (B, L): the state restarts where it changes; cu_seqlens (n
    + 1,): bounds of sequences packed into one row, where varlen states are taken and, without
    seq_idx, the state restarts. chunk_size and state_dtype (states are float32) change nothing but
    rounding.

    Returns out (B, L, H, P) in x's dtype; then, as a tuple, final_states (B, H, P, N) and
    varlen_states (n, H, P, N), where they are asked for.
    """
    arguments = (x, dt, A, B, C, D, z, dt_bias)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size}
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(
            "[mamba_chunk_scan_combined] return_varlen_states was given without cu_seqlens, "
            "expected the bounds of the sequences"
        )
    if cu_seqlens is not None:
        check_offsets("mamba_chunk_scan_combined", cu_seqlens)
    if cu_seqlens is not None and seq_idx is None:
        sequences = cu_seqlens.shape[0] - 1
        if initial_states is not None and initial_states.shape[0] != sequences:
            # The one state of the row belongs to the sequence that the row starts with.
            rest = initial_states.new_zeros((sequences - 1, *initial_states.shape[1:]))
            initial_states = torch.cat([initial_states, rest])
        wants_states = return_final_states or return_varlen_states
        result = krait_ops.ssd(
            *arguments,
            initial_states=initial_states,
            cu_seqlens=cu_seqlens,
            return_final_states=wants_states,
            **options,
        )
        out, varlen_states = result if wants_states else (result, None)
        final_states = None
        if return_final_states:
            # The sequence of the row's last token, found without reading from the device.
            last = torch.searchsorted(cu_seqlens, cu_seqlens[-1:] - 1, right=True) - 1
            final_states = varlen_states.index_select(0, last.clamp(min=0))
    else:
        result = krait_ops.ssd(
            *arguments,
            initial_states=initial_states,
            seq_idx=seq_idx,
            return_final_states=return_final_states,
            **options,
        )
        out, final_states = result if return_final_states else (result, None)
        varlen_states = None
        if return_varlen_states:
            varlen_states = _varlen_states(
                x, dt, A, B, C, dt_bias, cu_seqlens, dt_softplus, dt_limit, chunk_size
            )
    results = [out]
    if return_final_states:
        results.append(final_states)
    if return_varlen_states:
        results.append(varlen_states)
    return results[0] if len(results) == 1 else tuple(results)


def _varlen_states(x, dt, A, B, C, dt_bias, cu_seqlens, dt_softplus, dt_limit, chunk_size):
    """The states (n, H, P, N) of the sequences between cu_seqlens, which start empty."""
    return krait_ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        dt_bias=dt_bias,
        cu_seqlens=cu_seqlens,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        return_final_states=True,
    )[1]


def mamba_chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    """SSD (B, L, H, P) from its steps; arguments as ``mamba_chunk_scan_combined``'s."""
    dA_cumsum, dt = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, dt_softplus)
    left = chunk_state(B, x, dt, dA_cumsum)
    before, _ = state_passing(left.flatten(-2), dA_cumsum[..., -1])
    return chunk_scan(B, C, x, dt, dA_cumsum, before.unflatten(-1, left.shape[-2:]), D=D, z=z)


def ssd_chunk_scan_combined_ref(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """``mamba_chunk_scan`` from the plain forms of its steps."""
    dA_cumsum, dt = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, dt_softplus)
    left = chunk_state_ref(B, x, dt, dA_cumsum)
    before, _ = state_passing_ref(left.flatten(-2), dA_cumsum[..., -1])
    return chunk_scan_ref(B, C, x, dt, dA_cumsum, before.unflatten(-1, left.shape[-2:]), D=D, z=z)


def _as_channels(tensor: Tensor) -> Tensor:
    """(B, L, H, P) as (B, H P, L)."""
    return tensor.flatten(2).transpose(1, 2)


def ssd_selective_scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
):
    """SSD (B, L, H, P) by way of Mamba's scan; differentiable.

    dt (B, L, H) or (B, L, H, P); A (H,) or (H P, N); D, dt_bias (H,) or (H, P); the others as in
    ``mamba_chunk_scan_combined``.
    """
    heads, width = x.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)

    def per_channel(tensor: Tensor) -> Tensor:
        """(H,) or (H, P) as (H P,)."""
        tensor = tensor if tensor.dim() == 2 else tensor.unsqueeze(-1).expand(heads, width)
        return tensor.reshape(-1)

    if A.dim() == 1:
        A = A[:, None, None].expand(heads, width, B.shape[-1]).reshape(heads * width, -1)
    if dt.dim() == 3:
        dt = dt.unsqueeze(-1).expand(*dt.shape, width)
    dt = _as_channels(dt)
    bias = None if dt_bias is None else per_channel(dt_bias)
    if tuple(dt_limit) != _NO_LIMIT:
        dt = dt.to(wide)
        if bias is not None:
            dt = dt + bias.unsqueeze(-1)
        if dt_softplus:
            dt = F.softplus(dt)
        dt, bias, dt_softplus = dt.clamp(*dt_limit), None, False
    out = selective_scan_fn(
        _as_channels(x),
        dt,
        A.to(wide),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        D=None if D is None else per_channel(D),
        z=None if z is None else _as_channels(z),
        delta_bias=bias,
        delta_softplus=dt_softplus,
    )
    return out.transpose(1, 2).unflatten(2, (heads, width))


def selective_scan_bwd(dout, x, dt, A, B, C, D=None, z=None):
    """The gradients of ``ssd_selective_scan`` for dout (B, L, H, P).

    dt is (B, L, H), (B, L, H, P) or cut into chunks, (B, H, C, Q) or (B, H, P, C, Q), with its bias
    and softplus applied. Returns (dx, ddt, dA, dB, dC, dD, dz), None where there is no input.
    """
    length, heads = x.shape[1:3]
    inputs = [_leaf(t) for t in (x, dt, A, B, C, D, z)]
    with torch.enable_grad():
        step = inputs[1]
        if step.dim() == 5:
            step = step.flatten(3)[..., :length].permute(0, 3, 1, 2)
        elif step.dim() == 4 and step.shape[1:3] != (length, heads):
            step = step.flatten(2)[..., :length].transpose(1, 2)
        out = ssd_selective_scan(inputs[0], step, *inputs[2:])
    found = iter(torch.autograd.grad(out, [t for t in inputs if t is not None], dout))
    return tuple(None if t is None else next(found) for t in inputs)


def _heads_and_width(D: Tensor, headdim: Optional[int]) -> tuple[int, int]:
    if D.dim() == 2:
        return D.shape[0], D.shape[1]
    if headdim is None:
        raise ValueError(
            f"[mamba_split_conv1d_scan] D has shape {tuple(D.shape)} and headdim is None, "
            "expected headdim or D of (nheads, headdim)"
        )
    return D.shape[0], headdim


def _split(zxbcdt: Tensor, heads: int, inner: int, xBC_width: int) -> list[Tensor]:
    """z0, x0, z, [x B C] and dt of zxbcdt (B, L, W); z0 and x0 are empty without an MLP part."""
    beside = zxbcdt.shape[-1] - inner - xBC_width - heads
    if beside < 0 or beside % 2:
        raise ValueError(
            f"[mamba_split_conv1d_scan] zxbcdt is {zxbcdt.shape[-1]} wide, expected z, "
            f"x B C and dt of {inner} + {xBC_width} + {heads} and an even rest"
        )
    return list(zxbcdt.split([beside // 2, beside // 2, inner, xBC_width, heads], dim=-1))


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-06,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
):
    """A Mamba-2 block behind its input projection: convolution, SSD, gated norm, out projection;
    differentiable.

    zxbcdt (B, L, 2 M + 2 H P + 2 G N + H) holds [z0 x0] (M wide each, a gated MLP beside the scan,
    M may be 0), z, x, B, C, dt; conv1d_weight (H P + 2 G N, K); dt_bias, A (H,); D (H,) or (H, P);
    rmsnorm_weight (H P,), norm over each of G groups, without it z gates inside SSD; outproj_weight
    (E, M + H P); outproj_bias (E,). headdim is P, needed with D (H,).

    Returns out (B, L, E), without outproj_weight (B, L, M + H P), and with return_final_states also
    (B, H, P, N).
    """
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(
            f"[mamba_split_conv1d_scan] activation is {activation!r}, expected None, "
            "'silu' or 'swish'"
        )
    result = krait_ops.split_conv1d_scan(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        headdim=_heads_and_width(D, headdim)[1],
        ngroups=ngroups,
        activation=activation,
        norm_weight=rmsnorm_weight,
        norm_eps=rmsnorm_eps,
        norm_before_gate=norm_before_gate,
        dt_limit=dt_limit,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )
    out, final_states = result if return_final_states else (result, None)
    if outproj_weight is not None:
        out = _projected(out, outproj_weight, outproj_bias)
    return (out, final_states) if return_final_states else out


def _projected(y: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return F.linear(y, weight, None if bias is None else bias.to(weight.dtype))


def mamba_conv1d_scan_ref(
    xBC,
    conv1d_weight,
    conv1d_bias,
    dt,
    A,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    headdim=None,
    ngroups=1,
):
    """Convolution over [x B C] (B, L, H P + 2 G N), then SSD token by token, in plain PyTorch: (B,
    L, H, P).

    dt (B, L, H); z (B, L, H P); H comes from dt, so headdim is checked alone.
    """
    heads = dt.shape[-1]
    states = 2 * ngroups
    xBC = causal_conv1d_ref(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation
    ).transpose(1, 2)
    if headdim is None:
        if D is None or D.dim() != 2:
            raise ValueError(
                "[mamba_conv1d_scan_ref] headdim is None, expected headdim or D of "
                "(nheads, headdim)"
            )
        headdim = D.shape[1]
    inner = heads * headdim
    width = (xBC.shape[-1] - inner) // states
    x, B, C = xBC.split([inner, ngroups * width, ngroups * width], dim=-1)
    return _ssd_ref(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, width)),
        C.unflatten(-1, (ngroups, width)),
        D,
        None if z is None else z.unflatten(-1, (heads, headdim)),
        dt_bias,
        dt_softplus,
        dt_limit,
    )


def _ssd_ref(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit):
    """The recurrence of SSD token by token, in float32 or float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    heads = x.shape[2]
    step = dt.to(wide)
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = F.softplus(step)
    step = step.clamp(*dt_limit)
    u = x.to(wide)
    B_, C_ = per_head(B.to(wide), heads, 2), per_head(C.to(wide), heads, 2)
    decay = torch.exp(step * A.to(wide))
    drive = step.unsqueeze(-1) * u
    state = u.new_zeros((x.shape[0], heads, x.shape[3], B.shape[-1]))
    outputs = []
    for decay_t, drive_t, B_t, C_t in zip(*(t.unbind(1) for t in (decay, drive, B_, C_))):
        outer = drive_t.unsqueeze(-1) * B_t.unsqueeze(-2)
        state = decay_t[..., None, None] * state + outer
        outputs.append((state * C_t.unsqueeze(-2)).sum(dim=-1))
    out = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)
    if D is not None:
        out = out + u * (D if D.dim() == 2 else D.unsqueeze(-1)).to(wide)
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(x.dtype)


def mamba_split_conv1d_scan_ref(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-06,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """``mamba_split_conv1d_scan_combined`` in plain PyTorch, token by token."""
    heads, width = _heads_and_width(D, headdim)
    inner = heads * width
    z0, x0, z, xBC, dt = _split(zxbcdt, heads, inner, conv1d_weight.shape[0])
    y = mamba_conv1d_scan_ref(
        xBC,
        conv1d_weight,
        conv1d_bias,
        dt,
        A,
        chunk_size,
        D=D,
        z=z if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        activation=activation,
        headdim=width,
        ngroups=ngroups,
    ).flatten(-2)
    if rmsnorm_weight is not None:
        y = rms_norm_ref(
            y,
            rmsnorm_weight,
            None,
            z=z,
            eps=rmsnorm_eps,
            group_size=inner // ngroups,
            norm_before_gate=norm_before_gate,
        )
    if z0.shape[-1]:
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    return y if outproj_weight is None else _projected(y, outproj_weight, outproj_bias)
