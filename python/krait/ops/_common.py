"""What the operators share."""

from __future__ import annotations

from .._arrays import Array, dtype_name, require_array

INFINITY = float("inf")


def count_sequences(op: str, batch: int, cu_seqlens: Array | None) -> int:
    """Of rows, or packed in the one row."""
    if cu_seqlens is None:
        return batch
    require_ndim(op, "cu_seqlens", cu_seqlens, 1, "(n + 1,)")
    return max(int(cu_seqlens.shape[0]) - 1, 0)


def count_positions(op: str, state_positions: Array) -> int:
    """Of wanted states in each row."""
    require_ndim(op, "state_positions", state_positions, 2, "(B, M)")
    return int(state_positions.shape[1])


def is_complex(array: Array) -> bool:
    return dtype_name(array).startswith("complex")


def limits(op: str, dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The two numbers that steps are clamped to."""
    try:
        low, high = dt_limit
        return float(low), float(high)
    except (TypeError, ValueError):
        raise TypeError(f"[{op}] dt_limit is {dt_limit!r}, expected two numbers") from None


def require_ndim(op: str, name: str, array: Array, ndim: int, shape: str) -> None:
    require_array(op, name, array)
    if len(array.shape) != ndim:
        raise ValueError(f"[{op}] {name} has shape {tuple(array.shape)}, expected {shape}")


def several(out: Array, *others: Array | None) -> Array:
    """`out`, or a tuple with those of `others` that are there."""
    wanted = [other for other in others if other is not None]
    return (out, *wanted) if wanted else out


def activation_name(activation: str | None) -> str:
    return "none" if activation is None else str(activation)


def device_type(array: Array) -> int:
    device = getattr(array, "__dlpack_device__", None)
    return 1 if device is None else int(device()[0])
