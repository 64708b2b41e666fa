"""ssd: Mamba-2's state-space duality, and one step of either recurrence."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import INFINITY, count_positions, count_sequences, limits, require_ndim, several


# What forward and backward read, in the order of the compiled functions.
_OPERANDS = (
    "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens",
)  # fmt: skip


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
    dt_limit: tuple[float, float] = (0.0, INFINITY),
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
        seq_idx, cu_seqlens, state_positions: sequences in a row, and states on the way; krait.ops
            describes them.
        dt_softplus: steps pass through softplus, after dt_bias.
        dt_limit: (low, high), after softplus.
        reverse: t runs from L - 1 to 0, within each sequence.
        chunk_size: tokens of a chunk, 0: chosen from the shape. The result depends on it by
            rounding only.
        return_final_states: also return the state after the last token of each row or packed
            sequence.
        out: destination (B, L, H, P), apart from the inputs.
        final_states: destination like initial_states; may be these themselves.

    Returns:
        out (B, L, H, P) in x's element type; or a tuple of it and, of those that are asked for,
        final_states and states (B, M, H, P, N) with state_positions, float32.

    Raises:
        ValueError: for shapes, element types or sequences that do not fit.
    """
    op = "ssd"
    arrays = Arrays(op, "x", x)
    require_ndim(op, "x", x, 4, "(B, L, H, P)")
    require_ndim(op, "B", B, 4, "(B, L, G, N)")
    batch, _, heads, headdim = x.shape
    d_state = B.shape[3]
    inputs = arrays.each(
        _OPERANDS, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
    )  # fmt: skip
    if out is None:
        out = arrays.empty(x.shape, dtype_name(x))
    if final_states is None and return_final_states:
        shape = (count_sequences(op, batch, cu_seqlens), heads, headdim, d_state)
        final_states = arrays.empty(shape, arrays.real)
    states = None
    if state_positions is not None:
        count = count_positions(op, state_positions)
        states = arrays.empty((batch, count, heads, headdim, d_state), arrays.real)
    library().ssd(
        *inputs,
        arrays("state_positions", state_positions),
        bool(dt_softplus),
        *limits("ssd", dt_limit),
        bool(reverse),
        arrays.integer("chunk_size", chunk_size),
        arrays.destination("out", out),
        arrays.destination("final_states", final_states),
        arrays.destination("states", states),
    )
    return several(*map(arrays.result, (out, final_states, states)))


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
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    reverse: bool = False,
    chunk_size: int = 0,
) -> SsdGradients:
    """The gradients of ssd.

    Args:
        x .. dt_bias, initial_states .. chunk_size: as given to ssd.
        dout: (B, L, H, P), the gradient of out.
        dfinal_states: the gradient of final_states, optional.

    Returns:
        Gradients in the shapes of the inputs: those of x, dt, B, C, z and initial_states in the
        element types of these, those of A, D and dt_bias in float32. ddt is 0 where dt_limit
        clamps.
    """
    arrays = Arrays("ssd", "x", x)
    inputs = arrays.each(
        _OPERANDS, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
    )  # fmt: skip
    gradients = (arrays("dout", dout), arrays("dfinal_states", dfinal_states))

    result = SsdGradients(
        dx=arrays.like(x),
        ddt=arrays.like(dt),
        dA=arrays.sums_like(A),
        dB=arrays.like(B),
        dC=arrays.like(C),
        dD=arrays.sums_like(D),
        dz=arrays.like(z),
        ddt_bias=arrays.sums_like(dt_bias),
        dinitial_states=arrays.like(initial_states),
    )
    library().ssd_backward(
        *inputs,
        bool(dt_softplus),
        *limits("ssd", dt_limit),
        bool(reverse),
        arrays.integer("chunk_size", chunk_size),
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
    require_ndim(op, "X", X, 4, "(B, L, H, P)")
    require_ndim(op, "B", B, 4, "(B, L, H, N)")
    batch, _, heads, headdim = X.shape
    inputs = (arrays("X", X), arrays("A", A), arrays("B", B), arrays("C", C))
    initial = arrays("initial_states", initial_states)
    out = arrays.empty(X.shape, dtype_name(X))
    final_state = arrays.empty((batch, heads, headdim, B.shape[3]), arrays.real)
    library().ssd_minimal_discrete(
        *inputs,
        arrays.integer("block_len", block_len),
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
    inputs = (arrays("x", x), arrays.given("d", d), arrays("A", A))
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
    inputs = (arrays("X", X), arrays("A", A), arrays.given("d", d))
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
    dt_limit: tuple[float, float] = (0.0, INFINITY),
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
        dt_softplus, dt_limit: as in ssd.
        state_batch_indices: (B,), int32 or int64, optional: the row of state of each entry, all
            distinct; a negative one is padding (output 0, no state touched). Without it R = B.
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
        *limits("state_update", dt_limit),
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
    """What stands between x_proj and out_proj of a Mamba-1 block that takes one token of each
    sequence: state_update with dt_softplus and dt = low_dt dt_weight^T.

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
