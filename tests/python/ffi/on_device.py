"""krait.ops on a GPU, for tests that are written with NumPy arrays."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import numpy as np
import torch


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is not torch.bfloat16:
        return tensor.cpu().numpy()
    import ml_dtypes

    return tensor.view(torch.uint16).cpu().numpy().view(ml_dtypes.bfloat16)


def _to_tensor(array: np.ndarray, device: str) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16).to(device)
    # With the strides of the array where they leave no gaps.
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


# What has no kernels: the whole of a distribution, and SSD's forms for reading.
_HOST = (
    "sample", "sampling_distribution", "ssd_discretize", "ssd_undiscretize", "ssd_minimal_discrete",
)  # fmt: skip


class OnDevice:
    """`ops` with copies of NumPy arrays on `device`.

    What a call wrote is copied back, and results are NumPy arrays again.

    Double precision, which is the reference's and has no kernels, stays where it is.
    """

    def __init__(self, ops: ModuleType, device: str) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if not callable(found) or name in _HOST:
            return found
        return functools.partial(self._call, found)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        arrays: list[np.ndarray] = []
        _replace((args, kwargs), arrays.append, np.ndarray)
        if any(array.dtype.name in ("float64", "complex128") for array in arrays):
            return function(*args, **kwargs)
        there = {id(array): (array, _to_tensor(array, self._device)) for array in arrays}
        args, kwargs = _replace((args, kwargs), lambda a: there[id(a)][1], np.ndarray)
        result = function(*args, **kwargs)
        for array, tensor in there.values():
            if array.flags.writeable:
                array[...] = _to_numpy(tensor)
        given = {id(tensor): array for array, tensor in there.values()}

        def back(tensor: torch.Tensor) -> np.ndarray:
            return given[id(tensor)] if id(tensor) in given else _to_numpy(tensor)

        return _replace(result, back, torch.Tensor)


def _replace(value: Any, replacement: Any, kind: type) -> Any:
    if isinstance(value, kind):
        return replacement(value)
    if isinstance(value, dict):
        return {key: _replace(item, replacement, kind) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**_replace(fields, replacement, kind))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(item, replacement, kind) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(item, replacement, kind) for item in value)
    return value
