"""Listing 1 of "Transformers are SSMs" (Dao and Gu, 2024, arXiv:2405.21060), for any length."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.triton._chunks import into_chunks

__all__ = ["segsum", "segsum_unstable", "ssd_minimal_discrete"]


def segsum_unstable(x: Tensor) -> Tensor:
    """sum of x over (j, i] for all i >= j, as differences of one cumulative sum: (..., T) to (...,
    T, T).

    -inf above the diagonal. Differences of long sums lose digits; ``segsum`` does not.
    """
    sums = x.cumsum(dim=-1)
    later = torch.ones((x.shape[-1],) * 2, dtype=torch.bool, device=x.device).triu(1)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(later, float("-inf"))


def segsum(x: Tensor) -> Tensor:
    """``segsum_unstable`` with each sum taken by itself."""
    length = x.shape[-1]
    ones = torch.ones((length, length), dtype=torch.bool, device=x.device)
    # Column j sums only what comes after row j.
    terms = x.unsqueeze(-1).expand(*x.shape, length).masked_fill(ones.triu(), 0.0)
    return terms.cumsum(dim=-2).masked_fill(ones.triu(1), float("-inf"))


def ssd_minimal_discrete(X, A, B, C, block_len, initial_states=None):
    """Y and the final state of S_t = exp(A_t) S_{t-1} + X_t B_t^T, Y_t = S_t C_t, by blocks;
    differentiable.

    X (B, L, H, P), already multiplied by dt; A (B, L, H), already multiplied by dt; B, C (B, L, H,
    N); initial_states (B, 1, H, P, N). From continuous x, A, dt: X = x * dt, A = A * dt. L need not
    be a multiple of block_len. Returns (Y (B, L, H, P), final state (B, H, P, N)).
    """
    length = X.shape[1]
    # Zeros behind the last token decay nothing and add nothing.
    X_, A_, B_, C_ = (into_chunks(t, block_len) for t in (X, A, B, C))
    steps = A_.permute(0, 3, 1, 2)
    sums = steps.cumsum(dim=-1)
    inside = torch.einsum("bclhn,bcshn->bhcls", C_, B_) * torch.exp(segsum(steps))
    Y = torch.einsum("bhcls,bcshp->bclhp", inside, X_)
    remaining = torch.exp(sums[..., -1:] - sums).permute(0, 2, 3, 1)
    left = torch.einsum("bclhn,bclh,bclhp->bchpn", B_, remaining, X_)
    first = torch.zeros_like(left[:, :1]) if initial_states is None else initial_states
    entries = torch.cat([first, left], dim=1)
    between = torch.exp(segsum(torch.nn.functional.pad(sums[..., -1], (1, 0))))
    passed = torch.einsum("bhzc,bchpn->bzhpn", between, entries)
    carried = torch.einsum("bclhn,bchpn->bclhp", C_, passed[:, :-1])
    Y = Y + carried * torch.exp(sums).permute(0, 2, 3, 1).unsqueeze(-1)
    return Y.flatten(1, 2)[:, :length], passed[:, -1]
