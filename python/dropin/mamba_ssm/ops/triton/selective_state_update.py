"""One token of the scan of Mamba or Mamba-2 on a state that changes in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from krait.torch import functional as krait_ops

__all__ = ["selective_state_update", "selective_state_update_ref"]


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
):
    """state <- exp(dt A) state + dt B x; returns (C state + D x) * silu(z).

    state (B, D, N) or (B, H, P, N); x, dt, z (B, D) or (B, H, P); A (D, N) or (H, P, N); B, C (B,
    N) or (B, G, N); D, dt_bias (D,) or (H, P). dt_bias is added to dt before the softplus.
    state_batch_indices (B,) int32 says which row of state (then any number of rows) serves which
    sequence; a negative one is padding: the output is 0 there and no state changes.
    """
    return krait_ops.state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus=dt_softplus,
        state_batch_indices=state_batch_indices,
    )


def selective_state_update_ref(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """``selective_state_update`` without state_batch_indices in plain PyTorch."""
    has_heads = state.dim() == 4
    wide = torch.promote_types(x.dtype, torch.float32)

    def headed(tensor, dims: int):
        """With a dimension of one head where there are none."""
        if tensor is None:
            return None
        tensor = tensor.to(torch.promote_types(tensor.dtype, wide))
        return tensor if has_heads else tensor.unsqueeze(dims)

    u, step, gate = headed(x, 1), headed(dt, 1), headed(z, 1)
    decay, skip, bias = headed(A, 0), headed(D, 0), headed(dt_bias, 0)
    B_, C_ = (m.unsqueeze(1) if m.dim() == 2 else m for m in (B.to(wide), C.to(wide)))
    per_group = u.shape[1] // B_.shape[1]
    if bias is not None:
        step = step + bias
    if dt_softplus:
        step = F.softplus(step)
    if per_group == 0:
        # Without heads a group is a range of channels.
        B_, C_ = (m.repeat_interleave(u.shape[2] // m.shape[1], dim=1)[:, None] for m in (B_, C_))
    else:
        B_, C_ = (m.repeat_interleave(per_group, dim=1).unsqueeze(2) for m in (B_, C_))
    drive = (step * u).unsqueeze(-1) * B_
    before = state.to(wide) if has_heads else state.to(wide).unsqueeze(1)
    after = before * torch.exp(step.unsqueeze(-1) * decay) + drive
    out = (after * C_).sum(dim=-1)
    if skip is not None:
        out = out + u * skip
    if gate is not None:
        out = out * F.silu(gate)
    state.copy_(after if has_heads else after.squeeze(1))
    return (out if has_heads else out.squeeze(1)).to(x.dtype)
