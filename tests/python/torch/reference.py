"""The operators as loops over time in plain PyTorch: what krait.torch is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def wide(t):
    """f64, or c128, for what is not there: None."""
    if t is None:
        return None
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _segments(length, seq_idx, cu_seqlens, row):
    """Tokens of each run of one sequence, in order; those at -1 are in none."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [list(range(a, b)) for a, b in zip(bounds, bounds[1:])]
    if seq_idx is None:
        return [list(range(length))]
    runs, last = [], None
    for t, s in enumerate(seq_idx[row].tolist()):
        if s < 0:
            continue
        if s != last:
            runs.append([])
        runs[-1].append(t)
        last = s
    return runs or [[]]


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False,
    initial_state=None, seq_idx=None, cu_seqlens=None, reverse=False,
):  # fmt: skip
    """out and last_state in f64 (c128)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = map(
        wide, (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    batch, channels, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def by_channel(t):
        """(B, D, N, L), whatever spelling t has."""
        if t.dim() == 2:
            return t[None, :, :, None].expand(batch, -1, -1, length)
        t = t[:, None] if t.dim() == 3 else t
        if A.is_complex():
            t = torch.view_as_complex(t.unflatten(-1, (length, 2)).contiguous())
        return t.repeat_interleave(channels // t.shape[1], dim=1)

    B, C = by_channel(B), by_channel(C)
    outs, lasts = [], []
    for row in range(batch):
        columns = {}
        for k, run in enumerate(_segments(length, seq_idx, cu_seqlens, row)):
            h = torch.zeros_like(A)
            if initial_state is not None and cu_seqlens is not None:
                h = initial_state[k]
            order = run[::-1] if reverse else run
            if initial_state is not None and cu_seqlens is None:
                runs = _segments(length, seq_idx, None, row)
                if k == (len(runs) - 1 if reverse else 0):
                    h = initial_state[row]
            for t in order:
                d = delta[row, :, t, None]
                h = torch.exp(d * A) * h + d * B[row, :, :, t] * u[row, :, t, None]
                y = (h * C[row, :, :, t]).sum(-1)
                y = 2 * y.real if A.is_complex() else y
                columns[t] = y if D is None else y + D * u[row, :, t]
            if cu_seqlens is not None:
                lasts.append(h)
            elif k == (0 if reverse else len(_segments(length, seq_idx, None, row)) - 1):
                lasts.append(h)
        zero = u.new_zeros(channels)
        outs.append(torch.stack([columns.get(t, zero) for t in range(length)], -1))
    out = torch.stack(outs)
    if z is not None:
        out = out * F.silu(z)
    return out, torch.stack(lasts)


def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), reverse=False,
):  # fmt: skip
    """out and final_states in f64."""
    x, dt, A, B, C, D, z, dt_bias, initial_states = map(
        wide, (x, dt, A, B, C, D, z, dt_bias, initial_states)
    )
    batch, length, heads, headdim = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    B = B.repeat_interleave(heads // B.shape[2], dim=2)
    C = C.repeat_interleave(heads // C.shape[2], dim=2)
    outs, lasts = [], []
    for row in range(batch):
        columns = {}
        runs = _segments(length, seq_idx, cu_seqlens, row)
        for k, run in enumerate(runs):
            S = x.new_zeros(heads, headdim, B.shape[3])
            if initial_states is not None:
                if cu_seqlens is not None:
                    S = initial_states[k]
                elif k == (len(runs) - 1 if reverse else 0):
                    S = initial_states[row]
            for t in run[::-1] if reverse else run:
                d = dt[row, t]
                update = (d[:, None] * x[row, t])[:, :, None] * B[row, t][:, None, :]
                S = torch.exp(d * A)[:, None, None] * S + update
                y = (S * C[row, t][:, None, :]).sum(-1)
                if D is not None:
                    y = y + (D if D.dim() == 2 else D[:, None]) * x[row, t]
                columns[t] = y
            if cu_seqlens is not None or k == (0 if reverse else len(runs) - 1):
                lasts.append(S)
        zero = x.new_zeros(heads, headdim)
        outs.append(torch.stack([columns.get(t, zero) for t in range(length)]))
    out = torch.stack(outs)
    if z is not None:
        out = out * F.silu(z)
    return out, torch.stack(lasts)


def causal_conv1d(x, weight, bias=None, *, activation=None, initial_states=None):
    """out and final_states in f64."""
    x, weight, bias, initial_states = map(wide, (x, weight, bias, initial_states))
    width = weight.shape[1]
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], width - 1)
    padded = torch.cat((initial_states, x), dim=-1)
    out = F.conv1d(padded, weight[:, None], bias, groups=x.shape[1])
    final_states = padded[..., padded.shape[-1] - (width - 1) :]
    return (F.silu(out) if activation else out), final_states


def norm(
    x, weight, bias=None, *, kind="rms", residual=None, z=None, eps=1e-6, group_size=None,
    norm_before_gate=True,
):  # fmt: skip
    """out and x + residual in f64."""
    x, weight, bias, residual, z = map(wide, (x, weight, bias, residual, z))
    total = x if residual is None else x + residual
    r = total if z is None or norm_before_gate else total * F.silu(z)
    groups = r.unflatten(-1, (-1, group_size or r.shape[-1]))
    if kind == "layer":
        groups = groups - groups.mean(-1, keepdim=True)
    out = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return (out * F.silu(z) if z is not None and norm_before_gate else out), total
