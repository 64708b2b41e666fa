"""The operators below ``causal_conv1d_fn``: no autograd, destinations given by the caller."""

from __future__ import annotations

import torch

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = [
    "causal_conv1d_bwd_function",
    "causal_conv1d_fwd_function",
    "causal_conv1d_update_function",
]


def causal_conv1d_fwd_function(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    final_states_out: torch.Tensor | None,
    silu_activation: bool,
) -> torch.Tensor:
    """out (B, D, L) of ``causal_conv1d_fn``; final states go to final_states_out (B, D, K - 1)."""
    with torch.no_grad():
        return causal_conv1d_fn(
            x,
            weight,
            bias,
            seq_idx=seq_idx,
            initial_states=initial_states,
            final_states_out=final_states_out,
            activation="silu" if silu_activation else None,
        )


def causal_conv1d_bwd_function(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dout: torch.Tensor,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    dfinal_states: torch.Tensor | None,
    dx: torch.Tensor | None,
    return_dinitial_states: torch.Tensor,
    silu_activation: bool,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients (dx, dweight, dbias, dinitial_states) for dout (B, D, L), None where there is
    no input.

    dfinal_states (B, D, K - 1) adds the gradient of the final states; dx, where given, is written
    into. dinitial_states is formed where return_dinitial_states is true.
    """
    with torch.enable_grad():
        x_, weight_ = x.detach().requires_grad_(), weight.detach().requires_grad_()
        bias_ = None if bias is None else bias.detach().requires_grad_()
        initial_ = None if initial_states is None else initial_states.detach()
        if initial_ is not None and return_dinitial_states:
            initial_.requires_grad_()
        result = causal_conv1d_fn(
            x_,
            weight_,
            bias_,
            seq_idx=seq_idx,
            initial_states=initial_,
            return_final_states=dfinal_states is not None,
            activation="silu" if silu_activation else None,
        )
    inputs = [x_, weight_, bias_, initial_]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    if dfinal_states is None:
        gradients = iter(torch.autograd.grad(result, wanted, dout))
    else:
        gradients = iter(torch.autograd.grad(result, wanted, (dout, dfinal_states)))
    found = [
        next(gradients) if tensor is not None and tensor.requires_grad else None
        for tensor in inputs
    ]
    if dx is not None:
        found[0] = dx.copy_(found[0])
    return tuple(found)


def causal_conv1d_update_function(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu_activation: bool,
    cache_seqlens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> torch.Tensor:
    """out of ``causal_conv1d_update``; conv_state changes in place."""
    with torch.no_grad():
        return causal_conv1d_update(
            x,
            conv_state,
            weight,
            bias,
            activation="silu" if silu_activation else None,
            cache_seqlens=cache_seqlens,
            conv_state_indices=conv_state_indices,
        )
