"""Multi-head attention as hybrid models use it."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import causal_conv1d, causal_conv1d_update, gated_silu
from ._parameters import keep_window_, require_hidden_states

__all__ = ["MHA"]


def _rotate(x: Tensor, positions: Tensor, dim: int, base: float, interleaved: bool) -> Tensor:
    """Turns the first `dim` channels of x (B, L, H, head_dim) by positions (B or 1, L) base^(-2i /
    dim).

    Su et al. 2021, "RoFormer". Angles are float64: large positions lose nothing.
    """
    frequencies = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
    angles = (positions.to(torch.float64).unsqueeze(-1) * frequencies).unsqueeze(2)
    wide = x.dtype if x.dtype is torch.float64 else torch.float32
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)  # (B or 1, L, 1, dim / 2)
    turned, rest = x.split([dim, x.shape[-1] - dim], dim=-1)
    turned = turned.to(wide)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class MHA(nn.Module):
    """Attention with grouped queries, an optional causal convolution over q, k and v, rotary
    embedding, and an optional gated MLP beside the attention.

    Args:
        embed_dim: channels of input and output.
        num_heads: of queries.
        num_heads_kv: of keys and values, a divisor of num_heads; None: num_heads.
        head_dim: channels of a head; None: embed_dim / num_heads.
        mlp_dim: width of the MLP, up and gate together, rounded up to a multiple of 256; 0: none.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        softmax_scale: of the scores; None: head_dim^-0.5.
        causal: each token sees those up to itself alone.
        layer_idx: which state of ``InferenceParams`` is this layer's.
        d_conv: width of the convolution; 0: none.
        rotary_emb_dim: channels of each head that turn with the position; 0: none.
        rotary_emb_base: of the angles.
        rotary_emb_interleaved: pairs (2i, 2i + 1), not (i, i + rotary_emb_dim / 2).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: Optional[int] = None,
        head_dim: Optional[int] = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        layer_idx: Optional[int] = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if num_heads <= 0:
            raise ValueError(f"[MHA] num_heads is {num_heads}, expected a positive number")
        if head_dim is None:
            if embed_dim % num_heads != 0:
                raise ValueError(
                    f"[MHA] embed_dim {embed_dim} is not a multiple of num_heads {num_heads}"
                )
            head_dim = embed_dim // num_heads
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = head_dim
        self.mlp_dim = (mlp_dim + 255) // 256 * 256
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        if self.num_heads_kv <= 0 or num_heads % self.num_heads_kv != 0:
            raise ValueError(
                f"[MHA] num_heads {num_heads} is not a multiple of num_heads_kv {self.num_heads_kv}"
            )
        if not 0 <= rotary_emb_dim <= head_dim or rotary_emb_dim % 2 != 0:
            raise ValueError(
                f"[MHA] rotary_emb_dim is {rotary_emb_dim}, expected an even number up to head_dim "
                f"{head_dim}"
            )

        made = {"device": device, "dtype": dtype}
        self.qkv_dim = head_dim * (num_heads + 2 * self.num_heads_kv)
        self.in_proj = nn.Linear(embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **made)
        if d_conv > 0:
            self.conv1d = nn.Conv1d(
                self.qkv_dim,
                self.qkv_dim,
                kernel_size=d_conv,
                padding=d_conv - 1,
                groups=self.qkv_dim,
                **made,
            )
        self.out_proj = nn.Linear(
            head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **made
        )

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """kv_cache (B, max_seqlen, 2, num_heads_kv, head_dim) and conv_state (B, conv channels,
        d_conv), or None without a convolution; in dtype, the model's if None.
        """
        # A projection that was replaced, by an adapter or a quantised one, may have no weight.
        parameters = list(self.parameters())
        floating = [p.dtype for p in parameters if p.is_floating_point()]
        made: dict[str, Any] = {
            "device": parameters[0].device if parameters else None,
            "dtype": dtype or (floating[0] if floating else None),
        }
        kv_cache = torch.empty(
            (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim), **made
        )
        conv_state = None
        if self.d_conv > 0:
            conv_state = torch.zeros((batch_size, self.qkv_dim, self.d_conv), **made)
        return kv_cache, conv_state

    def _state(self, inference_params: Any, batch: int) -> tuple[Tensor, Optional[Tensor]]:
        if self.layer_idx is None:
            raise ValueError(
                "[MHA] layer_idx is None, expected the layer's number with inference_params"
            )
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen
            )
        kv_cache, conv_state = states[self.layer_idx]
        rows = slice(inference_params.batch_size_offset, inference_params.batch_size_offset + batch)
        if rows.stop > kv_cache.shape[0]:
            raise ValueError(
                f"[MHA] {rows.stop} sequences, but the inference cache was made for "
                f"{kv_cache.shape[0]}"
            )
        return kv_cache[rows], None if conv_state is None else conv_state[rows]

    def _convolve(
        self,
        qkv: Tensor,
        conv_state: Optional[Tensor],
        offset: int,
        seq_idx: Optional[Tensor],
        cu_seqlens: Optional[Tensor],
    ) -> Tensor:
        """The convolution over (B, L, qkv_dim). Its state holds its inputs, so that a step equals a
        forward.
        """
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        window = None
        if conv_state is not None:
            if offset > 0 and qkv.shape[1] == 1:
                return causal_conv1d_update(qkv.squeeze(1), conv_state, weight, bias).unsqueeze(1)
            if offset > 0:
                window = conv_state[..., 1:].clone()
            keep_window_(conv_state, qkv.detach().transpose(1, 2), offset > 0)
        return causal_conv1d(
            qkv.transpose(1, 2),
            weight,
            bias,
            initial_states=window,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        ).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
    ) -> Tensor:
        """Attends over x (B, L, embed_dim): (B, L, embed_dim).

        Args:
            inference_params: keys and values so far, which those of x are appended to at
                seqlen_offset (or at lengths_per_sample, for one token of each sequence).
            seq_idx: (B, L), documents packed into rows, which do not see one another; at -1 the
                output is that of a token that sees nothing.
            cu_seqlens: (n + 1), bounds of documents packed into one row.
        """
        require_hidden_states("MHA", x, self.embed_dim)
        batch, length, _ = x.shape
        kv_cache = conv_state = lengths = None
        offset = 0
        if inference_params is not None:
            kv_cache, conv_state = self._state(inference_params, batch)
            offset = inference_params.seqlen_offset
            if offset > 0 and length == 1:
                lengths = inference_params.lengths_per_sample
            if lengths is None and offset + length > kv_cache.shape[1]:
                raise ValueError(
                    f"[MHA] {offset + length} tokens, but the inference cache was made for "
                    f"{kv_cache.shape[1]}"
                )
        if cu_seqlens is not None and seq_idx is None:
            tokens = torch.arange(length, device=x.device)
            seq_idx = torch.bucketize(tokens, cu_seqlens[1:].to(x.device), right=True).unsqueeze(0)

        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            qkv = self._convolve(qkv, conv_state, offset, seq_idx, None)
        heads, heads_kv = self.num_heads, self.num_heads_kv
        q, k, v = qkv.unflatten(-1, (heads + 2 * heads_kv, self.head_dim)).split(
            [heads, heads_kv, heads_kv], dim=2
        )
        if self.rotary_emb_dim > 0:
            if lengths is None:
                positions = torch.arange(offset, offset + length, device=x.device).unsqueeze(0)
            else:
                positions = lengths[:batch].unsqueeze(1)
            turn = (self.rotary_emb_dim, self.rotary_emb_base, self.rotary_emb_interleaved)
            q, k = _rotate(q, positions, *turn), _rotate(k, positions, *turn)
        mask = None
        if kv_cache is not None:
            k, v, mask = self._append(kv_cache, k, v, offset, lengths)
        if seq_idx is not None:
            mask = (seq_idx.unsqueeze(2) == seq_idx.unsqueeze(1)) & (seq_idx >= 0).unsqueeze(1)
            mask = mask.unsqueeze(1)
        context = self._attend(q, k, v, mask).flatten(2)
        if seq_idx is not None:
            context = context.masked_fill((seq_idx < 0).unsqueeze(-1), 0.0)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            context = torch.cat((context, gated_silu(up, gate)), dim=-1)
        return self.out_proj(context)

    def _append(
        self, kv_cache: Tensor, k: Tensor, v: Tensor, offset: int, lengths: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Writes k and v (B, L, Hkv, head_dim) into the cache; returns all keys and values, and who
        sees them.
        """
        batch, length = k.shape[:2]
        kv = torch.stack((k, v), dim=2).to(kv_cache.dtype)
        if lengths is not None:
            # Positions are on the device, and each sequence has its own: nothing here depends on
            # their values.
            rows = torch.arange(batch, device=k.device)
            kv_cache[rows, lengths[:batch].long()] = kv[:, 0].detach()
            seen = torch.arange(kv_cache.shape[1], device=k.device) <= lengths[:batch].unsqueeze(1)
            # What was never written may hold anything, NaN too, and is multiplied by 0.
            cache = kv_cache.masked_fill(~seen[:, :, None, None, None], 0.0).to(k.dtype)
            return cache[:, :, 0], cache[:, :, 1], seen[:, None, None]
        kv_cache[:, offset : offset + length] = kv.detach()
        if offset == 0:
            return k, v, None
        cache = kv_cache[:, : offset + length].to(k.dtype)
        mask = None
        if self.causal and length > 1:
            queries = torch.arange(offset, offset + length, device=k.device)
            keys = torch.arange(offset + length, device=k.device)
            mask = (keys <= queries.unsqueeze(1))[None, None]
        return cache[:, :, 0], cache[:, :, 1], mask

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        """q (B, Lq, H, head_dim), k and v (B, Lk, Hkv, head_dim) to (B, Lq, H, head_dim)."""
        causal = self.causal and q.shape[1] == k.shape[1] and q.shape[1] > 1
        if mask is not None and causal:
            mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.num_heads_kv != self.num_heads:
            repeats = self.num_heads // self.num_heads_kv
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if mask is not None and mask.shape[-1] == q.shape[-2]:
            # A token that sees nothing attends to itself: no NaN, here or in a gradient.
            mask = mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=self.softmax_scale
        )
        return out.transpose(1, 2)
