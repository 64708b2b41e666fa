"""The compiled library behind the package: where it is, and how it is loaded."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from krait import _arguments

_NAME = "libkrait_ffi.so"
_lock = threading.Lock()
_library: Any = None


def library_path() -> Path:
    """The file that is loaded: that of the environment variable KRAIT_LIBRARY, else the one beside
    the package.

    Raises ImportError where neither is there.
    """
    chosen = os.environ.get("KRAIT_LIBRARY")
    path = Path(chosen) if chosen else Path(__file__).with_name(_NAME)
    if not path.is_file():
        hint = (
            "KRAIT_LIBRARY names no file"
            if chosen
            else "the package is not built: install it, or set KRAIT_LIBRARY to a built one"
        )
        raise ImportError(f"krait: {path} does not exist; {hint}")
    return path


def library() -> Any:
    """The functions of libkrait_ffi (src/ffi/README.md lists them), loaded at the first call."""
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                _library = _load()
    return _library


class _NoTorch(importlib.abc.MetaPathFinder):
    """Finds no torch for the thread that made it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """What is imported meanwhile by this thread does without torch, unless that is there already.

    tvm_ffi imports torch wherever it is installed, for seconds and hundreds of megabytes.
    """
    finder = _NoTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _tensors_need_tvm_ffi() -> bool:
    """Whether tvm_ffi has to see torch to take its tensors and their streams: before 2.11 they do
    not all describe themselves (``__dlpack_c_exchange_api__``)."""
    try:
        major, minor = version("torch").split(".")[:2]
        return (int(major), int(minor)) < (2, 11)
    except PackageNotFoundError:
        return False
    except ValueError:
        return True


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """What is imported meanwhile compiles nothing for tensors that do not describe themselves.

    tvm_ffi would, for half a minute, where the package torch-c-dlpack-ext does not bring it. Without
    either a call costs some microseconds more.
    """
    switch = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    if switch in os.environ or importlib.util.find_spec("torch_c_dlpack_ext") is not None:
        yield
        return
    os.environ[switch] = "1"
    try:
        yield
    finally:
        os.environ.pop(switch, None)


def _trust_certifi(library: Any) -> None:
    """Where neither the environment nor the machine has trusted certificates, those of certifi are
    taken, if that is installed: for downloads by this process and those that it starts."""
    if not library.has_certificates() and importlib.util.find_spec("certifi") is not None:
        import certifi

        os.environ["SSL_CERT_FILE"] = certifi.where()


def _load() -> Any:
    with _without_compiler() if _tensors_need_tvm_ffi() else without_torch():
        import tvm_ffi

    # Exceptions that tvm_ffi does not know by itself.
    for exception in (FileNotFoundError, OSError, ConnectionError, KeyboardInterrupt):
        tvm_ffi.error.register_error(exception.__name__, exception)
    loaded = tvm_ffi.load_module(str(library_path()))
    _trust_certifi(loaded)
    return loaded


def set_num_threads(threads: int) -> None:
    """Sets the number of CPU threads of every operator and model from now on.

    Args:
        threads: 1 to 4096, or 0 for one thread for each processor.

    Raises:
        ValueError: for other numbers.
        TypeError: for what is no integer.
    """
    library().set_num_threads(_arguments.integer("threads", threads))


def get_num_threads() -> int:
    """The number of CPU threads: that of set_num_threads, else of KRAIT_NUM_THREADS or
    OMP_NUM_THREADS in the environment, else of processors that this process may use. Where none of
    these is given, operators beside krait.torch take PyTorch's number."""
    return int(library().get_num_threads())


def release_memory() -> None:
    """Gives scratch memory that operators keep for their next call back to the system and to the
    GPUs. What is in use is not touched; the next calls take new memory."""
    library().release_memory()


def build_info() -> dict[str, Any]:
    """What the compiled library is: version, path, simd (the instruction set in use), onednn (its
    version, or "" without it), cuda (whether it has kernels for GPUs), cuda_devices (how many can
    be used)."""
    lib = library()
    return {
        "version": str(lib.version()),
        "path": str(library_path()),
        "simd": str(lib.simd_target()),
        "onednn": str(lib.onednn_version()),
        "cuda": bool(lib.with_cuda()),
        "cuda_devices": int(lib.cuda_device_count()),
    }
