"""The operators, over NumPy arrays and arrays of any library that speaks DLPack.

Each function mirrors the C++ header of its name (``include/krait/ops``): the same arguments, shapes and errors.
Arrays may lie on the CPU or on a GPU, with any strides, and are not copied; on a GPU the work is queued on the
stream that PyTorch works on (else on the legacy default stream). Results are arrays of the kind of the first
argument, in its element type unless the text says otherwise.

Shapes: B batch, L length, D channels, N states per channel (d_state), H heads, P channels per head (headdim), G
groups. "real" is float32, bfloat16 or float16 in any mixture; float64 (complex128) anywhere makes the slow
reference compute in double precision, on the CPU. Times and steps have no unit. Sequences:

- ``seq_idx`` (B, L), int32 or int64: the number of the sequence that each token belongs to; the state restarts where
  it changes, and -1 is padding, whose output is 0.
- ``cu_seqlens`` (n + 1), int32 or int64, with B = 1: sequence i is the tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1.
- ``state_positions`` (B, M), int32 or int64: states are wanted after those tokens.

All functions raise ValueError, naming the array, what was found and what was expected, where shapes, element types,
devices or strides do not fit; TypeError for what is no array; MemoryError; KeyboardInterrupt ends long work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._arrays import Array, Arrays, dtype_name
from ._library import library

__all__ = [
    "AttentionGradients",
    "CausalConv1dGradients",
    "CrossEntropy",
    "LinearCrossEntropyGradients",
    "LinearGradients",
    "NormGradients",
    "SelectiveScanGradients",
    "SsdGradients",
    "adamw",
    "attention",
    "attention_backward",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "cross_entropy",
    "cross_entropy_backward",
    "dropout",
    "embedding",
    "embedding_backward",
    "gated_silu",
    "gated_silu_backward",
    "gelu",
    "gelu_backward",
    "global_norm",
    "layer_norm",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "norm",
    "norm_backward",
    "rms_norm",
    "rotary_embedding",
    "sample_rows",
    "sampling_distribution",
    "selective_scan",
    "selective_scan_backward",
    "selective_step",
    "ssd",
    "ssd_backward",
    "ssd_discretize",
    "ssd_minimal_discrete",
    "ssd_undiscretize",
    "state_update",
    "update_average",
]

_INFINITY = float("inf")


def _sequences(batch: int, cu_seqlens: Array | None) -> int:
    return batch if cu_seqlens is None else int(cu_seqlens.shape[0]) - 1


def _is_complex(array: Array) -> bool:
    return dtype_name(array).startswith("complex")


def _require_ndim(op: str, name: str, array: Array, ndim: int, shape: str) -> None:
    if len(array.shape) != ndim:
        raise ValueError(f"[{op}] {name} has shape {tuple(array.shape)}, expected {shape}")


def _several(out: Array, *others: Array | None) -> Array:
    """`out`, or a tuple with those of `others` that are there."""
    wanted = [other for other in others if other is not None]
    return (out, *wanted) if wanted else out


def _activation(activation: str | None) -> str:
    return "none" if activation is None else str(activation)


# ---------------------------------------------------------------------------------------------- selective_scan


class SelectiveScanGradients(NamedTuple):
    """Gradients of selective_scan's inputs; None for those that were not given."""

    du: Array
    ddelta: Array
    dA: Array
    dB: Array
    dC: Array
    dD: Array | None
    dz: Array | None
    ddelta_bias: Array | None
    dinitial_state: Array | None


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    state_positions: Array | None = None,
    reverse: bool = False,
    return_last_state: bool = False,
    return_checkpoints: bool = False,
    out: Array | None = None,
    last_state: Array | None = None,
) -> Array:
    """Mamba-1's recurrence (Gu and Dao 2023, "Mamba", algorithm 2).

        d_t = softplus?(delta_t + delta_bias)
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t
        out_t = (C_t h_t + D u_t) silu(z_t)

    Args:
        u, delta: (B, D, L), real.
        A: (D, N), float32 or complex64; where it is complex out is 2 Re(C_t h_t) + D u_t.
        B, C: constant (D, N), complex where A is, or variable (B, N, L) or (B, G, N, L), where G divides D and
            channel d uses group d // (D // G); 2L numbers, real and imaginary parts in turn, where A is complex.
        D, delta_bias: (D,), optional.
        z: (B, D, L), optional.
        initial_state: (B, D, N), or (n, D, N) with cu_seqlens, optional; complex where A is.
        reverse: t runs from L - 1 to 0, within each sequence.
        return_last_state: also return the state after the last token of each row or packed sequence.
        return_checkpoints: also return what spares selective_scan_backward a walk over all tokens.
        out: destination (B, D, L) in u's element type; may be u or z itself.
        last_state: destination (B, D, N) or (n, D, N); may be initial_state itself.

    Returns:
        out (B, D, L) in u's element type; or a tuple of it and, of those that are asked for, last_state,
        float32 or complex64, states (B, M, D, N) with state_positions, and checkpoints (K, N, D).

    Raises:
        ValueError: for shapes, element types or sequences that do not fit.
    """
    op = "selective_scan"
    arrays = Arrays(op, "u", u)
    _require_ndim(op, "u", u, 3, "(B, D, L)")
    _require_ndim(op, "A", A, 2, "(D, N)")
    batch, channels, length = u.shape
    d_state = A.shape[1]
    inputs = (
        arrays("u", u),
        arrays("delta", delta),
        arrays("A", A),
        arrays("B", B),
        arrays("C", C),
        arrays("D", D),
        arrays("z", z),
        arrays("delta_bias", delta_bias),
        arrays("initial_state", initial_state),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
        arrays("state_positions", state_positions),
    )
    complex_ = _is_complex(A)
    state_dtype = (
        ("complex128" if arrays.double else "complex64") if complex_ else arrays.real
    )
    if out is None:
        out = arrays.empty_like(u)
    if last_state is None and return_last_state:
        last_state = arrays.empty((_sequences(batch, cu_seqlens), channels, d_state), state_dtype)
    states = checkpoints = None
    if state_positions is not None:
        states = arrays.empty((batch, state_positions.shape[1], channels, d_state), state_dtype)
    if return_checkpoints:
        if arrays.double:
            raise ValueError(
                f"[{op}] return_checkpoints is given in double precision, where the reference keeps none"
            )
        shape = library().selective_scan_checkpoints_shape(
            batch, channels, length, d_state, complex_, _device_type(u)
        )
        checkpoints = arrays.empty(shape, state_dtype)
    library().selective_scan(
        *inputs,
        bool(delta_softplus),
        bool(reverse),
        arrays.destination("out", out),
        arrays.destination("last_state", last_state),
        arrays.destination("states", states),
        arrays.destination("checkpoints", checkpoints),
    )
    return _several(*map(arrays.result, (out, last_state, states, checkpoints)))


