"""One step of the recurrence of `selective_scan` and `ssd`, in place, for decoding."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .._operator import define, examine, native, on_host, sum_dtype, written


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    state_batch_indices: Optional[Tensor],
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
) -> Tensor:
    inputs = (x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    if x.is_cuda and sum_dtype((state, *inputs)) is torch.float64:
        on_cpu = state.cpu()
        out = on_host(_update, on_cpu, *inputs, dt_softplus, dt_low, dt_high)
        state.copy_(on_cpu)
        return out
    out = torch.empty_like(x)
    native("state_update")(state, *inputs, dt_softplus, dt_low, dt_high, out)
    return out


define(
    "state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus, float dt_low, "
    "float dt_high) -> Tensor",
    _update,
    lambda state, x, *_: torch.empty_like(x),
)


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state_batch_indices: Optional[Tensor] = None,
) -> Tensor:
    """One step (or T) of the recurrence of `selective_scan` and `ssd`, on top of a state that is
    updated in place::

        d = clamp(softplus?(dt + dt_bias), dt_limit)
        S = exp(d A) S + d B x
        out = (S C + D x) silu(z)

    For decoding: the result carries no gradient.

    Args:
        state: (R, H, P, N) or (R, D, N), float32 (or bfloat16, float16 as storage); R = B without
            state_batch_indices.
        x: (B, H, P) or (B, D); with T tokens (B, T, H, P) or (B, T, D).
        dt: like x, or (B, H) / (B, T, H) with a state of heads.
        A: (D, N), (H) or (H, P, N).
        B: (B, N) or (B, G, N); with T tokens (B, T, N) or (B, T, G, N).
        C: like B.
        D: (H), (H, P) or (D).
        z: like x, gate.
        dt_bias: (H), (H, P) or (D).
        dt_softplus: whether softplus is applied to dt + dt_bias.
        dt_limit: what step sizes are clamped to, after softplus, as in `ssd`.
        state_batch_indices: (B) int32 or int64, all distinct: the row of state of each entry; a
            negative one is a padding slot: output 0, state untouched.

    Returns:
        out, of x's shape and dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    low, high = dt_limit
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    if examine(tensors):
        out = _update(*tensors, dt_softplus, low, high)
        written(state)
        return out
    with torch.no_grad():
        return torch.ops.krait.state_update(*tensors, dt_softplus, low, high)
