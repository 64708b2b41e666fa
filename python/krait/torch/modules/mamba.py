"""The Mamba block's mixer (Gu and Dao 2023, "Mamba", section 3.4)."""

from __future__ import annotations

import math
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import causal_conv1d, causal_conv1d_update, selective_scan, state_update
from ._parameters import (
    Mixer,
    draw_dt_bias_,
    keep_window_,
    layer_state,
    require_hidden_states,
    state_dtype,
)

__all__ = ["Mamba"]


class Mamba(Mixer):
    """in_proj -> causal convolution -> selective scan, gated -> out_proj.

    Args:
        d_model: channels of input and output.
        d_state: N, states of each channel.
        d_conv: K, width of the convolution.
        expand: inner channels for each of d_model.
        dt_rank: rank of the step sizes' projection; "auto": d_model / 16, rounded up.
        dt_min, dt_max: range that initial step sizes are drawn from, log-uniformly.
        dt_init: "random" (uniform) or "constant" weights of dt_proj.
        dt_scale: factor of those weights.
        dt_init_floor: the smallest initial step size.
        conv_bias, bias: whether the convolution and the projections have a bias.
        use_fast_path: accepted for compatibility; there is one path.
        layer_idx: which state of ``InferenceParams`` is this layer's.
    """

    no_weight_decay = ("A_log", "D")
    no_reinit = ("dt_proj.bias",)

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: Union[int, str] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: Optional[int] = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"[Mamba] dt_init is {dt_init!r}, expected 'random' or 'constant'")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"[Mamba] dt_rank is {dt_rank!r}, expected 'auto' or a number")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        self._dt_init = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

        made = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            kernel_size=d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **made)
        # In float32 whatever the model's dtype: both are read by the scan alone.
        self.A_log = nn.Parameter(
            torch.empty((self.d_inner, d_state), device=device, dtype=torch.float32)
        )
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=torch.float32))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        self.reset_parameters()
        self.mark_parameters()

    def reset_parameters(self) -> None:
        """Draws what is the block's own: dt_proj, A_log, D. Linear and convolution layers have
        draws of their own.
        """
        dt_min, dt_max, dt_init, dt_scale, floor = self._dt_init
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        draw_dt_bias_(self.dt_proj.bias, dt_min, dt_max, floor)
        with torch.no_grad():
            states = torch.arange(
                1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32
            )
            self.A_log.copy_(torch.log(states).expand_as(self.A_log))
            self.D.fill_(1.0)

    def _step_sizes(self, low_rank: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """delta (..., d_inner) before softplus, and what is still to be added to it.

        The bias stays apart, in its own precision, unless dt_proj has become another kind of layer
        (an adapter, a quantised or sharded one) or something watches its calls (hooks; accelerate
        replaces its forward), when it is called as it is.
        """
        layer = self.dt_proj
        watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        if type(layer) is nn.Linear and not watched:
            return F.linear(low_rank, layer.weight), layer.bias
        return layer(low_rank), None

    def _conv_weight(self) -> Tensor:
        return self.conv1d.weight.squeeze(1)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
    ) -> Tensor:
        """Mixes hidden_states (B, L, d_model) over time: (B, L, d_model).

        Args:
            inference_params: states to start from and to leave: a new sequence where seqlen_offset
                is 0, else tokens that continue one.
            seq_idx: (B, L), documents packed into rows, as in ``selective_scan``.
            cu_seqlens: (n + 1), bounds of documents packed into one row.
        """
        require_hidden_states("Mamba", hidden_states, self.d_model)
        batch, length, _ = hidden_states.shape
        conv_state = ssm_state = None
        continues = False
        if inference_params is not None:
            conv_state, ssm_state = layer_state(self, inference_params, batch)
            continues = inference_params.seqlen_offset > 0
            if continues and length == 1:
                return self.step(hidden_states, conv_state, ssm_state)[0]

        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)  # (B, d_inner, L)
        window = None
        if conv_state is not None:
            if continues:
                window = conv_state[..., conv_state.shape[-1] - self.d_conv + 1 :].clone()
            keep_window_(conv_state, x.detach(), continues)
        x = causal_conv1d(
            x,
            self._conv_weight(),
            self.conv1d.bias,
            activation=self.activation,
            initial_states=window,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
        low_rank, B, C = self.x_proj(x.transpose(1, 2)).split(
            [self.dt_rank, self.d_state, self.d_state], dim=-1
        )
        delta, delta_bias = self._step_sizes(low_rank)
        y = selective_scan(
            x,
            delta.transpose(1, 2),
            -torch.exp(self.A_log.to(state_dtype(None, self.A_log.dtype))),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z,
            delta_bias,
            delta_softplus=True,
            initial_state=ssm_state if continues else None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_last_state=ssm_state is not None,
        )
        if ssm_state is not None:
            y, last_state = y
            ssm_state.copy_(last_state.detach())
        return self.out_proj(y.transpose(1, 2))

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token of each sequence, (B, 1, d_model), on states that are updated in place.

        Args:
            conv_state: (B, d_inner, d_conv), the latest inputs of the convolution.
            ssm_state: (B, d_inner, d_state).

        Returns:
            out (B, 1, d_model), conv_state, ssm_state.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"[Mamba] step takes one token at a time, found {hidden_states.shape[1]}"
            )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(
            x, conv_state, self._conv_weight(), self.conv1d.bias, activation=self.activation
        )
        low_rank, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, dt_bias = self._step_sizes(low_rank)
        A = -torch.exp(self.A_log.to(state_dtype(None, self.A_log.dtype)))
        y = state_update(ssm_state, x, dt, A, B, C, self.D, z, dt_bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Zeroed conv_state (B, d_inner, d_conv) in dtype (the model's, if None) and ssm_state (B,
        d_inner, d_state).

        The recurrent state is float32 for models of 16 bits too.
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(
            (batch_size, self.d_inner, self.d_conv), dtype=dtype or weight.dtype
        )
        ssm_state = weight.new_zeros(
            (batch_size, self.d_inner, self.d_state), dtype=state_dtype(dtype, weight.dtype)
        )
        return conv_state, ssm_state