def selective_scan_backward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    *,
    dout: Array,
    dlast_state: Array | None = None,
    checkpoints: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    reverse: bool = False,
) -> SelectiveScanGradients:
    """The gradients of selective_scan.

    Args:
        u .. delta_bias, delta_softplus .. reverse: as given to selective_scan.
        dout: (B, D, L), the gradient of out.
        dlast_state: the gradient of last_state, optional.
        checkpoints: as selective_scan returned them for these arguments, optional: spares a walk over all tokens.

    Returns:
        Gradients in the shapes of the inputs: those of u, delta, z, initial_state and of variable B and C in the
        element types of these, those of A, D, delta_bias and of constant B and C in float32 (complex64). A complex
        gradient is d/d(re) + i d/d(im).
    """
    arrays = Arrays("selective_scan", "u", u)
    inputs = (
        arrays("u", u),
        arrays("delta", delta),
        arrays("A", A),
        arrays("B", B),
        arrays("C", C),
        arrays("D", D),
        arrays("z", z),
        arrays("delta_bias", delta_bias),
        arrays("initial_state", initial_state),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
    )
    gradients = (arrays("dout", dout), arrays("dlast_state", dlast_state))
    state_dtype = (
        ("complex128" if arrays.double else "complex64") if _is_complex(A) else arrays.real
    )

    def like(array: Array | None) -> Array | None:
        return None if array is None else arrays.empty_like(array)

    def summed(array: Array | None, dtype: str) -> Array | None:
        return None if array is None else arrays.zeros(array.shape, dtype)

    def of_factor(factor: Array) -> Array | None:
        return summed(factor, state_dtype) if len(factor.shape) == 2 else like(factor)

    result = SelectiveScanGradients(
        du=like(u),
        ddelta=like(delta),
        dA=summed(A, state_dtype),
        dB=of_factor(B),
        dC=of_factor(C),
        dD=summed(D, arrays.real),
        dz=like(z),
        ddelta_bias=summed(delta_bias, arrays.real),
        dinitial_state=like(initial_state),
    )
    library().selective_scan_backward(
        *inputs,
        bool(delta_softplus),
        bool(reverse),
        *gradients,
        arrays("checkpoints", checkpoints),
        arrays.destination("du", result.du),
        arrays.destination("ddelta", result.ddelta),
        arrays.destination("dz", result.dz),
        arrays.destination("dinitial_state", result.dinitial_state),
        arrays.destination("dB", result.dB),
        arrays.destination("dC", result.dC),
        arrays.destination("dA", result.dA),
        arrays.destination("dD", result.dD),
        arrays.destination("ddelta_bias", result.ddelta_bias),
    )
    return SelectiveScanGradients(*map(arrays.result, result))


def _device_type(array: Array) -> int:
    device = getattr(array, "__dlpack_device__", None)
    return 1 if device is None else int(device()[0])


# ---------------------------------------------------------------------------------------------------------- ssd


class SsdGradients(NamedTuple):
    """Gradients of ssd's inputs; None for those that were not given."""

    dx: Array
    ddt: Array
    dA: Array
    dB: Array
    dC: Array
    dD: Array | None
    dz: Array | None
    ddt_bias: Array | None
    dinitial_states: Array | None


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    *,
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    state_positions: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, _INFINITY),
    reverse: bool = False,
    chunk_size: int = 0,
    return_final_states: bool = False,
    out: Array | None = None,
    final_states: Array | None = None,
) -> Array:
    """Mamba-2's state-space duality (Dao and Gu 2024, "Transformers are SSMs", sections 6 and 7).

        d_t = clamp(softplus?(dt_t + dt_bias), dt_limit)
        S_t = exp(d_t A_h) S_{t-1} + d_t x_t B_t^T
        out_t = (S_t C_t + D x_t) silu(z_t)

    Args:
        x: (B, L, H, P), real.
        dt: (B, L, H).
        A: (H,), negative.
        B, C: (B, L, G, N); head h uses group h // (H // G).
        D: (H,) or (H, P), optional.
        z: (B, L, H, P), optional.
        dt_bias: (H,), optional.
        initial_states: (B, H, P, N), or (n, H, P, N) with cu_seqlens, optional.
        dt_limit: (low, high), after softplus.
        reverse: t runs from L - 1 to 0, within each sequence.
        chunk_size: tokens of a chunk, 0: chosen from the shape. The result depends on it by rounding only.
        return_final_states: also return the state after the last token of each row or packed sequence.
        out: destination (B, L, H, P), apart from the inputs.
        final_states: destination like initial_states; may be these themselves.

    Returns:
        out (B, L, H, P) in x's element type; or a tuple of it and, of those that are asked for, final_states and
        states (B, M, H, P, N) with state_positions, float32.

    Raises:
        ValueError: for shapes, element types or sequences that do not fit.
    """
    op = "ssd"
    arrays = Arrays(op, "x", x)
    _require_ndim(op, "x", x, 4, "(B, L, H, P)")
    _require_ndim(op, "B", B, 4, "(B, L, G, N)")
    batch, _, heads, headdim = x.shape
    d_state = B.shape[3]
    inputs = (
        arrays("x", x),
        arrays("dt", dt),
        arrays("A", A),
        arrays("B", B),
        arrays("C", C),
        arrays("D", D),
        arrays("z", z),
        arrays("dt_bias", dt_bias),
        arrays("initial_states", initial_states),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
        arrays("state_positions", state_positions),
    )
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    if final_states is None and return_final_states:
        shape = (_sequences(batch, cu_seqlens), heads, headdim, d_state)
        final_states = arrays.empty(shape, arrays.real)
    states = None
    if state_positions is not None:
        shape = (batch, state_positions.shape[1], heads, headdim, d_state)
        states = arrays.empty(shape, arrays.real)
    library().ssd(
        *inputs,
        bool(dt_softplus),
        float(dt_limit[0]),
        float(dt_limit[1]),
        bool(reverse),
        int(chunk_size),
        arrays.destination("out", out),
        arrays.destination("final_states", final_states),
        arrays.destination("states", states),
    )
    return _several(*map(arrays.result, (out, final_states, states)))


