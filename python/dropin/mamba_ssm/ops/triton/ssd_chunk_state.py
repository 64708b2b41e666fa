"""Steps of SSD on chunks: cumulated decays, and the state that the tokens of each chunk leave
(arXiv:2405.21060).

Shapes: B sequences, L tokens in C chunks of Q, H heads of P channels, G groups, N states. A state
is (P, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._chunks import into_chunks, per_head, sequence_chunks

__all__ = ["chunk_state", "chunk_state_ref", "chunk_state_varlen"]


def _chunk_cumsum_fwd(
    dt, A, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))
):
    """dt (B, L, H) with bias, softplus and limits applied, and the sums of dt A inside each chunk.

    A, dt_bias (H,). Differentiable. Returns (dA_cumsum, dt), both (B, H, C, Q) float32; dt is 0
    behind the last token.
    """
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = into_chunks(dt.clamp(*dt_limit), chunk_size).permute(0, 3, 1, 2)
    return (dt * A[:, None, None]).cumsum(dim=-1), dt


def _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=None, states=None, states_in_fp32=True):
    """The state at the end of each chunk that began with none; differentiable.

    B (B, L, G, N); x (B, L, H, P); dt, dA_cumsum (B, H, C, Q) as from ``_chunk_cumsum_fwd``;
    seq_idx (B, L): tokens of sequences before the chunk's last one do not count. Returns (B, C, H,
    P, N), float32 or with states_in_fp32 false in B's dtype, written into ``states`` where that is
    given.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    chunk_size = dt.shape[-1]
    B_chunks = into_chunks(per_head(B.to(wide), x.shape[2], 2), chunk_size)
    x_chunks = into_chunks(x.to(wide), chunk_size)
    weights = torch.exp(dA_cumsum[..., -1:] - dA_cumsum) * dt
    if seq_idx is not None:
        numbers = sequence_chunks(seq_idx, chunk_size)
        weights = weights.masked_fill((numbers != numbers[..., -1:]).unsqueeze(1), 0.0)
    weighted = x_chunks * weights.permute(0, 2, 3, 1).unsqueeze(-1)
    result = torch.einsum("bcqhp,bcqhn->bchpn", weighted, B_chunks)
    if states is not None:
        return states.copy_(result)
    return result if states_in_fp32 else result.to(B.dtype)


def chunk_state_varlen(B, x, dt, dA_cumsum, cu_seqlens, chunk_states):
    """The state at the end of each of S packed sequences, which do not see each other;
    differentiable.

    B (L, G, N); x (L, H, P); dt, dA_cumsum (H, C, Q); cu_seqlens (S + 1,); chunk_states (C, H, P,
    N): the state at the start of each chunk. Returns (S, H, P, N) in chunk_states' dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    chunk_size = dt.shape[-1]
    B_, x_ = per_head(B.to(wide), x.shape[1], 1), x.to(wide)
    dt_, decays = dt.flatten(1), dA_cumsum.flatten(1)
    bounds = cu_seqlens.tolist()
    found = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        if start == end:
            found.append(chunk_states.new_zeros(chunk_states.shape[1:]))
            continue
        chunk = (end - 1) // chunk_size
        first = max(start, chunk * chunk_size)
        weights = torch.exp(decays[:, end - 1 : end] - decays[:, first:end]) * dt_[:, first:end]
        weighted = x_[first:end] * weights.T.unsqueeze(-1)
        state = torch.einsum("lhp,lhn->hpn", weighted, B_[first:end])
        if start < chunk * chunk_size:
            decay = torch.exp(decays[:, end - 1])[:, None, None]
            state = state + decay * chunk_states[chunk].to(wide)
        found.append(state.to(chunk_states.dtype))
    if not found:
        return chunk_states.new_zeros((0, *chunk_states.shape[1:]))
    return torch.stack(found)


def chunk_state(B, x, dt, dA_cumsum, states_in_fp32=True):
    """``_chunk_state_fwd`` without sequences: (B, C, H, P, N); differentiable."""
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_ref(B, x, dt, dA_cumsum):
    """``chunk_state`` token by token: each chunk runs the recurrence from an empty state."""
    chunk_size = dt.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    B_chunks = into_chunks(per_head(B.to(wide), x.shape[2], 2), chunk_size)
    x_chunks = into_chunks(x.to(wide), chunk_size)
    steps = torch.diff(dA_cumsum, dim=-1, prepend=torch.zeros_like(dA_cumsum[..., :1]))
    decays = torch.exp(steps).permute(3, 0, 2, 1)[..., None, None]
    amounts = dt.permute(3, 0, 2, 1).unsqueeze(-1)
    tokens = (x_chunks.unbind(2), B_chunks.unbind(2))
    state = 0.0
    for decay, amount, x_q, B_q in zip(decays.unbind(), amounts.unbind(), *tokens):
        state = decay * state + (amount * x_q).unsqueeze(-1) * B_q.unsqueeze(-2)
    return state
