"""The step of SSD that forms the output from chunks and the states before them (arXiv:2405.21060).

Shapes: B sequences, L tokens in C chunks of Q, H heads of P channels, G groups, N states. A state
is (P, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._chunks import into_chunks, per_head, sequence_before, sequence_chunks
from .ssd_bmm import _bmm_chunk_fwd

__all__ = ["chunk_scan", "chunk_scan_ref"]


def _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, states, D=None, z=None, seq_idx=None):
    """The output of each token from its chunk and from the state before the chunk; differentiable.

    cb (B, C, G, Q, Q): C_i . B_j; x, z (B, L, H, P); dt, dA_cumsum (B, H, C, Q); C (B, L, G, N);
    states (B, C, H, P, N): before each chunk; D (H,) or (H, P); seq_idx (B, L). Returns (out (B, L,
    H, P), the same before the gate or None without z) in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length, heads = x.shape[1:3]
    chunk_size = dt.shape[-1]
    x_chunks = into_chunks(x.to(wide), chunk_size)
    exponents = dA_cumsum.unsqueeze(-1) - dA_cumsum.unsqueeze(-2)
    hidden = torch.ones((chunk_size, chunk_size), dtype=torch.bool, device=x.device).triu(1)
    from_state = torch.exp(dA_cumsum)
    if seq_idx is not None:
        numbers = sequence_chunks(seq_idx, chunk_size)
        hidden = hidden | (numbers.unsqueeze(-1) != numbers.unsqueeze(-2)).unsqueeze(1)
        other = numbers != sequence_before(seq_idx, chunk_size).unsqueeze(-1)
        from_state = from_state.masked_fill(other.unsqueeze(1), 0.0)
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    decays = torch.exp(exponents.masked_fill(hidden, float("-inf")))
    scores = per_head(cb.to(wide), heads, 2).transpose(1, 2) * decays * dt.unsqueeze(-2)
    out = torch.einsum("bhcij,bcjhp->bcihp", scores, x_chunks)
    C_chunks = into_chunks(per_head(C.to(wide), heads, 2), chunk_size)
    carried = torch.einsum("bcqhn,bchpn->bcqhp", C_chunks, states.to(wide))
    out = out + carried * from_state.permute(0, 2, 3, 1).unsqueeze(-1)
    out = out.flatten(1, 2)[:, :length]
    if D is not None:
        out = out + x.to(wide) * (D if D.dim() == 2 else D.unsqueeze(-1)).to(wide)
    if z is None:
        return out.to(x.dtype), None
    return (out * F.silu(z.to(wide))).to(x.dtype), out.to(x.dtype)


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """``_chunk_scan_fwd`` with the products of B and C formed here: out (B, L, H, P)."""
    cb = _bmm_chunk_fwd(C, B, dt.shape[-1], output_dtype=torch.float32)
    return _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, prev_states, D=D, z=z)[0]


def chunk_scan_ref(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """``chunk_scan`` token by token: each chunk runs the recurrence from the state before it."""
    chunk_size = dt.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    heads, length = x.shape[2], x.shape[1]
    B_chunks, C_chunks = (into_chunks(per_head(m.to(wide), heads, 2), chunk_size) for m in (B, C))
    x_chunks = into_chunks(x.to(wide), chunk_size)
    steps = torch.diff(dA_cumsum, dim=-1, prepend=torch.zeros_like(dA_cumsum[..., :1]))
    state = prev_states.to(wide)
    decays = torch.exp(steps).permute(3, 0, 2, 1)[..., None, None]
    amounts = dt.permute(3, 0, 2, 1).unsqueeze(-1)
    tokens = (x_chunks.unbind(2), B_chunks.unbind(2), C_chunks.unbind(2))
    outputs = []
    for decay, amount, x_q, B_q, C_q in zip(decays.unbind(), amounts.unbind(), *tokens):
        state = decay * state + (amount * x_q).unsqueeze(-1) * B_q.unsqueeze(-2)
        outputs.append((state * C_q.unsqueeze(-2)).sum(dim=-1))
    out = torch.stack(outputs, dim=2).flatten(1, 2)[:, :length]
    if D is not None:
        out = out + x.to(wide) * (D if D.dim() == 2 else D.unsqueeze(-1)).to(wide)
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(x.dtype)
