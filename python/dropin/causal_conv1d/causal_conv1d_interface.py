"""Depthwise causal convolution, by the interface of ``causal_conv1d.causal_conv1d_interface``.

Shapes: B sequences, D channels, L tokens, K taps, S >= K - 1 tokens of state.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from krait.torch import functional as krait_ops
from torch import Tensor

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]


def _activation(name: Optional[str]) -> Optional[str]:
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(
            f"[causal_conv1d] activation is {name!r}, expected None, 'silu' or 'swish'"
        )
    return None if name is None else "silu"


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Convolves each channel with the tokens before it; differentiable.

    x (B, D, L), any strides; weight (D, K); bias (D,); seq_idx (B, L) int32: tokens of other
    sequences count as zeros; initial_states (B, D, K - 1): the tokens before x; final_states_out: a
    tensor that the final states are written into. Returns out (B, D, L), and with
    return_final_states the last K - 1 tokens (B, D, K - 1) too.
    """
    wants_states = return_final_states or final_states_out is not None
    if final_states_out is not None:
        expected = (*x.shape[:-1], weight.shape[-1] - 1)
        if final_states_out.shape != expected:
            raise ValueError(
                f"[causal_conv1d] final_states_out has shape {tuple(final_states_out.shape)}, "
                f"expected {expected}: the last K - 1 inputs of each sequence"
            )
    result = krait_ops.causal_conv1d(
        x,
        weight,
        bias,
        activation=_activation(activation),
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=wants_states,
    )
    if not wants_states:
        return result
    out, final_states = result
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """``causal_conv1d_fn`` without seq_idx in plain PyTorch, computed in the weight's dtype."""
    activation = _activation(activation)
    taps = weight.shape[1]
    dtype = x.dtype
    if initial_states is None:
        padded = F.pad(x, (taps - 1, 0))
    else:
        padded = torch.cat([initial_states.to(dtype), x], dim=-1)
    out = F.conv1d(padded.to(weight.dtype), weight.unsqueeze(1), bias, groups=weight.shape[0])
    out = out if activation is None else F.silu(out)
    out = out.to(dtype)
    if not return_final_states:
        return out
    final_states = padded[..., padded.shape[-1] - (taps - 1) :]
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """Convolves new tokens x (B, D) or (B, D, T) with those that conv_state (B, D, S) remembers.

    conv_state is shifted left and gets the new tokens; with cache_seqlens (B,) int32, the tokens
    that each sequence has seen, it is a ring written at cache_seqlens % S. conv_state_indices (B,)
    int32 says which row of conv_state (then any number of rows) serves which sequence; a negative
    one is padding: out is 0 there and no state changes. Returns out of x's shape.
    """
    return krait_ops.causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        activation=_activation(activation),
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """``causal_conv1d_update`` without conv_state_indices in plain PyTorch."""
    activation = _activation(activation)
    dtype = x.dtype
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    taps, size, count = weight.shape[1], conv_state.shape[-1], tokens.shape[-1]
    if cache_seqlens is None:
        seen = torch.cat([conv_state.to(weight.dtype), tokens.to(weight.dtype)], dim=-1)
        conv_state.copy_(seen[..., seen.shape[-1] - size :])
    else:
        start = cache_seqlens.long().unsqueeze(-1)

        def slots(first: int, number: int) -> Tensor:
            places = torch.arange(first, first + number, device=x.device)
            places = torch.remainder(start + places, size)
            return places.unsqueeze(1).expand(-1, conv_state.shape[1], -1)

        before = conv_state.gather(-1, slots(1 - taps, taps - 1))
        seen = torch.cat([before.to(weight.dtype), tokens.to(weight.dtype)], dim=-1)
        # Of more tokens than there are slots only the last ones stay.
        kept = min(count, size)
        conv_state.scatter_(
            -1, slots(count - kept, kept), tokens[..., count - kept :].to(conv_state.dtype)
        )
    window = seen[..., seen.shape[-1] - count - (taps - 1) :]
    out = F.conv1d(window, weight.unsqueeze(1), bias, groups=weight.shape[0])
    out = out if activation is None else F.silu(out)
    out = out.to(dtype)
    return out.squeeze(-1) if x.dim() == 2 else out
