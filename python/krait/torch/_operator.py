"""How Krait's operators reach PyTorch.

Each operator exists twice, over the same kernel function. As ``torch.ops.krait.NAME`` it has
kernels for CPU and CUDA, a fake kernel and a derivative, so that ``torch.compile``,
``torch.export``, dispatch modes and tensor subclasses see one opaque node. Eager calls on plain
tensors, which are by far the most, go past the dispatcher straight to the kernel (see `examine`),
since boxing a dozen arguments costs more than a small operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from krait import _library

LIBRARY = torch.library.Library("krait", "FRAGMENT")

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state


def openmp_libraries(maps: str) -> set[str]:
    """The libraries of OpenMP, each with threads of its own, in the text of a process's maps."""
    names = {line.rpartition("/")[2] for line in maps.splitlines()}
    return {name for name in names if name.startswith(("libgomp", "libiomp", "libomp"))}


@functools.cache
def _library_beside_torch() -> Any:
    """The compiled library, its loops on the threads that PyTorch's own run on: those spin for a
    while when their work is done, and would keep other threads from the processors. Where PyTorch
    brought another OpenMP than the library found, each keeps its threads."""
    library = _library.library()
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            library.share_openmp_threads(len(openmp_libraries(file.read())) == 1)
    except OSError:
        pass
    return library


@functools.cache
def native(name: str) -> Callable[..., Any]:
    """The compiled function `name`; it writes into tensors that its caller allocated."""
    return getattr(_library_beside_torch(), name)


# What `examine` finds. 0: the call goes through the dispatcher.
PLAIN = 1
GRAD = 2  # beside PLAIN: a derivative will be asked for


def examine(tensors: Sequence[Optional[Tensor]]) -> int:
    """How a call on `tensors` is to be made: 0, PLAIN, or PLAIN | GRAD.

    0 while something watches or rewrites calls (a compiler, a dispatch mode, a functorch transform,
    a tracer) and for what is not a plain dense tensor on a CPU or a GPU: subclasses, meta tensors,
    lazily negated views, which the dispatcher resolves. Lazily conjugated views are left to
    operators with complex inputs.
    """
    if _is_dynamo_compiling():
        return 0
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if (
        _dispatch_modes()
        or _transforms_active()
        or _tracing_state() is not None
        or not _PLAIN_TYPES.issuperset(map(type, tensors))
    ):
        _require_tensors(tensors)
        return 0
    first = tensors[0]
    if first is None:
        raise TypeError("[krait.torch] found None, expected a torch.Tensor")
    if not (first.is_cpu or first.is_cuda):
        return 0
    found = PLAIN
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None:
                if t.is_neg():
                    return 0
                if t.requires_grad:
                    found = PLAIN | GRAD
    else:
        for t in tensors:
            if t is not None and t.is_neg():
                return 0
    return found


def _require_tensors(tensors: Sequence[Optional[Tensor]]) -> None:
    for t in tensors:
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"[krait.torch] found {type(t).__name__}, expected a torch.Tensor")


def _refuse_tangents(tensors: Sequence[Optional[Tensor]]) -> None:
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                "[krait.torch] forward-mode differentiation is not available, expected backward()"
            )


def wants_grad(tensors: Sequence[Optional[Tensor]]) -> bool:
    """Whether a derivative will be asked for."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers ``torch.ops.krait.NAME`` for `schema`, run by `kernel` on CPUs and GPUs."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"krait::{name}", fake, lib=LIBRARY)


def define_backward(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Like `define`, for the derivative of an operator, which has none itself and says so."""
    define(schema, kernel, fake)
    name = schema[: schema.index("(")]

    def refuse(ctx: Any, *grads: Any) -> Any:
        operator = name.removesuffix("_backward")
        raise RuntimeError(
            f"[krait.torch] {operator} was differentiated twice; it has first derivatives only: "
            "leave out create_graph=True"
        )

    torch.library.register_autograd(f"krait::{name}", refuse, lib=LIBRARY)


def check_offsets(op: str, cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"[{op}] cu_seqlens is a {type(cu_seqlens).__name__}, expected a tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"[{op}] cu_seqlens has shape {shape_of(cu_seqlens)}, expected (n + 1)")


def count_sequences(rows: int, cu_seqlens: Optional[Tensor]) -> int:
    """Of `rows` rows, or packed in the one row."""
    return rows if cu_seqlens is None else cu_seqlens.shape[0] - 1


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape))


_FLOAT32, _FLOAT64, _COMPLEX128 = torch.float32, torch.float64, torch.complex128


def sum_dtype(tensors: Sequence[Optional[Tensor]]) -> torch.dtype:
    """The dtype of sums and states: float64 where any of `tensors` is as precise, else float32."""
    for t in tensors:
        if t is not None:
            dtype = t.dtype
            if dtype is _FLOAT64 or dtype is _COMPLEX128:
                return _FLOAT64
    return _FLOAT32


def on_host(kernel: Callable[..., Any], *args: Any) -> Any:
    """Runs `kernel` on copies of CUDA tensors in host memory, where float64 has its kernels."""
    devices = [a.device for a in args if isinstance(a, Tensor) and a.is_cuda]
    results = kernel(*(a.cpu() if isinstance(a, Tensor) else a for a in args))
    if isinstance(results, Tensor):
        return results.to(devices[0])
    return type(results)(None if r is None else r.to(devices[0]) for r in results)


def like(gradient: Tensor, t: Tensor) -> Tensor:
    """A gradient in the dtype of what it belongs to."""
    return gradient if gradient.dtype is t.dtype else gradient.to(t.dtype)


def written(t: Tensor) -> None:
    """Tells autograd that `t` was changed in place past the dispatcher."""
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)
