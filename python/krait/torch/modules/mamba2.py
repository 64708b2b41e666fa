"""The Mamba-2 block's mixer (Dao and Gu 2024, "Transformers are SSMs", section 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from .._operator import count_sequences
from ..functional import (
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    gated_silu,
    split_conv1d_scan,
    ssd,
    state_update,
)
from ._parameters import (
    Mixer,
    draw_dt_bias_,
    keep_window_,
    layer_state,
    require_hidden_states,
    state_dtype,
)
from .norm import GatedRMSNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    class _HubMixin:
        """What huggingface_hub adds, where it is installed."""

else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as _HubMixin
    except ImportError:

        class _HubMixin:
            """huggingface_hub is not installed: no push_to_hub."""


__all__ = ["Mamba2"]


class Mamba2(Mixer, _HubMixin):
    """in_proj -> causal convolution -> ssd -> gated RMSNorm -> out_proj.

    Args:
        d_model: channels of input and output.
        d_state: N, states of each channel.
        d_conv: K, width of the convolution over x, B and C.
        conv_init: initial weights of the convolution are uniform within +-conv_init; None: torch's.
        expand: inner channels for each of d_model.
        headdim: P, channels of a head; at most d_ssm.
        d_ssm: inner channels that go through the recurrence, the rest through a gated MLP; None:
            all.
        ngroups: groups of heads that share B and C.
        A_init_range: what -A is drawn from, uniformly.
        D_has_hdim: D for each channel, not for each head.
        rmsnorm: a gated RMSNorm after the recurrence, else z gates inside it.
        norm_before_gate: norm(y) silu(z) if true, else norm(y silu(z)).
        dt_min, dt_max, dt_init_floor: range of initial step sizes, log-uniform, and the smallest.
        dt_limit: what step sizes are clamped to.
        bias, conv_bias: whether the projections and the convolution have a bias.
        chunk_size: accepted for checkpoints' sake; the operator picks chunks that suit the shape.
        use_mem_eff_path: one operator from in_proj to out_proj, which keeps less for the backward
            pass.
        layer_idx: which state of ``InferenceParams`` is this layer's.
        process_group: heads are split over its ranks (tensor parallelism).
        sequence_parallel: with a process group, tokens are split over its ranks outside the
            projections.
    """

    no_weight_decay: tuple[str, ...] = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: Optional[float] = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: Optional[int] = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: Optional[int] = None,
        process_group: Optional[ProcessGroup] = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.world_size = 1 if process_group is None else process_group.size()
        self.local_rank = 0 if process_group is None else process_group.rank()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.expand = expand
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.dt_limit: tuple[float, float] = (dt_limit[0], dt_limit[1])
        self.activation = "silu"
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_idx = layer_idx
        self._dt_init = (dt_min, dt_max, dt_init_floor)
        self._A_init_range = tuple(A_init_range)

        self.d_inner = self._share("expand * d_model", int(expand * d_model))
        self.d_ssm = self.d_inner if d_ssm is None else self._share("d_ssm", d_ssm)
        self.ngroups = self._share("ngroups", ngroups)
        # A block narrower than the default head is one head: upstream's own example has 32
        # channels.
        self.headdim = self.d_ssm if 0 < self.d_ssm < headdim else headdim
        self._check_sizes()
        self.nheads = self.d_ssm // self.headdim
        self.d_mlp = self.d_inner - self.d_ssm
        conv_dim = self.d_ssm + 2 * self.ngroups * d_state
        d_in_proj = 2 * self.d_mlp + self.d_ssm + conv_dim + self.nheads

        made = {"device": device, "dtype": dtype}
        self.in_proj: nn.Linear
        self.out_proj: nn.Linear
        if process_group is None:
            self.in_proj = nn.Linear(d_model, d_in_proj, bias=bias, **made)
            self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        else:
            from ..distributed import ColumnParallelLinear, RowParallelLinear

            split = {"sequence_parallel": sequence_parallel, "bias": bias, **made}
            ranks = self.world_size
            self.in_proj = ColumnParallelLinear(d_model, d_in_proj * ranks, process_group, **split)
            self.out_proj = RowParallelLinear(self.d_inner * ranks, d_model, process_group, **split)
        self.conv1d = nn.Conv1d(
            conv_dim,
            conv_dim,
            kernel_size=d_conv,
            groups=conv_dim,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **made))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **made))
        self.D = nn.Parameter(
            torch.empty(
                self.d_ssm if D_has_hdim else self.nheads, device=device, dtype=torch.float32
            )
        )
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_ssm,
                eps=1e-5,
                norm_before_gate=norm_before_gate,
                group_size=self.d_ssm // self.ngroups,
                **made,
            )
        self.reset_parameters()
        self.mark_parameters()

    def _share(self, what: str, size: int) -> int:
        if size % self.world_size != 0:
            raise ValueError(
                f"[Mamba2] {what} is {size}, expected a multiple of the {self.world_size} ranks"
            )
        return size // self.world_size

    def _check_sizes(self) -> None:
        if self.headdim <= 0 or self.ngroups <= 0:
            raise ValueError(
                f"[Mamba2] headdim is {self.headdim}, ngroups {self.ngroups}, expected positive "
                "numbers"
            )
        if self.d_ssm > self.d_inner:
            raise ValueError(f"[Mamba2] d_ssm is {self.d_ssm}, expected at most {self.d_inner}")
        if self.d_ssm % self.headdim != 0:
            raise ValueError(
                f"[Mamba2] {self.d_ssm} channels are not a multiple of headdim {self.headdim}"
            )
        if self.d_ssm // self.headdim % self.ngroups != 0:
            raise ValueError(
                f"[Mamba2] {self.d_ssm // self.headdim} heads are not a multiple of ngroups "
                f"{self.ngroups}"
            )

    def reset_parameters(self) -> None:
        """Draws what is the block's own: dt_bias, A_log, D, and the convolution's weights with
        conv_init.
        """
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        draw_dt_bias_(self.dt_bias, *self._dt_init)
        with torch.no_grad():
            A = torch.empty(self.nheads, device=self.A_log.device, dtype=torch.float32)
            self.A_log.copy_(torch.log(A.uniform_(*self._A_init_range)))
            self.D.fill_(1.0)

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.to(state_dtype(None, self.A_log.dtype)))

    def _D(self) -> Tensor:
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def _conv_weight(self) -> Tensor:
        return self.conv1d.weight.squeeze(1)

    def _split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """z0, x0 (..., d_mlp), z (..., d_ssm), xBC (..., conv channels), dt (..., nheads)."""
        conv_dim = self.conv1d.weight.shape[0]
        return zxbcdt.split([self.d_mlp, self.d_mlp, self.d_ssm, conv_dim, self.nheads], dim=-1)

    def _split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., nheads, headdim), B and C (..., ngroups, d_state)."""
        states = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, states, states], dim=-1)
        return (
            x.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _join(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        """What out_proj reads, of the recurrence's output y (..., d_ssm)."""
        if self.rmsnorm:
            y = self.norm(y, z)
        return torch.cat((gated_silu(x0, z0), y), dim=-1) if self.d_mlp > 0 else y

    def forward(
        self,
        u: Tensor,
        seqlen: Optional[int] = None,
        seq_idx: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Mixes u (B, L, d_model) over time: (B, L, d_model).

        Args:
            u: with seqlen, (B * L, d_model), of which each rank holds its share with
                sequence_parallel.
            seqlen: L, where u has no dimension for it.
            seq_idx: (B, L), documents packed into rows, as in ``ssd``.
            cu_seqlens: (n + 1), bounds of documents packed into one row. Beside seq_idx it says
                only whose final states an inference state keeps.
            inference_params: states to start from and to leave: a new sequence where seqlen_offset
                is 0, else tokens that continue one.
        """
        if seqlen is None:
            require_hidden_states("Mamba2", u, self.d_model)
        zxbcdt = self.in_proj(u)
        if seqlen is not None:
            zxbcdt = zxbcdt.view(-1, seqlen, zxbcdt.shape[-1])
        batch, length, _ = zxbcdt.shape
        conv_state = ssm_state = None
        continues = False
        if inference_params is not None:
            rows = count_sequences(batch, cu_seqlens)
            conv_state, ssm_state = layer_state(self, inference_params, rows)
            continues = inference_params.seqlen_offset > 0
        if conv_state is not None and ssm_state is not None:
            if continues and length == 1 and seqlen is None:
                return self._step(zxbcdt.squeeze(1), conv_state, ssm_state).unsqueeze(1)
            y = self._mix_with_states(zxbcdt, seq_idx, cu_seqlens, conv_state, ssm_state, continues)
        elif self.use_mem_eff_path:
            y = self._mix_fused(zxbcdt, seq_idx, cu_seqlens)
        else:
            y = self._mix(zxbcdt, seq_idx, cu_seqlens)
        if seqlen is not None:
            y = y.flatten(0, 1)
        return self.out_proj(y)

    def _mix_fused(
        self, zxbcdt: Tensor, seq_idx: Optional[Tensor], cu_seqlens: Optional[Tensor]
    ) -> Tensor:
        return split_conv1d_scan(
            zxbcdt,
            self._conv_weight(),
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            self._D(),
            headdim=self.headdim,
            ngroups=self.ngroups,
            activation=self.activation,
            norm_weight=self.norm.weight if self.rmsnorm else None,
            norm_eps=self.norm.eps if self.rmsnorm else 0.0,
            norm_before_gate=self.norm_before_gate,
            dt_limit=self.dt_limit,
            seq_idx=seq_idx,
            cu_seqlens=None if seq_idx is not None else cu_seqlens,
        )

    def _mix(
        self,
        zxbcdt: Tensor,
        seq_idx: Optional[Tensor],
        cu_seqlens: Optional[Tensor],
        window: Optional[Tensor] = None,
        initial_states: Optional[Tensor] = None,
        ssm_state: Optional[Tensor] = None,
    ) -> Tensor:
        """From in_proj's output to out_proj's input, (B, L, d_inner); leaves the final states in
        ssm_state.
        """
        if seq_idx is not None:
            cu_seqlens = None
        z0, x0, z, xBC, dt = self._split(zxbcdt)
        xBC = causal_conv1d(
            xBC.transpose(1, 2),
            self._conv_weight(),
            self.conv1d.bias,
            activation=self.activation,
            initial_states=window,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        ).transpose(1, 2)
        x, B, C = self._split_conv(xBC)
        y = ssd(
            x,
            dt,
            self._A(),
            B,
            C,
            self._D(),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=ssm_state is not None,
        )
        if ssm_state is not None:
            y, final_states = y
            ssm_state.copy_(final_states.detach())
        return self._join(y.flatten(-2), z, z0, x0)

    def _mix_with_states(
        self,
        zxbcdt: Tensor,
        seq_idx: Optional[Tensor],
        cu_seqlens: Optional[Tensor],
        conv_state: Tensor,
        ssm_state: Tensor,
        continues: bool,
    ) -> Tensor:
        xBC = self._split(zxbcdt)[3].detach()
        window = states = None
        if continues:
            window = conv_state[..., conv_state.shape[-1] - self.d_conv + 1 :].clone()
            states = ssm_state.clone()
        if cu_seqlens is None:
            keep_window_(conv_state, xBC.transpose(1, 2), continues)
        elif continues:
            raise ValueError(
                "[Mamba2] cu_seqlens is given with seqlen_offset > 0, expected rows of one "
                "sequence each"
            )
        else:
            # Documents are the rows of the state that they leave.
            seq_idx = None
            conv_state.copy_(
                causal_conv1d_varlen_states(xBC.flatten(0, 1), cu_seqlens, conv_state.shape[-1])
            )
        return self._mix(zxbcdt, seq_idx, cu_seqlens, window, states, ssm_state)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token of each sequence, (B, 1, d_model), on states that are updated in place.

        Args:
            conv_state: (B, conv channels, d_conv), the latest inputs of the convolution.
            ssm_state: (B, nheads, headdim, d_state).

        Returns:
            out (B, 1, d_model), conv_state, ssm_state.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"[Mamba2] step takes one token at a time, found {hidden_states.shape[1]}"
            )
        out = self._step(self.in_proj(hidden_states.squeeze(1)), conv_state, ssm_state)
        return out.unsqueeze(1), conv_state, ssm_state

    def _step(self, zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """(B, in_proj's width) to (B, d_model)."""
        z0, x0, z, xBC, dt = self._split(zxbcdt)
        xBC = causal_conv1d_update(
            xBC, conv_state, self._conv_weight(), self.conv1d.bias, activation=self.activation
        )
        x, B, C = self._split_conv(xBC)
        y = state_update(
            ssm_state,
            x,
            dt,
            self._A(),
            B,
            C,
            self._D(),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return self.out_proj(self._join(y.flatten(-2), z, z0, x0))

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Zeroed conv_state (B, conv channels, d_conv) in dtype (the model's, if None) and
        ssm_state (B, H, P, N).

        The recurrent state is float32 for models of 16 bits too.
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(
            (batch_size, weight.shape[0], self.d_conv), dtype=dtype or weight.dtype
        )
        ssm_state = weight.new_zeros(
            (batch_size, self.nheads, self.headdim, self.d_state),
            dtype=state_dtype(dtype, weight.dtype),
        )
        return conv_state, ssm_state
