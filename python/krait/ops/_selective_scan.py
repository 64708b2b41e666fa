"""selective_scan: Mamba-1's recurrence."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Arrays, require_array
from .._library import library
from ._common import (
    count_positions,
    count_sequences,
    device_type,
    is_complex,
    require_ndim,
    several,
)


# What forward and backward read, in the order of the compiled functions.
_OPERANDS = (
    "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "seq_idx",
    "cu_seqlens",
)  # fmt: skip


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
        B, C: constant (D, N), complex where A is, or variable (B, N, L) or (B, G, N, L), where G
            divides D and channel d uses group d // (D // G); 2L numbers, real and imaginary parts
            in turn, where A is complex.
        D, delta_bias: (D,), optional.
        z: (B, D, L), optional.
        initial_state: (B, D, N), or (n, D, N) with cu_seqlens, optional; complex where A is.
        delta_softplus: steps pass through softplus, after delta_bias.
        seq_idx, cu_seqlens, state_positions: sequences in a row, and states on the way; krait.ops
            describes them.
        reverse: t runs from L - 1 to 0, within each sequence.
        return_last_state: also return the state after the last token of each row or packed
            sequence.
        return_checkpoints: also return what spares selective_scan_backward a walk over all tokens.
        out: destination (B, D, L) in u's element type; may be u or z itself.
        last_state: destination (B, D, N) or (n, D, N); may be initial_state itself.

    Returns:
        out (B, D, L) in u's element type; or a tuple of it and, of those that are asked for,
        last_state, float32 or complex64, states (B, M, D, N) with state_positions, and checkpoints
        (K, N, D).

    Raises:
        ValueError: for shapes, element types or sequences that do not fit.
    """
    op = "selective_scan"
    arrays = Arrays(op, "u", u)
    require_ndim(op, "u", u, 3, "(B, D, L)")
    require_ndim(op, "A", A, 2, "(D, N)")
    batch, channels, length = u.shape
    d_state = A.shape[1]
    inputs = arrays.each(
        _OPERANDS, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
        cu_seqlens,
    )  # fmt: skip
    complex_ = is_complex(A)
    state_dtype = ("complex128" if arrays.double else "complex64") if complex_ else arrays.real
    if out is None:
        out = arrays.empty_like(u)
    if last_state is None and return_last_state:
        last_state = arrays.empty(
            (count_sequences(op, batch, cu_seqlens), channels, d_state), state_dtype
        )
    states = checkpoints = None
    if state_positions is not None:
        states = arrays.empty(
            (batch, count_positions(op, state_positions), channels, d_state), state_dtype
        )
    if return_checkpoints:
        if arrays.double:
            raise ValueError(
                f"[{op}] return_checkpoints is given in double precision, where the reference "
                "keeps none"
            )
        shape = library().selective_scan_checkpoints_shape(
            batch, channels, length, d_state, complex_, device_type(u)
        )
        checkpoints = arrays.empty(shape, state_dtype)
    library().selective_scan(
        *inputs,
        arrays("state_positions", state_positions),
        bool(delta_softplus),
        bool(reverse),
        arrays.destination("out", out),
        arrays.destination("last_state", last_state),
        arrays.destination("states", states),
        arrays.destination("checkpoints", checkpoints),
    )
    return several(*map(arrays.result, (out, last_state, states, checkpoints)))


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
        checkpoints: as selective_scan returned them for these arguments, optional: spares a walk
            over all tokens.

    Returns:
        Gradients in the shapes of the inputs: those of u, delta, z, initial_state and of variable B
        and C in the element types of these, those of A, D, delta_bias and of constant B and C in
        float32 (complex64). A complex gradient is d/d(re) + i d/d(im).
    """
    arrays = Arrays("selective_scan", "u", u)
    for name, array in (("A", A), ("B", B), ("C", C)):
        require_array(arrays.op, name, array)
    inputs = arrays.each(
        _OPERANDS, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
        cu_seqlens,
    )  # fmt: skip
    gradients = (arrays("dout", dout), arrays("dlast_state", dlast_state))
    state_dtype = ("complex128" if arrays.double else "complex64") if is_complex(A) else arrays.real

    def of_factor(factor: Array) -> Array | None:
        if len(factor.shape) == 2:
            return arrays.sums_like(factor, state_dtype)
        return arrays.like(factor)

    result = SelectiveScanGradients(
        du=arrays.like(u),
        ddelta=arrays.like(delta),
        dA=arrays.sums_like(A, state_dtype),
        dB=of_factor(B),
        dC=of_factor(C),
        dD=arrays.sums_like(D),
        dz=arrays.like(z),
        ddelta_bias=arrays.sums_like(delta_bias),
        dinitial_state=arrays.like(initial_state),
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
