"""causal_conv1d: the short convolution of the Mamba blocks."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import activation_name, count_positions, count_sequences, require_ndim, several


class CausalConv1dGradients(NamedTuple):
    """Gradients of causal_conv1d's inputs; None for those that were not given."""

    dx: Array
    dweight: Array
    dbias: Array | None
    dinitial_states: Array | None


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    state_positions: Array | None = None,
    return_final_states: bool = False,
    out: Array | None = None,
    final_states: Array | None = None,
) -> Array:
    """A short depthwise convolution over time, as in the Mamba blocks (Gu and Dao 2023, section
    3.4).

        out_t = act(bias + sum_k weight_k x_{t-K+1+k}),  x_{<0} from initial_states, or 0

    Args:
        x: (B, D, L), real, channel-first or channel-last.
        weight: (D, K), K >= 1.
        bias: (D,), optional.
        activation: None or "none", or "silu".
        initial_states: (B, D, K-1), or (n, D, K-1) with cu_seqlens, optional.
        seq_idx, cu_seqlens, state_positions: sequences in a row, and states on the way; krait.ops
            describes them.
        return_final_states: also return the last K-1 of [initial_states, x] of each row or packed
            sequence.
        out: destination (B, D, L), apart from x.
        final_states: destination like initial_states; may be these themselves.

    Returns:
        out (B, D, L) in x's element type; or a tuple of it and, of those that are asked for,
        final_states and states (B, M, D, K-1) with state_positions, in x's element type.
    """
    op = "causal_conv1d"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "x", x, 3, "(B, D, L)")
    require_ndim(op, "weight", weight, 2, "(D, K)")
    batch, channels, _ = x.shape
    width = max(weight.shape[1] - 1, 0)
    inputs = (
        arrays("x", x),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays("initial_states", initial_states),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
        arrays("state_positions", state_positions),
    )
    if out is None:
        out = arrays.empty_like(x)
    if final_states is None and return_final_states:
        shape = (count_sequences(op, batch, cu_seqlens), channels, width)
        final_states = arrays.empty(shape, dtype_name(x))
    states = None
    if state_positions is not None:
        states = arrays.empty(
            (batch, count_positions(op, state_positions), channels, width), dtype_name(x)
        )
    library().causal_conv1d(
        *inputs,
        activation_name(activation),
        arrays.destination("out", out),
        arrays.destination("final_states", final_states),
        arrays.destination("states", states),
    )
    return several(*map(arrays.result, (out, final_states, states)))


def causal_conv1d_update(
    x: Array,
    conv_state: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    cache_seqlens: Array | None = None,
    conv_state_indices: Array | None = None,
    seq_idx: Array | None = None,
    out: Array | None = None,
) -> Array:
    """One (or T) tokens on top of a state of causal_conv1d, which is updated in place.

    Args:
        x: (B, D) or (B, D, T), real.
        conv_state: (R, D, S), S >= K-1, updated in place.
        weight: (D, K).
        bias: (D,), optional.
        activation: None or "none", or "silu".
        cache_seqlens: (B,), int32 or int64, optional: the state is a ring that is written at
            cache_seqlens % S.
        conv_state_indices: (B,), int32 or int64, optional: the row of conv_state of each row of x;
            a negative one is padding (output 0, state untouched).
        seq_idx: (B,), optional: a negative one is padding too.
        out: destination like x.

    Returns:
        out, in x's shape and element type.
    """
    arrays = Arrays("causal_conv1d_update", "x", x)
    inputs = (
        arrays("x", x),
        arrays.destination("conv_state", conv_state),
        arrays("weight", weight),
        arrays("bias", bias),
        activation_name(activation),
        arrays("cache_seqlens", cache_seqlens),
        arrays("conv_state_indices", conv_state_indices),
        arrays("seq_idx", seq_idx),
    )
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().causal_conv1d_update(*inputs, arrays.destination("out", out))
    return arrays.result(out)


def causal_conv1d_varlen_states(x: Array, cu_seqlens: Array, state_len: int) -> Array:
    """The last `state_len` inputs of each packed sequence, zero padded on the left.

    Args:
        x: (T, D), real.
        cu_seqlens: (n + 1,), int32 or int64.

    Returns:
        (n, D, state_len) in x's element type.
    """
    op = "causal_conv1d_varlen_states"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "x", x, 2, "(T, D)")
    inputs = (arrays("x", x), arrays.given("cu_seqlens", cu_seqlens))
    state_len = arrays.integer("state_len", state_len)
    shape = (count_sequences(op, 1, cu_seqlens), x.shape[1], max(state_len, 0))
    out = arrays.empty(shape, dtype_name(x))
    library().causal_conv1d_varlen_states(
        *inputs,
        state_len,
        arrays.destination("out", out),
    )
    return arrays.result(out)


def causal_conv1d_backward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    dout: Array,
    dfinal_states: Array | None = None,
    activation: str | None = None,
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
) -> CausalConv1dGradients:
    """The gradients of causal_conv1d.

    Args:
        x .. bias, activation .. cu_seqlens: as given to causal_conv1d.
        dout: (B, D, L), the gradient of out.
        dfinal_states: the gradient of final_states, optional.

    Returns:
        Gradients in the shapes of the inputs: those of x and initial_states in the element types of
        these, those of weight and bias in float32.
    """
    arrays = Arrays("causal_conv1d_backward", "x", x)
    inputs = (
        arrays("x", x),
        arrays.given("weight", weight),
        arrays("bias", bias),
        arrays("initial_states", initial_states),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
        activation_name(activation),
        arrays("dout", dout),
        arrays("dfinal_states", dfinal_states),
    )
    result = CausalConv1dGradients(
        dx=arrays.empty_like(x),
        dweight=arrays.zeros(weight.shape, arrays.real),
        dbias=arrays.sums_like(bias),
        dinitial_states=arrays.like(initial_states),
    )
    library().causal_conv1d_backward(
        *inputs,
        arrays.destination("dx", result.dx),
        arrays.destination("dweight", result.dweight),
        arrays.destination("dbias", result.dbias),
        arrays.destination("dinitial_states", result.dinitial_states),
    )
    return CausalConv1dGradients(*map(arrays.result, result))
