"""What mixers have in common: draws and marks of parameters, checks of inputs, states."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn


def require_hidden_states(module: str, x: Tensor, channels: int) -> None:
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(
            f"[{module}] the input has shape {tuple(x.shape)}, expected (B, L, {channels})"
        )


class Mixer(nn.Module):
    """A module whose parameters named in `no_weight_decay` carry the mark ``_no_weight_decay``."""

    no_weight_decay: tuple[str, ...] = ()
    # Biases that an initialiser of a whole model leaves as they are, marked ``_no_reinit``.
    no_reinit: tuple[str, ...] = ()

    def mark_parameters(self) -> None:
        for attribute, names in (
            ("_no_weight_decay", self.no_weight_decay),
            ("_no_reinit", self.no_reinit),
        ):
            for name in names:
                path, _, leaf = name.rpartition(".")
                parameter = getattr(self.get_submodule(path), leaf, None)
                if parameter is not None:
                    setattr(parameter, attribute, True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled parameters have lost what was written on them.
        super().__setstate__(state)
        self.mark_parameters()


def draw_dt_bias_(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """softplus^-1 of step sizes drawn log-uniformly from [dt_min, dt_max], at least floor."""
    with torch.no_grad():
        u = torch.rand(bias.shape, device=bias.device, dtype=torch.float32)
        dt = torch.exp(u * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(
            min=floor
        )
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def layer_state(
    mixer: Any, inference_params: Any, batch_size: int, initialize_states: bool = False
) -> tuple[Tensor, Tensor]:
    """The state of `mixer` in inference_params, made where it is not there yet.

    Raises:
        ValueError: for a mixer without layer_idx, which tells layers apart.
    """
    if mixer.layer_idx is None:
        raise ValueError(
            f"[{type(mixer).__name__}] layer_idx is None, expected the layer's number with "
            "inference_params"
        )
    states = inference_params.key_value_memory_dict
    if mixer.layer_idx not in states:
        states[mixer.layer_idx] = mixer.allocate_inference_cache(
            batch_size, inference_params.max_seqlen
        )
    elif initialize_states:
        for state in states[mixer.layer_idx]:
            state.zero_()
    conv_state, ssm_state = states[mixer.layer_idx]
    if conv_state.shape[0] < batch_size:
        raise ValueError(
            f"[{type(mixer).__name__}] {batch_size} sequences, but the inference cache was made "
            f"for {conv_state.shape[0]}"
        )
    return conv_state[:batch_size], ssm_state[:batch_size]


def keep_window_(conv_state: Tensor, x: Tensor, continues: bool) -> None:
    """Keeps in conv_state (B, D, S) the last S inputs of x (B, D, L), after those it has where x
    continues them.
    """
    S, L = conv_state.shape[-1], x.shape[-1]
    if L >= S:
        conv_state.copy_(x[..., L - S :])
    elif continues:
        conv_state.copy_(torch.cat((conv_state[..., L:], x.to(conv_state.dtype)), dim=-1))
    else:
        conv_state[..., : S - L].zero_()
        conv_state[..., S - L :].copy_(x)


def state_dtype(dtype: Optional[torch.dtype], default: torch.dtype) -> torch.dtype:
    """Of recurrent states: float32, which sums many small terms, unless float64 is asked for."""
    return torch.float64 if (dtype or default) is torch.float64 else torch.float32
