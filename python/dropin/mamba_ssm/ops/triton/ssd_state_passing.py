"""The step of SSD that hands states from chunk to chunk (arXiv:2405.21060).

Shapes: B sequences, C chunks of Q tokens, H heads, M = P N numbers of a state.
"""

from __future__ import annotations

import torch

from ._chunks import sequence_before, sequence_chunks

__all__ = ["state_passing", "state_passing_ref"]


def _chunk_decays(dA_chunk_cumsum, seq_idx, chunk_size):
    """exp of dA_chunk_cumsum as (B, C, H), 0 for chunks at whose end another sequence runs."""
    decays = torch.exp(dA_chunk_cumsum).transpose(1, 2)
    if seq_idx is None:
        return decays
    before = sequence_before(seq_idx, chunk_size)
    after = sequence_chunks(seq_idx, chunk_size)[..., -1]
    return decays.masked_fill((before != after).unsqueeze(-1), 0.0)


def _state_passing_fwd(
    states,
    dA_chunk_cumsum,
    initial_states=None,
    seq_idx=None,
    chunk_size=None,
    out_dtype=None,
):
    """s_c = exp(dA_c) s_{c-1} + states_c, from initial_states or 0; differentiable.

    states (B, C, H, M): what each chunk leaves by itself; dA_chunk_cumsum (B, H, C); initial_states
    (B, H, M); seq_idx (B, L), with chunk_size: states end with their sequence. Returns the states
    before each chunk (B, C, H, M) in out_dtype or states' dtype, and the state after the last (B,
    H, M) float32.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    decays = _chunk_decays(dA_chunk_cumsum.to(wide), seq_idx, chunk_size)
    state = torch.zeros_like(states[:, 0], dtype=wide) if initial_states is None else None
    state = initial_states.to(wide) if state is None else state
    before = []
    for c in range(states.shape[1]):
        before.append(state)
        state = decays[:, c].unsqueeze(-1) * state + states[:, c].to(wide)
    return torch.stack(before, dim=1).to(states.dtype if out_dtype is None else out_dtype), state


def _state_passing_bwd(
    states,
    dA_chunk_cumsum,
    dout,
    dfinal_states=None,
    seq_idx=None,
    has_initial_states=None,
    dstates_dtype=None,
    states_dtype=None,
    chunk_size=None,
):
    """The gradients that belong to ``_state_passing_fwd``; states and dout (B, C, H, M) are of its
    output.

    Returns (dstates (B, C, H, M), ddA_chunk_cumsum (B, H, C), dinitial_states (B, H, M) or None),
    and with states_dtype the given states in it too.
    """
    with torch.no_grad():
        wide = torch.promote_types(states.dtype, torch.float32)
        decays = _chunk_decays(dA_chunk_cumsum.to(wide), seq_idx, chunk_size)
        if dfinal_states is None:
            grad = torch.zeros_like(states[:, 0], dtype=wide)
        else:
            grad = dfinal_states.to(wide)
        dstates, ddecays = [], []
        for c in range(states.shape[1] - 1, -1, -1):
            dstates.append(grad)
            ddecays.append((grad * states[:, c].to(wide)).sum(dim=-1) * decays[:, c])
            grad = decays[:, c].unsqueeze(-1) * grad + dout[:, c].to(wide)
        dstates = torch.stack(dstates[::-1], dim=1)
        dstates = dstates.to(states.dtype if dstates_dtype is None else dstates_dtype)
        ddA = torch.stack(ddecays[::-1], dim=-1)
        dinitial_states = grad if has_initial_states else None
        if states_dtype is None:
            return dstates, ddA, dinitial_states
        return dstates, ddA, dinitial_states, states.to(states_dtype)


def state_passing(states, dA_chunk_cumsum, initial_states=None):
    """``_state_passing_fwd`` without sequences: (states before each chunk, last state)."""
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


def state_passing_ref(states, dA_chunk_cumsum, initial_states=None):
    """``state_passing`` as one product with the decays between all pairs of chunks."""
    wide = torch.promote_types(states.dtype, torch.float32)
    first = torch.zeros_like(states[:, :1]) if initial_states is None else initial_states[:, None]
    entries = torch.cat([first.to(wide), states.to(wide)], dim=1)
    ends = torch.nn.functional.pad(dA_chunk_cumsum.to(wide), (1, 0)).cumsum(dim=-1)
    exponents = ends.unsqueeze(-1) - ends.unsqueeze(-2)
    later = torch.ones(exponents.shape[-2:], dtype=torch.bool, device=states.device).triu(1)
    decays = torch.exp(exponents.masked_fill(later, float("-inf")))
    passed = torch.einsum("bhij,bjhm->bihm", decays, entries)
    return passed[:, :-1].to(states.dtype), passed[:, -1]
