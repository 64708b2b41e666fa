"""Token ids as callers have them, and as the library takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Ids", "as_ids", "as_rows", "is_row", "pack"]

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


def as_ids(ids: Any, name: str = "ids") -> npt.NDArray[np.int64]:
    """Integers of any kind as a contiguous array of int64; raises TypeError for anything else."""
    try:
        array = np.asarray(ids)
    except ValueError:
        raise ValueError(
            f"{name} are rows of different lengths, or rows beside ids, expected ids or equal rows"
        ) from None
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)  # of an empty list
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} have dtype {array.dtype}, expected integers: token ids")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} have the id {int(array.max())}, which is no token id")
    return np.ascontiguousarray(array, dtype=np.int64)


def is_row(ids: Any) -> bool:
    """Whether these are the ids of one sequence, not of several."""
    if hasattr(ids, "ndim"):
        return int(ids.ndim) < 2
    if not isinstance(ids, Sequence):
        raise TypeError(f"ids are {type(ids).__name__}, expected a list or an array of token ids")
    return (
        len(ids) == 0
        or not (isinstance(ids[0], Sequence) or hasattr(ids[0], "ndim"))
        or (hasattr(ids[0], "ndim") and int(ids[0].ndim) == 0)
    )


def as_rows(ids: Any, name: str = "ids") -> list[npt.NDArray[np.int64]]:
    """The ids of several sequences, of any lengths."""
    rows = [as_ids(row, name) for row in ids]
    for row in rows:
        if row.ndim != 1:
            raise ValueError(f"{name} have a row of shape {row.shape}, expected rows of token ids")
    return rows


def pack(
    rows: Sequence[npt.NDArray[np.int64]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows one after the other (T), and where each begins and the last ends (n + 1)."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return flat, offsets
