"""Mamba-2's state-space duality as a differentiable PyTorch operator (Dao and Gu 2024,
"Transformers are SSMs").
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import Function

from .._operator import (
    GRAD,
    check_offsets,
    count_sequences,
    define,
    define_backward,
    examine,
    like,
    native,
    on_host,
    shape_of,
    sum_dtype,
)

_ADDED_TO = frozenset((2, 5, 7))  # A, D and dt_bias: sums, which the library adds to


def _check(x: Tensor, B: Tensor, cu_seqlens: Optional[Tensor]) -> None:
    """What outputs take their shapes from; the library checks the rest."""
    if x.dim() != 4:
        raise ValueError(f"[ssd] x has shape {shape_of(x)}, expected (B, L, H, P)")
    if B.dim() != 4:
        raise ValueError(f"[ssd] B has shape {shape_of(B)}, expected (B, L, G, N)")
    if cu_seqlens is not None:
        check_offsets("ssd", cu_seqlens)


def _empty_outputs(
    x: Tensor,
    B: Tensor,
    cu_seqlens: Optional[Tensor],
    sums: torch.dtype,
    want_final_states: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not want_final_states:
        return out, None
    rows = count_sequences(x.shape[0], cu_seqlens)
    return out, x.new_empty((rows, x.shape[2], x.shape[3], B.shape[3]), dtype=sums)


def _forward(
    inputs: tuple[Any, ...], options: tuple[Any, ...], want_final_states: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """`inputs` are x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens; `options`
    dt_softplus, the limits of dt, reverse and chunk_size.
    """
    x, B, cu_seqlens = inputs[0], inputs[3], inputs[10]
    sums = torch.float64 if x.dtype is torch.float64 else torch.float32
    if sums is torch.float64 and x.is_cuda:
        return on_host(lambda *copies: _forward(copies, options, want_final_states), *inputs)
    if want_final_states:
        _check(x, B, cu_seqlens)
    out, final_states = _empty_outputs(x, B, cu_seqlens, sums, want_final_states)
    native("ssd")(*inputs, None, *options, out, final_states, None)
    return out, final_states


def _backward(
    wanted: list[bool],
    dout: Optional[Tensor],
    dfinal_states: Optional[Tensor],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    initial_states: Optional[Tensor],
    seq_idx: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor]:
    """Gradients of those of (x, dt, A, B, C, D, z, dt_bias, initial_states) that are wanted, in
    this order.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    options = (dt_softplus, dt_low, dt_high, reverse, chunk_size)
    sums = sum_dtype((x,))
    if sums is torch.float64 and x.is_cuda:
        return on_host(
            _backward, wanted, dout, dfinal_states, *inputs, seq_idx, cu_seqlens, *options
        )
    if dout is None:
        dout = torch.zeros_like(x)
    grads: list[Optional[Tensor]] = []
    for i, (want, t) in enumerate(zip(wanted, inputs)):
        if not want or t is None:
            grads.append(None)
        elif i in _ADDED_TO:
            grads.append(torch.zeros_like(t, dtype=sums))
        else:
            grads.append(torch.empty_like(t))
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states = grads
    native("ssd_backward")(
        *inputs, seq_idx, cu_seqlens, *options, dout, dfinal_states,
        dx, ddt, dB, dC, dz, dinitial_states, dA, dD, ddt_bias,
    )  # fmt: skip
    return [like(g, t) for g, t in zip(grads, inputs) if g is not None and t is not None]


def _op(*args: Any) -> tuple[Tensor, Tensor]:
    out, final_states = _forward(args[:11], args[11:16], args[16])
    return out, out.new_empty(0) if final_states is None else final_states


def _op_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, B, cu_seqlens = args[0], args[3], args[10]
    _check(x, B, cu_seqlens)
    out, final_states = _empty_outputs(x, B, cu_seqlens, sum_dtype((x,)), args[16])
    return out, out.new_empty(0) if final_states is None else final_states


def _op_backward_fake(wanted: list[bool], *args: Any) -> list[Tensor]:
    inputs = args[2:11]
    return [torch.empty_like(t) for want, t in zip(wanted, inputs) if want and t is not None]


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_low, "
    "float dt_high, bool reverse, SymInt chunk_size"
)
define(f"ssd({_INPUTS}, bool want_final_states) -> (Tensor, Tensor)", _op, _op_fake)
define_backward(
    f"ssd_backward(bool[] wanted, Tensor? dout, Tensor? dfinal_states, {_INPUTS}) -> Tensor[]",
    _backward,
    _op_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:16]


def _gradients(
    ctx: Any, dout: Optional[Tensor], dfinal_states: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    if dout is None and dfinal_states is None:
        return (None,) * 17
    inputs = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:9])
    eager = not torch.is_grad_enabled() and examine((*inputs, dout, dfinal_states))
    compute: Any = _backward if eager else torch.ops.krait.ssd_backward
    grads = iter(compute(wanted, dout, dfinal_states, *inputs, *ctx.options))
    return (*(next(grads) if want else None for want in wanted), *(None,) * 8)


torch.library.register_autograd("krait::ssd", _gradients, setup_context=_save)


class _Ssd(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Optional[Tensor]]:
        _save(ctx, args)
        return _forward(args[:11], args[11:16], args[16])

    backward = staticmethod(_gradients)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    *,
    initial_states: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    chunk_size: int = 0,
    reverse: bool = False,
    return_final_states: bool = False,
) -> Any:
    """Mamba-2's recurrence in its chunked form (Dao and Gu 2024, "Transformers are SSMs", sections
    6 and 7)::

        d_t = clamp(softplus?(dt_t + dt_bias), dt_limit)
        S_t = exp(d_t A_h) S_{t-1} + d_t x_t B_t^T      (headdim x d_state for each head)
        y_t = S_t C_t + D x_t
        out_t = y_t silu(z_t)                           (where z is given)

    Differentiable once in every floating input; `final_states` carry gradients too. Sums and states
    are float32, float64 where x is (on the reference path).

    Args:
        x: (B, L, H, P), any strides; float32, bfloat16, float16 or float64, as are all inputs.
        dt: (B, L, H), step sizes.
        A: (H), negative.
        B: (B, L, G, N); head h uses group h // (H / G).
        C: (B, L, G, N).
        D: (H) or (H, P), weight of x in the output.
        z: (B, L, H, P), gate.
        dt_bias: (H), added to dt.
        initial_states: (B, H, P, N); (n, H, P, N) with cu_seqlens.
        seq_idx: (B, L) int32 or int64: the state restarts from 0 where it changes; at -1 the output
            is 0 and the state stays as it is.
        cu_seqlens: (n + 1) int32 or int64: bounds of sequences packed into one row (B = 1).
        dt_softplus: whether softplus is applied to dt + dt_bias.
        dt_limit: what step sizes are clamped to, after softplus.
        chunk_size: tokens worked on at a time, 0 for a size that suits the shape; it changes
            rounding only.
        reverse: time runs from the end of each sequence to its start.
        return_final_states: also return the states after the last token, (B, H, P, N) or (n, H, P,
            N).

    Returns:
        out (B, L, H, P) in x's dtype, contiguous, or (out, final_states).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    low, high = dt_limit
    options = (dt_softplus, low, high, reverse, chunk_size)
    how = examine(tensors)
    if not how:
        results = torch.ops.krait.ssd(*tensors, *options, return_final_states)
    elif how & GRAD:
        results = _Ssd.apply(*tensors, *options, return_final_states)
    else:
        results = _forward(tensors, options, return_final_states)
    return (results[0], results[1]) if return_final_states else results[0]