def ssd_backward(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    *,
    dout: Array,
    dfinal_states: Array | None = None,
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, _INFINITY),
    reverse: bool = False,
    chunk_size: int = 0,
) -> SsdGradients:
    """The gradients of ssd.

    Args:
        x .. dt_bias, initial_states .. chunk_size: as given to ssd.
        dout: (B, L, H, P), the gradient of out.
        dfinal_states: the gradient of final_states, optional.

    Returns:
        Gradients in the shapes of the inputs: those of x, dt, B, C, z and initial_states in the element types of
        these, those of A, D and dt_bias in float32. ddt is 0 where dt_limit clamps.
    """
    arrays = Arrays("ssd", "x", x)
    inputs = (
        arrays("x", x),
        arrays("dt", dt),
        arrays("A", A),
        arrays("B", B),
        arrays("C", C),
        arrays("D", D),
        arrays("z", z),
        arrays("dt_bias", dt_bias),
        arrays("initial_states", initial_states),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
    )
    gradients = (arrays("dout", dout), arrays("dfinal_states", dfinal_states))

    def like(array: Array | None) -> Array | None:
        return None if array is None else arrays.empty_like(array)

    def summed(array: Array | None) -> Array | None:
        return None if array is None else arrays.zeros(array.shape, arrays.real)

    result = SsdGradients(
        dx=like(x),
        ddt=like(dt),
        dA=summed(A),
        dB=like(B),
        dC=like(C),
        dD=summed(D),
        dz=like(z),
        ddt_bias=summed(dt_bias),
        dinitial_states=like(initial_states),
    )
    library().ssd_backward(
        *inputs,
        bool(dt_softplus),
        float(dt_limit[0]),
        float(dt_limit[1]),
        bool(reverse),
        int(chunk_size),
        *gradients,
        arrays.destination("dx", result.dx),
        arrays.destination("ddt", result.ddt),
        arrays.destination("dB", result.dB),
        arrays.destination("dC", result.dC),
        arrays.destination("dz", result.dz),
        arrays.destination("dinitial_states", result.dinitial_states),
        arrays.destination("dA", result.dA),
        arrays.destination("dD", result.dD),
        arrays.destination("ddt_bias", result.ddt_bias),
    )
    return SsdGradients(*map(arrays.result, result))


def ssd_minimal_discrete(
    X: Array,
    A: Array,
    B: Array,
    C: Array,
    block_len: int,
    initial_states: Array | None = None,
) -> tuple[Array, Array]:
    """Listing 1 of "Transformers are SSMs" (Dao and Gu 2024), in discrete time.

    Args:
        X: (B, L, H, P), already multiplied by the step d; L may be any number.
        A: (B, L, H), already multiplied by d.
        B, C: (B, L, H, N).
        block_len: tokens of a block, at least 1.
        initial_states: (B, 1, H, P, N), optional.

    Returns:
        (Y (B, L, H, P) in X's element type, final_state (B, H, P, N) float32).
    """
    op = "ssd_minimal_discrete"
    arrays = Arrays(op, "X", X)
    _require_ndim(op, "X", X, 4, "(B, L, H, P)")
    _require_ndim(op, "B", B, 4, "(B, L, H, N)")
    batch, _, heads, headdim = X.shape
    inputs = (arrays("X", X), arrays("A", A), arrays("B", B), arrays("C", C))
    initial = arrays("initial_states", initial_states)
    out = arrays.empty(X.shape, dtype_name(X))
    final_state = arrays.empty((batch, heads, headdim, B.shape[3]), arrays.real)
    library().ssd_minimal_discrete(
        *inputs,
        int(block_len),
        initial,
        arrays.destination("out", out),
        arrays.destination("final_state", final_state),
    )
    return arrays.result(out), arrays.result(final_state)


def ssd_discretize(x: Array, d: Array, A: Array) -> tuple[Array, Array]:
    """From continuous to discrete time: (X = d x (B, L, H, P), d A (B, L, H)).

    Args:
        x: (B, L, H, P).
        d: (B, L, H), the steps after bias, softplus and limits.
        A: (H,).
    """
    arrays = Arrays("ssd_discretize", "x", x)
    inputs = (arrays("x", x), arrays("d", d), arrays("A", A))
    X_out = arrays.empty(x.shape, dtype_name(x))
    A_out = arrays.empty(d.shape, arrays.real)
    library().ssd_discretize(
        *inputs, arrays.destination("X_out", X_out), arrays.destination("A_out", A_out)
    )
    return arrays.result(X_out), arrays.result(A_out)


def ssd_undiscretize(X: Array, A: Array, d: Array) -> tuple[Array, Array]:
    """From discrete to continuous time: (x = X / d (B, L, H, P), A / d (B, L, H)); d must not be 0.

    Args:
        X: (B, L, H, P).
        A: (B, L, H).
        d: (B, L, H).
    """
    arrays = Arrays("ssd_undiscretize", "X", X)
    inputs = (arrays("X", X), arrays("A", A), arrays("d", d))
    x_out = arrays.empty(X.shape, dtype_name(X))
    A_out = arrays.empty(d.shape, arrays.real)
    library().ssd_undiscretize(
        *inputs, arrays.destination("x_out", x_out), arrays.destination("A_out", A_out)
    )
    return arrays.result(x_out), arrays.result(A_out)


