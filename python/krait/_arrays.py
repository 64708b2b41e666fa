"""Arrays of any library as operands of the compiled functions, and results in the kind of the first
operand.

NumPy arrays, PyTorch tensors, CuPy arrays and everything else with ``__dlpack__`` are handed over
as they lie in memory, with any strides, on the CPU or a GPU. Nothing is copied, but
lazily conjugated and negated tensors of PyTorch, whose values lie nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from . import _arguments
from ._library import library

# An array of any of these libraries.
Array = Any


def _fail(op: str, name: str, text: str) -> NoReturn:
    raise ValueError(f"[{op}] {name} {text}")


def require_array(op: str, name: str, array: Any) -> None:
    """Raises TypeError for what is no array, None among it."""
    if not isinstance(array, np.ndarray) and not hasattr(array, "__dlpack__"):
        found = "None" if array is None else f"a {type(array).__name__}"
        raise TypeError(f"[{op}] {name} is {found}, expected a NumPy array or one with __dlpack__")


def dtype_name(array: Array) -> str:
    """The element type as NumPy would name it: "float32", "bfloat16", ..."""
    dtype = array.dtype
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


def _bfloat16() -> Any:
    try:
        import ml_dtypes  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise TypeError(
            "NumPy has no bfloat16 of its own, expected the package ml_dtypes (pip install it)"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def numpy_dtype(name: str) -> Any:
    return _bfloat16() if name == "bfloat16" else np.dtype(name)


class _Memory:
    """The memory of a read-only NumPy array, which DLPack cannot describe, as that of a writable
    one."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        described = dict(array.__array_interface__)
        described["data"] = (described["data"][0], False)
        self.__array_interface__ = described


def _numpy_operand(op: str, name: str, array: np.ndarray, *, written: bool) -> Any:
    if array.dtype.kind in "OSUMm" or array.dtype.fields:
        raise TypeError(f"[{op}] {name} has dtype {array.dtype}, expected numbers")
    if not array.dtype.isnative:
        _fail(op, name, f"has byte order {array.dtype.byteorder!r}, expected the machine's own")
    size = array.dtype.itemsize
    if array.dtype.kind in "fc" and size > (8 if array.dtype.kind == "f" else 16):
        _fail(op, name, f"has dtype {array.dtype}, expected at most double precision")
    if any(stride % size for stride in array.strides):
        _fail(
            op,
            name,
            f"has strides of {array.strides} bytes, expected multiples of {size} bytes",
        )
    bfloat16 = array.dtype.name == "bfloat16"
    if bfloat16:
        array = array.view(np.uint16)
    if not array.flags.writeable:
        if written:
            _fail(op, name, "is read-only, expected a writable destination")
        array = np.asarray(_Memory(array))
    return library().view_as_bfloat16(array) if bfloat16 else array


def _require_own_elements(op: str, name: str, array: Array) -> None:
    """Refuses a destination with several elements at one place, which writes would race for."""
    shape = tuple(array.shape)
    strides = getattr(array, "strides", None)
    if strides is None and hasattr(array, "stride"):
        strides = array.stride()
    if strides is None or 0 in shape:
        return
    for dimension, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if size > 1 and stride == 0:
            _fail(
                op,
                name,
                f"has {size} elements at one place in dimension {dimension} (it is expanded), "
                "expected a place for each",
            )


def _with_own_values(op: str, name: str, array: Array, *, written: bool) -> Array:
    """`array`, or a copy where it is a view of PyTorch's that stands for the conjugate or the
    negative of what lies in memory: DLPack would hand over what lies there."""
    if not hasattr(array, "resolve_conj") or not (array.is_conj() or array.is_neg()):
        return array
    if written:
        view = "conjugating" if array.is_conj() else "negating"
        _fail(op, name, f"is a {view} view, expected a destination whose memory holds its values")
    return array.resolve_conj().resolve_neg()


