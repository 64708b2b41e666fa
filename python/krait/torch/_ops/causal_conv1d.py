"""Short causal convolution over time as a differentiable PyTorch operator (Gu and Dao 2023, section
3.4).
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
    written,
)

_ADDED_TO = frozenset((1, 2))  # weight and bias: sums, which the library adds to


def activation_word(activation: Optional[str]) -> str:
    """The library's word for None, "silu" or "swish"."""
    if activation is None:
        return "none"
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation is {activation!r}, expected None, 'silu' or 'swish'")
    return "silu"


def _check(x: Tensor, weight: Tensor, cu_seqlens: Optional[Tensor]) -> None:
    """What outputs take their shapes from; the library checks the rest."""
    if x.dim() != 3:
        raise ValueError(f"[causal_conv1d] x has shape {shape_of(x)}, expected (B, D, L)")
    if weight.dim() != 2:
        raise ValueError(f"[causal_conv1d] weight has shape {shape_of(weight)}, expected (D, K)")
    if cu_seqlens is not None:
        check_offsets("causal_conv1d", cu_seqlens)


def _empty_outputs(
    x: Tensor, weight: Tensor, cu_seqlens: Optional[Tensor], want_final_states: bool
) -> tuple[Tensor, Optional[Tensor]]:
    out = torch.empty_like(x)
    if not want_final_states:
        return out, None
    rows = count_sequences(x.shape[0], cu_seqlens)
    return out, x.new_empty((rows, x.shape[1], weight.shape[1] - 1))