def state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    *,
    state_batch_indices: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, _INFINITY),
    out: Array | None = None,
) -> Array:
    """One step (or T) of the recurrence of selective_scan and ssd, in place, for decoding.

        d = clamp(softplus?(dt + dt_bias), dt_limit)
        S = exp(d A) S + d B x;  out = (S C + D x) silu(z)

    Args:
        state: (R, H, P, N) or (R, D, N), float32, bfloat16 or float16, updated in place.
        x: (B, H, P) or (B, D); with T tokens (B, T, H, P) or (B, T, D).
        dt: like x, or (B, H) / (B, T, H) beside a state of heads.
        A: (D, N), (H,) or (H, P, N).
        B, C: (B, N) or (B, G, N); with T tokens (B, T, N) or (B, T, G, N).
        D, dt_bias: (H,), (H, P) or (D,), optional.
        z: like x, optional.
        state_batch_indices: (B,), int32 or int64, optional: the row of state of each entry, all distinct; a negative
            one is padding (output 0, no state touched). Without it R = B.
        out: destination like x; may be x or z itself.

    Returns:
        out, in x's shape and element type.
    """
    arrays = Arrays("state_update", "x", x)
    inputs = (
        arrays.destination("state", state),
        arrays("x", x),
        arrays("dt", dt),
        arrays("A", A),
        arrays("B", B),
        arrays("C", C),
        arrays("D", D),
        arrays("z", z),
        arrays("dt_bias", dt_bias),
        arrays("state_batch_indices", state_batch_indices),
    )
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().state_update(
        *inputs,
        bool(dt_softplus),
        float(dt_limit[0]),
        float(dt_limit[1]),
        arrays.destination("out", out),
    )
    return arrays.result(out)


def selective_step(
    state: Array,
    x: Array,
    low_dt: Array,
    dt_weight: Array,
    dt_bias: Array | None,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    *,
    state_batch_indices: Array | None = None,
    out: Array | None = None,
) -> Array:
    """What stands between x_proj and out_proj of a Mamba-1 block that takes one token of each sequence: state_update
    with dt_softplus and dt = low_dt dt_weight^T.

    Args:
        state: (R, D, N), updated in place.
        x: (B, D).
        low_dt: (B, rank).
        dt_weight: (D, rank).
        dt_bias, D: (D,), or None.
        A: (D, N).
        B, C: (B, N).
        z: (B, D), optional.
        state_batch_indices: (B,), optional, as in state_update.
        out: destination (B, D).

    Returns:
        out (B, D) in x's element type.
    """
    arrays = Arrays("selective_step", "x", x)
    inputs = (
        arrays.destination("state", state),
        arrays("x", x),
        arrays("low_dt", low_dt),
        arrays("dt_weight", dt_weight),
        arrays("dt_bias", dt_bias),
        arrays("A", A),
        arrays("B", B),
        arrays("C", C),
        arrays("D", D),
        arrays("z", z),
        arrays("state_batch_indices", state_batch_indices),
    )
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().selective_step(*inputs, arrays.destination("out", out))
    return arrays.result(out)


# ------------------------------------------------------------------------------------------------- causal_conv1d


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
    """A short depthwise convolution over time, as in the Mamba blocks (Gu and Dao 2023, section 3.4).

        out_t = act(bias + sum_k weight_k x_{t-K+1+k}),  x_{<0} from initial_states, or 0

    Args:
        x: (B, D, L), real, channel-first or channel-last.
        weight: (D, K), K >= 1.
        bias: (D,), optional.
        activation: None or "none", or "silu".
        initial_states: (B, D, K-1), or (n, D, K-1) with cu_seqlens, optional.
        return_final_states: also return the last K-1 of [initial_states, x] of each row or packed sequence.
        out: destination (B, D, L), apart from x.
        final_states: destination like initial_states; may be these themselves.

    Returns:
        out (B, D, L) in x's element type; or a tuple of it and, of those that are asked for, final_states and
        states (B, M, D, K-1) with state_positions, in x's element type.
    """
    op = "causal_conv1d"
    arrays = Arrays(op, "x", x)
    _require_ndim(op, "x", x, 3, "(B, D, L)")
    _require_ndim(op, "weight", weight, 2, "(D, K)")
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
        shape = (_sequences(batch, cu_seqlens), channels, width)
        final_states = arrays.empty(shape, dtype_name(x))
    states = None
    if state_positions is not None:
        states = arrays.empty((batch, state_positions.shape[1], channels, width), dtype_name(x))
    library().causal_conv1d(
        *inputs,
        _activation(activation),
        arrays.destination("out", out),
        arrays.destination("final_states", final_states),
        arrays.destination("states", states),
    )
    return _several(*map(arrays.result, (out, final_states, states)))


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
        cache_seqlens: (B,), int32 or int64, optional: the state is a ring that is written at cache_seqlens % S.
        conv_state_indices: (B,), int32 or int64, optional: the row of conv_state of each row of x; a negative one is
            padding (output 0, state untouched).
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
        _activation(activation),
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
    _require_ndim(op, "x", x, 2, "(T, D)")
    _require_ndim(op, "cu_seqlens", cu_seqlens, 1, "(n + 1,)")
    shape = (max(cu_seqlens.shape[0] - 1, 0), x.shape[1], max(int(state_len), 0))
    out = arrays.empty(shape, dtype_name(x))
    library().causal_conv1d_varlen_states(
        arrays("x", x),
        arrays("cu_seqlens", cu_seqlens),
        int(state_len),
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
        Gradients in the shapes of the inputs: those of x and initial_states in the element types of these, those of
        weight and bias in float32.
    """
    arrays = Arrays("causal_conv1d_backward", "x", x)
    inputs = (
        arrays("x", x),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays("initial_states", initial_states),
        arrays("seq_idx", seq_idx),
        arrays("cu_seqlens", cu_seqlens),
        _activation(activation),
        arrays("dout", dout),
        arrays("dfinal_states", dfinal_states),
    )
    result = CausalConv1dGradients(
        dx=arrays.empty_like(x),
        dweight=arrays.zeros(weight.shape, arrays.real),
        dbias=None if bias is None else arrays.zeros(bias.shape, arrays.real),
        dinitial_states=None if initial_states is None else arrays.empty_like(initial_states),
    )
    library().causal_conv1d_backward(
        *inputs,
        arrays.destination("dx", result.dx),
        arrays.destination("dweight", result.dweight),
        arrays.destination("dbias", result.dbias),
        arrays.destination("dinitial_states", result.dinitial_states),
    )
    return CausalConv1dGradients(*map(arrays.result, result))


# ---------------------------------------------------------------------------------------------------------- norm


class NormGradients(NamedTuple):
    """Gradients of norm's inputs; None for those that were not given."""

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dz: Array | None


def norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    kind: str = "rms",
    residual: Array | None = None,
    z: Array | None = None,
    eps: float = 1e-6,
    group_size: int = 0,
    norm_before_gate: bool = True,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    out: Array | None = None,
    residual_out: Array | None = None,
) -> Array:
    """Normalisation over the last dimension, with the residual addition and Mamba-2's gate fused.

        r = x + residual
        rms (Zhang and Sennrich 2019):   r / sqrt(mean(r^2) + eps) * weight + bias
        layer (Ba et al. 2016):          (r - mean(r)) / sqrt(var(r) + eps) * weight + bias
        with a gate z: norm(r) * silu(z) if norm_before_gate, else norm(r * silu(z))

    Args:
        x: (..., C), real.
        weight, bias: (C,), optional.
        kind: "rms" or "layer".
        residual, z: (..., C), optional.
        group_size: channels that are normalised together; 0: all C. Must divide C.
        prenorm: also return r.
        residual_in_fp32: r in float32, whatever the element type of x.
        out, residual_out: destinations (..., C); residual_out may be residual itself.

    Returns:
        out (..., C) in x's element type, or with prenorm (out, r); r is float32 with residual_in_fp32, else of the
        element type of residual where that is given, else of x's.
    """
    arrays = Arrays("norm", "x", x)
    inputs = (
        arrays("x", x),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays("residual", residual),
        arrays("z", z),
    )
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    if residual_out is None and prenorm:
        dtype = dtype_name(x if residual is None else residual)
        residual_out = arrays.empty(x.shape, "float32" if residual_in_fp32 else dtype)
    library().norm(
        str(kind),
        *inputs,
        float(eps),
        int(group_size),
        bool(norm_before_gate),
        bool(residual_in_fp32),
        arrays.destination("out", out),
        arrays.destination("residual_out", residual_out),
    )
    return _several(*map(arrays.result, (out, residual_out)))