class Arrays:
    """The arrays of one call of `op`. Results are made in the kind and on the device of `like`."""

    def __init__(self, op: str, like_name: str, like: Array) -> None:
        self.op = op
        require_array(op, like_name, like)
        self._like = like
        self._library_name = type(like).__module__.partition(".")[0]
        # Whether any operand asks for double precision.
        self.double = False

    def __call__(self, name: str, array: Array | None) -> Any:
        """`array` as an operand that is read, or None."""
        return self._operand(name, array, written=False)

    def given(self, name: str, array: Array) -> Any:
        """`array` as an operand that is read and may not be None."""
        require_array(self.op, name, array)
        return self._operand(name, array, written=False)

    def integer(self, name: str, value: Any) -> int:
        """An argument beside the arrays, of 64 bits; TypeError for what is no integer."""
        return _arguments.integer(f"[{self.op}] {name}", value)

    def number(self, name: str, value: Any) -> float:
        """The same as a float; TypeError for what is no number."""
        return _arguments.number(f"[{self.op}] {name}", value)

    def each(self, names: Sequence[str], *given: Array | None) -> tuple[Any, ...]:
        """Several operands that are read, by their names."""
        return tuple(self(name, array) for name, array in zip(names, given, strict=True))

    def destination(self, name: str, array: Array | None) -> Any:
        """`array` as an operand that is written, or None."""
        if hasattr(array, "shape"):
            _require_own_elements(self.op, name, array)
        return self._operand(name, array, written=True)

    def _operand(self, name: str, array: Array | None, *, written: bool) -> Any:
        if array is None:
            return None
        if isinstance(array, np.ndarray):
            self.double = self.double or array.dtype.name in ("float64", "complex128")
            return _numpy_operand(self.op, name, array, written=written)
        require_array(self.op, name, array)
        self.double = self.double or dtype_name(array) in ("float64", "complex128")
        if getattr(array, "requires_grad", False):
            array = array.detach()
        return _with_own_values(self.op, name, array, written=written)

    @property
    def real(self) -> str:
        """The element type of states and of gradients that are summed: f32, or f64 in double
        precision."""
        return "float64" if self.double else "float32"

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """A new, uninitialised destination, contiguous."""
        size = tuple(int(n) for n in shape)
        if self._library_name == "torch":
            import torch

            return torch.empty(size, dtype=getattr(torch, dtype), device=self._like.device)
        if self._library_name == "cupy":
            import cupy  # type: ignore[import-not-found, unused-ignore]

            with cupy.cuda.Device(self._like.device.id):
                return cupy.empty(size, dtype=numpy_dtype(dtype))
        self._require_cpu()
        return np.empty(size, dtype=numpy_dtype(dtype))

    def zeros(self, shape: Sequence[int], dtype: str) -> Array:
        """A new destination of zeros, contiguous."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def empty_like(self, array: Array) -> Array:
        """A new destination of the shape and element type of `array`, with its dimensions in memory
        in the same order where its library can tell it."""
        if isinstance(array, np.ndarray) and isinstance(self._like, np.ndarray):
            return np.empty_like(array)
        if self._library_name == "torch" and type(array).__module__.partition(".")[0] == "torch":
            import torch

            return torch.empty_like(array, requires_grad=False)
        return self.empty(array.shape, dtype_name(array))

    def like(self, array: Array | None) -> Array | None:
        """`empty_like` of an operand that may be absent."""
        return None if array is None else self.empty_like(array)

    def sums_like(self, array: Array | None, dtype: str | None = None) -> Array | None:
        """Zeros in the shape of an operand that may be absent, for what is added up: of the type
        `dtype`, or `real`."""
        return None if array is None else self.zeros(array.shape, dtype or self.real)

    def result(self, buffer: Array | None) -> Array | None:
        """A destination that was made by `empty`, as an array of the library of `like`."""
        if not isinstance(buffer, np.ndarray) or isinstance(self._like, np.ndarray):
            return buffer
        namespace = getattr(self._like, "__array_namespace__", None)
        module = namespace() if namespace is not None else sys.modules.get(self._library_name)
        from_dlpack = getattr(module, "from_dlpack", None)
        if from_dlpack is None or self._library_name == "tvm_ffi":
            return buffer
        if buffer.dtype.name != "bfloat16":
            return from_dlpack(buffer)
        return from_dlpack(library().view_as_bfloat16(buffer.view(np.uint16)))

    def _require_cpu(self) -> None:
        device = getattr(self._like, "__dlpack_device__", None)
        kind = 1 if device is None else int(device()[0])
        if kind != 1:
            raise TypeError(
                f"[{self.op}] cannot make arrays of {type(self._like).__name__} on a GPU, expected "
                "PyTorch, CuPy, or destinations for all results"
            )
