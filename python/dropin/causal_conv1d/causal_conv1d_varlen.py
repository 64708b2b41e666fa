"""The state after each of several packed sequences, by the interface of ``causal_conv1d``."""

from __future__ import annotations

from krait.torch import functional as krait_ops
from torch import Tensor

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` tokens of each packed sequence.

    x (T, D): all sequences one after the other; cu_seqlens (B + 1,) int32: where each begins, then
    T. Returns (B, D, state_len), with zeros on the left of sequences that are shorter.
    """
    return krait_ops.causal_conv1d_varlen_states(x, cu_seqlens, state_len)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """``causal_conv1d_varlen_states`` in plain PyTorch."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros((len(bounds) - 1, x.shape[1], state_len))
    for state, start, end in zip(states, bounds[:-1], bounds[1:]):
        count = min(end - start, state_len)
        state[:, state_len - count :] = x[end - count : end].T
    return states