def rms_norm(x: Array, weight: Array | None = None, bias: Array | None = None, **options: Array) -> Array:
    """norm with kind="rms"."""
    return norm(x, weight, bias, kind="rms", **options)


def layer_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, **options: Array
) -> Array:
    """norm with kind="layer"."""
    return norm(x, weight, bias, kind="layer", **options)


def norm_backward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    dout: Array,
    dresidual: Array | None = None,
    kind: str = "rms",
    z: Array | None = None,
    eps: float = 1e-6,
    group_size: int = 0,
    norm_before_gate: bool = True,
) -> NormGradients:
    """The gradients of norm.

    Args:
        x: (..., C), what was normalised: x, or the r that prenorm returns.
        weight, bias, kind, z, eps, group_size, norm_before_gate: as given to norm.
        dout: (..., C), the gradient of out.
        dresidual: (..., C), the gradient of r where prenorm returned it, optional.

    Returns:
        dx, that of x and of residual alike, in dout's element type; dweight and dbias (C,) in float32; dz in z's.
    """
    arrays = Arrays("norm_backward", "x", x)
    inputs = (
        arrays("x", x),
        arrays("weight", weight),
        arrays("bias", bias),
        arrays("z", z),
        float(eps),
        int(group_size),
        bool(norm_before_gate),
        arrays("dout", dout),
        arrays("dresidual", dresidual),
    )
    result = NormGradients(
        dx=arrays.empty(x.shape, dtype_name(dout)),
        dweight=None if weight is None else arrays.zeros(weight.shape, arrays.real),
        dbias=None if bias is None else arrays.zeros(bias.shape, arrays.real),
        dz=None if z is None else arrays.empty_like(z),
    )
    library().norm_backward(
        str(kind),
        *inputs,
        arrays.destination("dx", result.dx),
        None,
        arrays.destination("dz", result.dz),
        arrays.destination("dweight", result.dweight),
        arrays.destination("dbias", result.dbias),
    )
    return NormGradients(*map(arrays.result, result))


# --------------------------------------------------------------------------------------------------- activations


def gated_silu(x: Array, gate: Array, *, out: Array | None = None) -> Array:
    """x * silu(gate), silu(g) = g / (1 + exp(-g)).

    Args:
        x, gate: (..., C), real.
        out: destination (..., C); may be x or gate itself.

    Returns:
        (..., C) in x's element type.
    """
    arrays = Arrays("gated_silu", "x", x)
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().gated_silu(arrays("x", x), arrays("gate", gate), arrays.destination("out", out))
    return arrays.result(out)


def gated_silu_backward(x: Array, gate: Array, dout: Array) -> tuple[Array, Array]:
    """The gradients (dx, dgate) of gated_silu, in the shapes and element types of x and gate."""
    arrays = Arrays("gated_silu_backward", "x", x)
    dx = arrays.empty(x.shape, dtype_name(x))
    dgate = arrays.empty(gate.shape, dtype_name(gate))
    library().gated_silu_backward(
        arrays("x", x),
        arrays("gate", gate),
        arrays("dout", dout),
        arrays.destination("dx", dx),
        arrays.destination("dgate", dgate),
    )
    return arrays.result(dx), arrays.result(dgate)


def gelu(x: Array, *, kind: str = "exact", out: Array | None = None) -> Array:
    """GELU (Hendrycks and Gimpel 2016).

    Args:
        x: (..., C), real.
        kind: "exact", x Phi(x), or "tanh", 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
        out: destination (..., C); may be x itself.

    Returns:
        (..., C) in x's element type.
    """
    arrays = Arrays("gelu", "x", x)
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().gelu(arrays("x", x), arrays.destination("out", out), str(kind))
    return arrays.result(out)


def gelu_backward(x: Array, dout: Array, *, kind: str = "exact") -> Array:
    """The gradient of gelu, in x's shape and element type."""
    arrays = Arrays("gelu_backward", "x", x)
    dx = arrays.empty(x.shape, dtype_name(x))
    library().gelu_backward(
        arrays("x", x), arrays("dout", dout), arrays.destination("dx", dx), str(kind)
    )
    return arrays.result(dx)


# ----------------------------------------------------------------------------------------------------- attention


