"""The step of SSD that multiplies the tokens of a chunk with each other (arXiv:2405.21060)."""

from __future__ import annotations

import torch

from ._chunks import into_chunks, sequence_chunks

__all__: list[str] = []


def _bmm_chunk_fwd(a, b, chunk_size, seq_idx=None, causal=False, output_dtype=None):
    """a_i . b_j for tokens i, j of the same chunk; differentiable.

    a, b (B, L, K) or (B, L, G, K); seq_idx (B, L): 0 between tokens of different sequences; with
    causal 0 for j > i. Returns (B, C, Q, Q), with groups (B, C, G, Q, Q), in output_dtype or a's
    dtype.
    """
    has_groups = a.dim() == 4
    wide = torch.promote_types(a.dtype, torch.float32)
    a_chunks, b_chunks = into_chunks(a.to(wide), chunk_size), into_chunks(b.to(wide), chunk_size)
    if has_groups:
        out = torch.einsum("bcigk,bcjgk->bcgij", a_chunks, b_chunks)
    else:
        out = torch.einsum("bcik,bcjk->bcij", a_chunks, b_chunks)
    if seq_idx is not None:
        numbers = sequence_chunks(seq_idx, chunk_size)
        same = numbers.unsqueeze(-1) == numbers.unsqueeze(-2)
        out = out.masked_fill(~(same.unsqueeze(2) if has_groups else same), 0.0)
    if causal:
        out = out.tril()
    return out.to(a.dtype if output_dtype is None else output_dtype)