def _forward(
    inputs: tuple[Any, ...], activation: str, want_final_states: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """`inputs` are x, weight, bias, initial_states, seq_idx, cu_seqlens."""
    x, weight, cu_seqlens = inputs[0], inputs[1], inputs[5]
    if x.dtype is torch.float64 and x.is_cuda:
        return on_host(lambda *copies: _forward(copies, activation, want_final_states), *inputs)
    if want_final_states:
        _check(x, weight, cu_seqlens)
    out, final_states = _empty_outputs(x, weight, cu_seqlens, want_final_states)
    native("causal_conv1d")(*inputs, None, activation, out, final_states, None)
    return out, final_states


def _backward(
    wanted: list[bool],
    dout: Optional[Tensor],
    dfinal_states: Optional[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    initial_states: Optional[Tensor],
    seq_idx: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    activation: str,
) -> list[Tensor]:
    """Gradients of those of (x, weight, bias, initial_states) that are wanted, in this order."""
    inputs = (x, weight, bias, initial_states)
    if x.dtype is torch.float64 and x.is_cuda:
        return on_host(
            _backward, wanted, dout, dfinal_states, *inputs, seq_idx, cu_seqlens, activation
        )
    if dout is None:
        dout = torch.zeros_like(x)
    sums = sum_dtype((x,))
    grads: list[Optional[Tensor]] = []
    for i, (want, t) in enumerate(zip(wanted, inputs)):
        if not want or t is None:
            grads.append(None)
        elif i in _ADDED_TO:
            grads.append(torch.zeros_like(t, dtype=sums))
        else:
            grads.append(torch.empty_like(t))
    dx, dweight, dbias, dinitial_states = grads
    native("causal_conv1d_backward")(
        *inputs, seq_idx, cu_seqlens, activation, dout, dfinal_states,
        dx, dweight, dbias, dinitial_states,
    )  # fmt: skip
    return [like(g, t) for g, t in zip(grads, inputs) if g is not None and t is not None]


def _op(*args: Any) -> tuple[Tensor, Tensor]:
    out, final_states = _forward(args[:6], args[6], args[7])
    return out, out.new_empty(0) if final_states is None else final_states


def _op_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, cu_seqlens = args[0], args[1], args[5]
    _check(x, weight, cu_seqlens)
    out, final_states = _empty_outputs(x, weight, cu_seqlens, args[7])
    return out, out.new_empty(0) if final_states is None else final_states


def _op_backward_fake(wanted: list[bool], *args: Any) -> list[Tensor]:
    inputs = args[2:6]
    return [torch.empty_like(t) for want, t in zip(wanted, inputs) if want and t is not None]


_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, "
    "Tensor? cu_seqlens, str activation"
)
define(f"causal_conv1d({_INPUTS}, bool want_final_states) -> (Tensor, Tensor)", _op, _op_fake)
define_backward(
    f"causal_conv1d_backward(bool[] wanted, Tensor? dout, Tensor? dfinal_states, {_INPUTS}) "
    "-> Tensor[]",
    _backward,
    _op_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.activation = inputs[6]


def _gradients(
    ctx: Any, dout: Optional[Tensor], dfinal_states: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    if dout is None and dfinal_states is None:
        return (None,) * 8
    inputs = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    eager = not torch.is_grad_enabled() and examine((*inputs, dout, dfinal_states))
    compute: Any = _backward if eager else torch.ops.krait.causal_conv1d_backward
    grads = iter(compute(wanted, dout, dfinal_states, *inputs, ctx.activation))
    return (*(next(grads) if want else None for want in wanted), *(None,) * 4)


torch.library.register_autograd("krait::causal_conv1d", _gradients, setup_context=_save)


class _CausalConv1d(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Optional[Tensor]]:
        _save(ctx, args)
        return _forward(args[:6], args[6], args[7])

    backward = staticmethod(_gradients)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    *,
    activation: Optional[str] = None,
    initial_states: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    return_final_states: bool = False,
) -> Any:
    """Depthwise convolution over the last K tokens (Gu and Dao 2023, "Mamba", section 3.4)::

        out_t = act(bias + sum_k weight_k x_{t-K+1+k}),   x_{<0} from initial_states, or 0

    Differentiable once in every floating input; `final_states` carry gradients too. Sums are
    float32, float64 where x is (on the reference path).

    Args:
        x: (B, D, L), any strides, channel-last and channel-first alike; float32, bfloat16, float16
            or float64.
        weight: (D, K), K >= 1.
        bias: (D).
        activation: None, "silu" or "swish" (the same).
        initial_states: (B, D, K - 1), what came before x; (n, D, K - 1) with cu_seqlens.
        seq_idx: (B, L) int32 or int64: taps of another sequence are 0; at -1 the output is 0, and
            later windows are as if the token were not there.
        cu_seqlens: (n + 1) int32 or int64: bounds of sequences packed into one row (B = 1).
        return_final_states: also return the last K - 1 of [initial_states, x], (B, D, K - 1) or (n,
            D, K - 1).

    Returns:
        out (B, D, L) in x's dtype, laid out in memory like x, or (out, final_states).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    tensors = (x, weight, bias, initial_states, seq_idx, cu_seqlens)
    word = activation_word(activation)
    how = examine(tensors)
    if not how:
        results = torch.ops.krait.causal_conv1d(*tensors, word, return_final_states)
    elif how & GRAD:
        results = _CausalConv1d.apply(*tensors, word, return_final_states)
    else:
        results = _forward(tensors, word, return_final_states)
    return (results[0], results[1]) if return_final_states else results[0]


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    activation: str,
    cache_seqlens: Optional[Tensor],
    conv_state_indices: Optional[Tensor],
) -> Tensor:
    if x.dtype is torch.float64 and x.is_cuda:
        state = conv_state.cpu()
        out = on_host(
            _update, x, state, weight, bias, activation, cache_seqlens, conv_state_indices
        )
        conv_state.copy_(state)
        return out
    out = torch.empty_like(x)
    native("causal_conv1d_update")(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, None, out
    )
    return out


define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "str activation, Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor",
    _update,
    lambda x, *_: torch.empty_like(x),
)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    *,
    activation: Optional[str] = None,
    cache_seqlens: Optional[Tensor] = None,
    conv_state_indices: Optional[Tensor] = None,
) -> Tensor:
    """`causal_conv1d` for the next token (or T tokens) of each sequence, on top of a state that is
    updated in place.

    For decoding: the result carries no gradient.

    Args:
        x: (B, D) or (B, D, T).
        conv_state: (R, D, S), S >= K - 1, the latest inputs; R = B without conv_state_indices.
        weight: (D, K).
        bias: (D).
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: (B) int32 or int64: the state is a ring, written at cache_seqlens % S, not
            shifted.
        conv_state_indices: (B) int32 or int64, the row of conv_state of each entry; a negative one
            is a padding slot: output 0, state untouched.

    Returns:
        out, of x's shape and dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    word = activation_word(activation)
    tensors = (x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    if examine(tensors):
        out = _update(x, conv_state, weight, bias, word, cache_seqlens, conv_state_indices)
        written(conv_state)
        return out
    with torch.no_grad():
        return torch.ops.krait.causal_conv1d_update(
            x, conv_state, weight, bias, word, cache_seqlens, conv_state_indices
        )


def _varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    states = _empty_varlen_states(x, cu_seqlens, state_len)
    if x.is_cuda and x.dtype is torch.float64:
        return on_host(_varlen_states, x, cu_seqlens, state_len)
    native("causal_conv1d_varlen_states")(x, cu_seqlens, state_len, states)
    return states


def _empty_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    if x.dim() != 2:
        raise ValueError(
            f"[causal_conv1d_varlen_states] x has shape {shape_of(x)}, expected (T, D)"
        )
    check_offsets("causal_conv1d_varlen_states", cu_seqlens)
    return x.new_empty((cu_seqlens.shape[0] - 1, x.shape[1], state_len))


define(
    "causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, SymInt state_len) -> Tensor",
    _varlen_states,
    _empty_varlen_states,
)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each packed sequence, zero padded on the left.

    For decoding: the result carries no gradient.

    Args:
        x: (T, D), sequences one after another.
        cu_seqlens: (n + 1) int32 or int64, their bounds.
        state_len: inputs to keep, K - 1 or more for a convolution of width K.

    Returns:
        states (n, D, state_len) in x's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    if state_len < 0:
        raise ValueError(
            f"[causal_conv1d_varlen_states] state_len is {state_len}, expected 0 or more"
        )
    if examine((x, cu_seqlens)):
        return _varlen_states(x, cu_seqlens, state_len)
    with torch.no_grad():
        return torch.ops.krait.causal_conv1d_varlen_states(x, cu_seqlens, state_len)