class AttentionGradients(NamedTuple):
    """Gradients of attention's inputs."""

    dq: Array
    dk: Array
    dv: Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float = 0.0,
    return_logsumexp: bool = False,
    out: Array | None = None,
) -> Array:
    """softmax(scale q k^T) v with grouped queries, of one sequence; never all Lq x Lk scores at once.

    Args:
        q: (Lq, H, head_dim), real.
        k: (Lk, Hkv, head_dim); H is a multiple of Hkv, query head h uses h // (H // Hkv).
        v: (Lk, Hkv, head_dim_v).
        causal: query i sees keys 0 .. Lk - Lq + i; needs Lk >= Lq.
        scale: of the scores; 0: head_dim ** -0.5.
        return_logsumexp: also return (Lq, H) float32, of the scaled scores, which the backward takes.
        out: destination (Lq, H, head_dim_v).

    Returns:
        out (Lq, H, head_dim_v) in q's element type, or (out, logsumexp).
    """
    op = "attention"
    arrays = Arrays(op, "q", q)
    _require_ndim(op, "q", q, 3, "(Lq, H, head_dim)")
    _require_ndim(op, "v", v, 3, "(Lk, Hkv, head_dim_v)")
    inputs = (arrays("q", q), arrays("k", k), arrays("v", v))
    if out is None:
        out = arrays.empty((*q.shape[:2], v.shape[2]), dtype_name(q))
    logsumexp = arrays.empty(q.shape[:2], arrays.real) if return_logsumexp else None
    library().attention(
        *inputs,
        bool(causal),
        float(scale),
        arrays.destination("out", out),
        arrays.destination("logsumexp", logsumexp),
    )
    return _several(*map(arrays.result, (out, logsumexp)))


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    *,
    out: Array,
    logsumexp: Array,
    dout: Array,
    causal: bool = False,
    scale: float = 0.0,
) -> AttentionGradients:
    """The gradients of attention, in the shapes and element types of q, k and v; scores are recomputed block by
    block (Dao et al. 2022, "FlashAttention", algorithm 4).

    Args:
        q, k, v, causal, scale: as given to attention.
        out, logsumexp: as attention returned them.
        dout: (Lq, H, head_dim_v), the gradient of out.
    """
    arrays = Arrays("attention_backward", "q", q)
    result = AttentionGradients(
        *(arrays.empty(array.shape, dtype_name(array)) for array in (q, k, v))
    )
    library().attention_backward(
        arrays("q", q),
        arrays("k", k),
        arrays("v", v),
        bool(causal),
        float(scale),
        arrays("out", out),
        arrays("logsumexp", logsumexp),
        arrays("dout", dout),
        arrays.destination("dq", result.dq),
        arrays.destination("dk", result.dk),
        arrays.destination("dv", result.dv),
    )
    return AttentionGradients(*map(arrays.result, result))


