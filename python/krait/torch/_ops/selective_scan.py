"""Mamba-1's selective scan as a differentiable PyTorch operator (Gu and Dao 2023, "Mamba",
algorithm 2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    wants_grad,
)

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def _state_dtype(A: Tensor, sums: torch.dtype) -> torch.dtype:
    return _COMPLEX[sums] if A.is_complex() else sums


def _state_shape(u: Tensor, A: Tensor, cu_seqlens: Optional[Tensor]) -> tuple[Any, Any, Any]:
    rows = count_sequences(u.shape[0], cu_seqlens)
    return rows, u.shape[1], A.shape[1]


def _check(u: Tensor, A: Tensor, cu_seqlens: Optional[Tensor]) -> None:
    """What outputs take their shapes from; the library checks the rest."""
    if u.dim() != 3:
        raise ValueError(f"[selective_scan] u has shape {shape_of(u)}, expected (B, D, L)")
    if A.dim() != 2:
        raise ValueError(f"[selective_scan] A has shape {shape_of(A)}, expected (D, N)")
    if cu_seqlens is not None:
        check_offsets("selective_scan", cu_seqlens)


@functools.lru_cache(maxsize=1024)
def _checkpoints_shape(
    rows: int, channels: int, length: int, d_state: int, is_complex: bool, on_gpu: bool
) -> tuple[int, ...]:
    device_type = 2 if on_gpu else 1  # as DLPack counts
    shape = native("selective_scan_checkpoints_shape")
    return tuple(shape(rows, channels, length, d_state, is_complex, device_type))


@functools.lru_cache(maxsize=1024)
def _checkpoint_steps(d_state: int, is_complex: bool, on_gpu: bool) -> int:
    """Tokens from one checkpoint to the next."""
    tokens = 1 << 20
    return tokens // _checkpoints_shape(1, 1, tokens + 1, d_state, is_complex, on_gpu)[0]


def _symbolic_checkpoints_shape(
    rows: Any, channels: Any, length: Any, d_state: Any, is_complex: bool, on_gpu: bool
) -> tuple[Any, Any, Any]:
    """`_checkpoints_shape` of sizes that a compiler has not put numbers to, but for d_state."""
    steps = _checkpoint_steps(int(d_state), is_complex, on_gpu)
    return rows * ((length - 1) // steps if length > 0 else 0), d_state, channels


def _empty_outputs(
    u: Tensor,
    A: Tensor,
    cu_seqlens: Optional[Tensor],
    sums: torch.dtype,
    want_last_state: bool,
    want_checkpoints: bool,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    out = torch.empty_like(u)
    if not want_last_state and not want_checkpoints:
        return out, None, None
    state_dtype = _state_dtype(A, sums)
    last_state = None
    if want_last_state:
        last_state = u.new_empty(_state_shape(u, A, cu_seqlens), dtype=state_dtype)
    checkpoints = None
    if want_checkpoints and sums is torch.float32:
        rows, D, N = _state_shape(u, A, None)
        length = u.shape[2]
        shape: tuple[Any, ...]
        if isinstance(u.shape[0], int) and isinstance(u.shape[1], int) and isinstance(length, int):
            shape = _checkpoints_shape(rows, D, length, int(N), A.is_complex(), u.is_cuda)
        else:
            shape = _symbolic_checkpoints_shape(rows, D, length, N, A.is_complex(), u.is_cuda)
        checkpoints = u.new_empty(shape, dtype=state_dtype)
    return out, last_state, checkpoints


def _forward(
    inputs: tuple[Any, ...],
    delta_softplus: bool,
    reverse: bool,
    want_last_state: bool,
    want_checkpoints: bool,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """`inputs` are u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens."""
    u = inputs[0]
    sums = torch.float32
    if want_last_state or want_checkpoints or u.is_cuda:
        sums = sum_dtype(inputs)
        if sums is torch.float64 and u.is_cuda:
            options = (delta_softplus, reverse, want_last_state, want_checkpoints)
            return on_host(lambda *copies: _forward(copies, *options), *inputs)
        _check(u, inputs[2], inputs[10])
    out, last_state, checkpoints = _empty_outputs(
        u, inputs[2], inputs[10], sums, want_last_state, want_checkpoints
    )
    native("selective_scan")(
        *inputs, None, delta_softplus, reverse, out, last_state, None, checkpoints
    )
    return out, last_state, checkpoints


def _backward(
    wanted: list[bool],
    dout: Optional[Tensor],
    dlast_state: Optional[Tensor],
    checkpoints: Optional[Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    seq_idx: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of those of (u, delta, A, B, C, D, z, delta_bias, initial_state) that are wanted,
    in this order.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    sums = sum_dtype(inputs)
    if sums is torch.float64 and u.is_cuda:
        return on_host(
            _backward, wanted, dout, dlast_state, checkpoints, *inputs, seq_idx, cu_seqlens,
            delta_softplus, reverse,
        )  # fmt: skip
    if dout is None:
        dout = torch.zeros_like(u)
    grads = _empty_gradients(wanted, inputs, sums)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = grads
    native("selective_scan_backward")(
        *inputs, seq_idx, cu_seqlens, delta_softplus, reverse, dout, dlast_state, checkpoints,
        du, ddelta, dz, dinitial_state, dB, dC, dA, dD, ddelta_bias,
    )  # fmt: skip
    return [like(g, t) for g, t in zip(grads, inputs) if g is not None and t is not None]


def _empty_gradients(
    wanted: list[bool], inputs: tuple[Optional[Tensor], ...], sums: torch.dtype
) -> list[Optional[Tensor]]:
    grads: list[Optional[Tensor]] = []
    for i, (want, t) in enumerate(zip(wanted, inputs)):
        if not want or t is None:
            grads.append(None)
        elif i in _ADDED_TO or (i in _MAYBE_CONSTANT and t.dim() == 2):
            grads.append(torch.zeros_like(t, dtype=_state_dtype(t, sums)))
        else:
            grads.append(torch.empty_like(t))
    return grads


_ADDED_TO = frozenset((2, 5, 7))  # A, D and delta_bias: sums, which the library adds to
_MAYBE_CONSTANT = frozenset((3, 4))  # B and C, where they do not vary over time


def _op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u = args[0]
    out, last_state, checkpoints = _forward(args[:11], *args[11:])
    return (
        out,
        u.new_empty(0) if last_state is None else last_state,
        u.new_empty(0) if checkpoints is None else checkpoints,
    )


def _op_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A, cu_seqlens = args[0], args[2], args[10]
    _check(u, A, cu_seqlens)
    sums = sum_dtype(args[:9])
    want_last_state, want_checkpoints = args[13:]
    out, last_state, checkpoints = _empty_outputs(
        u, A, cu_seqlens, sums, want_last_state, want_checkpoints
    )
    return (
        out,
        u.new_empty(0) if last_state is None else last_state,
        u.new_empty(0) if checkpoints is None else checkpoints,
    )


def _op_backward_fake(wanted: list[bool], *args: Any) -> list[Tensor]:
    inputs = args[3:12]
    return [torch.empty_like(t) for want, t in zip(wanted, inputs) if want and t is not None]


_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens"
)
define(
    f"selective_scan({_TENSORS}, bool delta_softplus, bool reverse, bool want_last_state, "
    "bool want_checkpoints) -> (Tensor, Tensor, Tensor)",
    _op,
    _op_fake,
)
define_backward(
    "selective_scan_backward(bool[] wanted, Tensor? dout, Tensor? dlast_state, "
    f"Tensor? checkpoints, {_TENSORS}, bool delta_softplus, bool reverse) -> Tensor[]",
    _backward,
    _op_backward_fake,
)


def _lazily_conjugated(tensors: Sequence[Optional[Tensor]]) -> bool:
    return any(t is not None and t.is_conj() for t in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], checkpoints: Optional[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], checkpoints)
    ctx.flags = inputs[11:13]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    checkpoints = output[2]
    _save(ctx, inputs, checkpoints if checkpoints.dim() == 3 else None)


def _gradients(
    ctx: Any, dout: Optional[Tensor], dlast_state: Optional[Tensor], _: Any = None
) -> tuple[Optional[Tensor], ...]:
    if dout is None and dlast_state is None:
        return (None,) * 15
    *inputs, checkpoints = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:9])
    args = (wanted, dout, dlast_state, checkpoints, *inputs, *ctx.flags)
    eager = (
        not torch.is_grad_enabled()
        and examine((*inputs, dout, dlast_state))
        and not _lazily_conjugated((*inputs, dlast_state))
    )
    compute: Any = _backward if eager else torch.ops.krait.selective_scan_backward
    grads = iter(compute(*args))
    return (*(next(grads) if want else None for want in wanted), *(None,) * 6)


torch.library.register_autograd("krait::selective_scan", _gradients, setup_context=_setup_context)


class _SelectiveScan(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Optional[Tensor]]:
        delta_softplus, reverse, want_last_state = args[11:]
        out, last_state, checkpoints = _forward(
            args[:11], delta_softplus, reverse, want_last_state, True
        )
        _save(ctx, args, checkpoints)
        return out, last_state

    backward = staticmethod(_gradients)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    *,
    delta_softplus: bool = False,
    initial_state: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    reverse: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Mamba-1's recurrence (Gu and Dao 2023, "Mamba", algorithm 2), for each channel d and state
    n::

        d_t = softplus?(delta_t + delta_bias)
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t
        y_t = sum_n C_t h_t      (twice its real part where A is complex)
        out_t = (y_t + D u_t) silu(z_t)

    Differentiable once in every floating input; `last_state` carries gradients too. Sums and states
    are float32, float64 where any input is (on the reference path).

    Args:
        u: (B, D, L), any strides; float32, bfloat16, float16 or float64, as are all real inputs.
        delta: (B, D, L), step sizes.
        A: (D, N), real or complex.
        B: constant (D, N), complex where A is, or variable (B, N, L) or (B, G, N, L); where A is
            complex, variable ones have 2L numbers, real and imaginary parts interleaved. Channel d
            uses group d // (D / G).
        C: like B.
        D: (D), weight of u in the output.
        z: (B, D, L), gate.
        delta_bias: (D), added to delta.
        delta_softplus: whether softplus is applied to delta + delta_bias.
        initial_state: (B, D, N), complex where A is; (n, D, N) with cu_seqlens.
        seq_idx: (B, L) int32 or int64: the state restarts from 0 where it changes; at -1 the output
            is 0 and the state stays as it is.
        cu_seqlens: (n + 1) int32 or int64: bounds of sequences packed into one row (B = 1).
        reverse: time runs from the end of each sequence to its start.
        return_last_state: also return the state after the last token, (B, D, N) or (n, D, N).

    Returns:
        out (B, D, L) in u's dtype, or (out, last_state).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens)
    how = examine(tensors)
    if A is None:
        raise TypeError("[selective_scan] A is None, expected a torch.Tensor")
    if how and A.is_complex() and _lazily_conjugated(tensors):
        how = 0
    if not how:
        results = torch.ops.krait.selective_scan(
            *tensors, delta_softplus, reverse, return_last_state, wants_grad(tensors)
        )
    elif how & GRAD:
        results = _SelectiveScan.apply(*tensors, delta_softplus, reverse, return_last_state)
    else:
        results = _forward(tensors, delta_softplus, reverse, return_last_state, False)
    return (results[0], results[1]) if return_last_state else results[0]
