"""How the functions of SSD cut L tokens into C chunks of Q, the last one filled up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def into_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """(B, L, ...) as (B, C, Q, ...), with zeros behind the last token."""
    missing = -x.shape[1] % chunk_size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, chunk_size))


def sequence_chunks(seq_idx: Tensor, chunk_size: int) -> Tensor:
    """seq_idx (B, L) as (B, C, Q); what fills the last chunk is of the last token's sequence."""
    missing = -seq_idx.shape[1] % chunk_size
    if missing:
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, missing)], dim=1)
    return seq_idx.unflatten(1, (-1, chunk_size))


def sequence_before(seq_idx: Tensor, chunk_size: int) -> Tensor:
    """The sequence (B, C) that the state at the start of each chunk belongs to."""
    numbers = sequence_chunks(seq_idx, chunk_size)
    return torch.cat([seq_idx[:, :1], numbers[:, :-1, -1]], dim=1)


def per_head(x: Tensor, heads: int, dim: int) -> Tensor:
    """Repeats groups, dimension ``dim`` of x, for the heads of each."""
    return x.repeat_interleave(heads // x.shape[dim], dim=dim)