def rotary_embedding(
    x: Array,
    positions: Array,
    *,
    dim: int,
    base: float = 10000.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """Rotary position embedding (Su et al. 2021, "RoFormer"), in place: pairs of channels turn by
    position * base ** (-2 i / dim).

    Args:
        x: (T, H, head_dim), real, turned in place.
        positions: (T,), int64 or int32.
        dim: the first `dim` channels turn; even, at most head_dim.
        base: above 0.
        interleaved: pairs (2 i, 2 i + 1) instead of (i, i + dim / 2).
        inverse: turn backwards, which is the gradient.
    """
    arrays = Arrays("rotary_embedding", "x", x)
    library().rotary_embedding(
        arrays.destination("x", x),
        arrays("positions", positions),
        int(dim),
        float(base),
        bool(interleaved),
        bool(inverse),
    )


# ----------------------------------------------------------------------------------------- linear and embedding


class LinearGradients(NamedTuple):
    """Gradients of linear's inputs; None for those that were not given."""

    dx: Array
    dweight: Array
    dbias: Array | None


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    accumulate: bool = False,
) -> Array:
    """x weight^T + bias.

    Args:
        x: (..., in), real.
        weight: (out, in), real.
        bias: (out,), optional.
        out: destination (..., out), real.
        accumulate: add to out instead.

    Returns:
        (..., out) in x's element type, or out.
    """
    op = "linear"
    arrays = Arrays(op, "x", x)
    _require_ndim(op, "weight", weight, 2, "(out, in)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("bias", bias))
    if out is None:
        if accumulate:
            raise ValueError("[linear] accumulate is given without out, expected both")
        out = arrays.empty((*x.shape[:-1], weight.shape[0]), dtype_name(x))
    library().linear(*inputs, arrays.destination("out", out), bool(accumulate))
    return arrays.result(out)


def linear_backward(
    x: Array, weight: Array, dout: Array, *, has_bias: bool = False
) -> LinearGradients:
    """The gradients of linear.

    Args:
        x: (..., in); weight: (out, in), as given to linear.
        dout: (..., out), the gradient of the result.
        has_bias: whether there was a bias.

    Returns:
        dx in x's shape and element type; dweight (out, in) and dbias (out,) in float32.
    """
    arrays = Arrays("linear_backward", "x", x)
    inputs = (arrays("x", x), arrays("weight", weight), arrays("dout", dout))
    result = LinearGradients(
        dx=arrays.empty(x.shape, dtype_name(x)),
        dweight=arrays.zeros(weight.shape, arrays.real),
        dbias=arrays.zeros((weight.shape[0],), arrays.real) if has_bias else None,
    )
    library().linear_backward(
        *inputs,
        arrays.destination("dx", result.dx),
        False,
        arrays.destination("dweight", result.dweight),
        arrays.destination("dbias", result.dbias),
    )
    return LinearGradients(*map(arrays.result, result))


def embedding(ids: Array, weight: Array) -> Array:
    """Rows of a table by id.

    Args:
        ids: (...), int64 or int32, each in [0, vocabulary). One outside raises ValueError on the CPU, and gives zeros
            on a GPU.
        weight: (vocabulary, d), float32, float64, bfloat16 or float16.

    Returns:
        weight[ids], (..., d), in weight's element type.
    """
    op = "embedding"
    arrays = Arrays(op, "weight", weight)
    _require_ndim(op, "weight", weight, 2, "(vocabulary, d)")
    out = arrays.empty((*ids.shape, weight.shape[1]), dtype_name(weight))
    library().embedding(
        arrays("ids", ids), arrays("weight", weight), arrays.destination("out", out)
    )
    return arrays.result(out)


def embedding_backward(ids: Array, dout: Array, vocab_size: int) -> Array:
    """The gradient of embedding's weight, (vocab_size, d) in float32 (float64 beside such a dout): dout summed for
    each id in the order of positions.

    Args:
        ids: (...), as given to embedding.
        dout: (..., d), the gradient of the result.
    """
    arrays = Arrays("embedding_backward", "dout", dout)
    gradient = arrays("dout", dout)
    dweight = arrays.zeros((int(vocab_size), dout.shape[-1]), arrays.real)
    library().embedding_backward(
        arrays("ids", ids), gradient, arrays.destination("dweight", dweight)
    )
    return arrays.result(dweight)


def dropout(
    x: Array,
    probability: float,
    *,
    seed: int,
    stream: int = 0,
    offset: int = 0,
    out: Array | None = None,
) -> Array:
    """Each element is kept with probability 1 - p, and then scaled by 1 / (1 - p) (Srivastava et al. 2014). The same
    call on a gradient is the backward.

    Args:
        x: any shape, real.
        probability: p, in [0, 1).
        seed, stream, offset: which elements are dropped depends on these and the element's place in row-major order
            alone (Philox4x32-10); 0 to 2^64 - 1.
        out: destination like x; may be x itself.

    Returns:
        x's shape and element type.
    """
    arrays = Arrays("dropout", "x", x)
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    library().dropout(
        arrays("x", x),
        float(probability),
        _signed("dropout", "seed", seed),
        _signed("dropout", "stream", stream),
        _signed("dropout", "offset", offset),
        arrays.destination("out", out),
    )
    return arrays.result(out)


def _signed(op: str, name: str, value: int) -> int:
    """64 bits without a sign as the C ABI takes them."""
    value = int(value)
    if not 0 <= value < 2**64:
        raise ValueError(f"[{op}] {name} is {value}, expected 0 to 2^64 - 1")
    return value - 2**64 if value >= 2**63 else value


# ------------------------------------------------------------------------------------------------- cross_entropy


class CrossEntropy(NamedTuple):
    """What the loss functions return."""

    losses: Array
    """(T,) float32, in nats, 0 where ignored."""
    logsumexp: Array
    """(T,) float32."""
    mean: float
    """Over targets that are not ignored; 0 where there are none."""
    count: int
    """Of those targets."""


class LinearCrossEntropyGradients(NamedTuple):
    """Gradients of linear_cross_entropy's inputs, and the loss itself."""

    dx: Array
    dweight: Array
    dbias: Array | None
    loss: CrossEntropy


def cross_entropy(
    logits: Array, targets: Array, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> CrossEntropy:
    """Negative log likelihood of targets under softmax(logits), in nats.

    Args:
        logits: (T, V), real or float64.
        targets: (T,), int64 or int32, each in [0, V) or ignore_index, which has no loss.
        label_smoothing: in [0, 1): that share of the target is spread evenly over V.
    """
    op = "cross_entropy"
    arrays = Arrays(op, "logits", logits)
    _require_ndim(op, "logits", logits, 2, "(T, V)")
    inputs = (arrays("logits", logits), arrays("targets", targets))
    losses = arrays.empty(logits.shape[:1], arrays.real)
    logsumexp = arrays.empty(logits.shape[:1], arrays.real)
    mean, count = library().cross_entropy(
        *inputs,
        int(ignore_index),
        float(label_smoothing),
        arrays.destination("losses", losses),
        arrays.destination("logsumexp", logsumexp),
    )
    return CrossEntropy(arrays.result(losses), arrays.result(logsumexp), float(mean), int(count))


def cross_entropy_backward(
    logits: Array,
    targets: Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logsumexp: Array | None = None,
    scale: float = 1.0,
) -> Array:
    """The gradient of cross_entropy, (T, V) in the element type of logits: scale (softmax - target), 0 where ignored.

    Args:
        logits, targets, ignore_index, label_smoothing: as given to cross_entropy.
        logsumexp: (T,), as cross_entropy returned it, optional.
        scale: the gradient of each loss: 1 / count for that of the mean.
    """
    arrays = Arrays("cross_entropy_backward", "logits", logits)
    dlogits = arrays.empty(logits.shape, dtype_name(logits))
    library().cross_entropy_backward(
        arrays("logits", logits),
        arrays("targets", targets),
        int(ignore_index),
        float(label_smoothing),
        arrays("logsumexp", logsumexp),
        float(scale),
        arrays.destination("dlogits", dlogits),
    )
    return arrays.result(dlogits)


def linear_cross_entropy(
    x: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    block: int = 0,
) -> CrossEntropy:
    """cross_entropy(x weight^T + bias, targets): head and loss fused over blocks of tokens, so that no more than
    `block` rows of logits exist at a time.

    Args:
        x: (T, d), real.
        weight: (V, d).
        targets: (T,), int64 or int32.
        bias: (V,), optional.
        ignore_index, label_smoothing: as in cross_entropy.
        block: tokens; 0: chosen from V and the device.
    """
    op = "linear_cross_entropy"
    arrays = Arrays(op, "x", x)
    _require_ndim(op, "x", x, 2, "(T, d)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("bias", bias))
    losses = arrays.empty(x.shape[:1], arrays.real)
    logsumexp = arrays.empty(x.shape[:1], arrays.real)
    mean, count = library().linear_cross_entropy(
        *inputs,
        arrays("targets", targets),
        int(ignore_index),
        float(label_smoothing),
        int(block),
        arrays.destination("losses", losses),
        arrays.destination("logsumexp", logsumexp),
    )
    return CrossEntropy(arrays.result(losses), arrays.result(logsumexp), float(mean), int(count))


def linear_cross_entropy_backward(
    x: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    block: int = 0,
    scale: float = 1.0,
) -> LinearCrossEntropyGradients:
    """Losses and gradients of linear_cross_entropy in one pass.

    Args:
        x .. block: as given to linear_cross_entropy.
        scale: the gradient of each loss.

    Returns:
        dx in x's shape and element type, dweight (V, d) and dbias (V,) in float32, and the loss.
    """
    op = "linear_cross_entropy_backward"
    arrays = Arrays(op, "x", x)
    _require_ndim(op, "x", x, 2, "(T, d)")
    inputs = (arrays("x", x), arrays("weight", weight), arrays("bias", bias))
    losses = arrays.empty(x.shape[:1], arrays.real)
    logsumexp = arrays.empty(x.shape[:1], arrays.real)
    dx = arrays.empty(x.shape, dtype_name(x))
    dweight = arrays.zeros(weight.shape, arrays.real)
    dbias = None if bias is None else arrays.zeros(bias.shape, arrays.real)
    mean, count = library().linear_cross_entropy_backward(
        *inputs,
        arrays("targets", targets),
        int(ignore_index),
        float(label_smoothing),
        int(block),
        float(scale),
        arrays.destination("dx", dx),
        arrays.destination("dweight", dweight),
        arrays.destination("dbias", dbias),
        arrays.destination("losses", losses),
        arrays.destination("logsumexp", logsumexp),
    )
    loss = CrossEntropy(arrays.result(losses), arrays.result(logsumexp), float(mean), int(count))
    return LinearCrossEntropyGradients(
        arrays.result(dx), arrays.result(dweight), arrays.result(dbias), loss
    )


# ------------------------------------------------------------------------------------------------------ sampling


def sample_rows(
    logits: Array,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    streams: Array | None = None,
    positions: Array | None = None,
    seen: Array | None = None,
    return_logprobs: bool = False,
) -> Array:
    """Draws one id from each row of logits.

    The order is: repetition penalty over the ids marked in `seen`; temperature 0 or top_k 1: the largest; top_k > 0:
    the k best, temperature, top_p; else min_p, temperature, top_p.

    Args:
        logits: (B, V), float32, bfloat16 or float16.
        vocab_size: ids at and beyond it are never drawn; None: V.
        temperature: >= 0; 0 takes the largest.
        top_k: 0: off.
        top_p: <= 0 or >= 1: off; the smallest set with that cumulative probability is kept.
        min_p: in [0, 1]; tokens whose probability is at least min_p times the largest are kept.
        repetition_penalty: > 0.
        seed: of Philox4x32-10, 0 to 2^64 - 1; row b draws from stream streams[b], else b.
        streams: (B,), int64 or int32, optional.
        positions: (B,), int64, where each generator stands, advanced by a draw; None: from 0.
        seen: (B, V), uint8, needed for a repetition penalty; the drawn id is marked in it.
        return_logprobs: also return (B,) float32, the log softmax of the raw logits at the ids.

    Returns:
        ids (B,) int64, or (ids, logprobs).
    """
    op = "sample_rows"
    arrays = Arrays(op, "logits", logits)
    _require_ndim(op, "logits", logits, 2, "(B, V)")
    batch = logits.shape[0]
    ids = arrays.empty((batch,), "int64")
    logprobs = arrays.empty((batch,), "float32") if return_logprobs else None
    if positions is None:
        positions = arrays.zeros((batch,), "int64")
    library().sample_rows(
        arrays("logits", logits),
        int(logits.shape[1] if vocab_size is None else vocab_size),
        float(temperature),
        int(top_k),
        float(top_p),
        float(min_p),
        float(repetition_penalty),
        _signed(op, "seed", seed),
        arrays("streams", streams),
        arrays.destination("positions", positions),
        arrays.destination("seen", seen),
        arrays.destination("ids", ids),
        arrays.destination("logprobs", logprobs),
    )
    return _several(*map(arrays.result, (ids, logprobs)))


def sampling_distribution(
    logits: Array,
    *,
    vocab_size: int | None = None,
    previous: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Array:
    """The distribution that a draw is made from: probabilities after penalty, filters and temperature.

    Args:
        logits: (V,), float32, on the CPU.
        previous: (n,), int64, optional: ids that the repetition penalty counts.
        vocab_size, temperature .. repetition_penalty: as in sample_rows.

    Returns:
        (V,) float32; 0 at and beyond vocab_size.
    """
    op = "sampling_distribution"
    arrays = Arrays(op, "logits", logits)
    _require_ndim(op, "logits", logits, 1, "(V,)")
    out = arrays.empty(logits.shape, "float32")
    library().sampling_distribution(
        arrays("logits", logits),
        int(logits.shape[0] if vocab_size is None else vocab_size),
        arrays("previous", previous),
        float(temperature),
        int(top_k),
        float(top_p),
        float(min_p),
        float(repetition_penalty),
        arrays.destination("out", out),
    )
    return arrays.result(out)


# ----------------------------------------------------------------------------------------------------- optimizer


def adamw(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    m: Sequence[Array],
    v: Sequence[Array],
    *,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Sequence[bool] | None = None,
    gradient_scale: float = 1.0,
    compute: Sequence[Array] | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) over all parameters, in place.

    Args:
        parameters, gradients, m, v: lists of contiguous float32 arrays; parameters and both moments are written.
        step: from 1, of the bias correction.
        weight_decay: of the parameters with `decay`: p -= lr * weight_decay * p, before the update.
        decay: one flag for each parameter; None: all decay.
        gradient_scale: gradients are multiplied by it first (clipping).
        compute: arrays of bfloat16 or float16 that receive the new parameters, rounded; optional.
    """
    if not parameters:
        return
    arrays = Arrays("adamw", "parameters", parameters[0])

    def written(name: str, group: Sequence[Array]) -> list[Array]:
        return [arrays.destination(name, array) for array in group]

    library().adamw(
        written("parameters", parameters),
        [arrays("gradients", array) for array in gradients],
        written("m", m),
        written("v", v),
        None if compute is None else written("compute", compute),
        [True] * len(parameters) if decay is None else [bool(flag) for flag in decay],
        int(step),
        float(lr),
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
        float(gradient_scale),
    )


def global_norm(arrays: Sequence[Array]) -> float:
    """sqrt of the sum of squares over all arrays (float32), summed in float64; not finite where any element is not."""
    if not arrays:
        return 0.0
    operands = Arrays("global_norm", "arrays", arrays[0])
    return float(library().global_norm([operands("arrays", array) for array in arrays]))


def update_average(averages: Sequence[Array], parameters: Sequence[Array], decay: float) -> None:
    """average = decay average + (1 - decay) parameter, in place, for lists of contiguous float32 arrays."""
    if not parameters and not averages:
        return
    operands = Arrays("update_average", "averages", (averages or parameters)[0])
    library().update_average(
        [operands.destination("averages", array) for array in averages],
        [operands("parameters", array) for array in parameters],
        float(decay),
    )
