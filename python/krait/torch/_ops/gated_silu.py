"""x silu(gate), the elementwise part of a gated MLP, as a differentiable PyTorch operator."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import Function

from .._operator import GRAD, define, define_backward, examine, native, on_host, sum_dtype


def _forward(x: Tensor, gate: Tensor) -> Tensor:
    if x.is_cuda and sum_dtype((x, gate)) is torch.float64:
        return on_host(_forward, x, gate)
    out = torch.empty_like(x)
    native("gated_silu")(x, gate, out)
    return out


def _backward(wanted: list[bool], dout: Tensor, x: Tensor, gate: Tensor) -> list[Tensor]:
    if x.is_cuda and sum_dtype((x, gate)) is torch.float64:
        return on_host(_backward, wanted, dout, x, gate)
    dx = torch.empty_like(x) if wanted[0] else None
    dgate = torch.empty_like(gate) if wanted[1] else None
    native("gated_silu_backward")(x, gate, dout, dx, dgate)
    return [g for g in (dx, dgate) if g is not None]


define("gated_silu(Tensor x, Tensor gate) -> Tensor", _forward, lambda x, gate: torch.empty_like(x))
define_backward(
    "gated_silu_backward(bool[] wanted, Tensor dout, Tensor x, Tensor gate) -> Tensor[]",
    _backward,
    lambda wanted, dout, *inputs: [torch.empty_like(t) for w, t in zip(wanted, inputs) if w],
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any = None) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Optional[Tensor], ...]:
    inputs = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad)
    eager = not torch.is_grad_enabled() and examine((*inputs, dout))
    compute: Any = _backward if eager else torch.ops.krait.gated_silu_backward
    grads = iter(compute(wanted, dout, *inputs))
    return tuple(next(grads) if want else None for want in wanted)


torch.library.register_autograd("krait::gated_silu", _gradients, setup_context=_save)


class _GatedSilu(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return _forward(*inputs)

    backward = staticmethod(_gradients)


def gated_silu(x: Tensor, gate: Tensor) -> Tensor:
    """x silu(gate), with silu(g) = g / (1 + exp(-g)) (Shazeer 2020, "GLU variants improve
    Transformer").

    Differentiable once in both inputs.

    Args:
        x: (..., C), any strides; float32, bfloat16, float16 or float64.
        gate: of x's shape.

    Returns:
        (..., C) in x's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    how = examine((x, gate))
    if not how:
        return torch.ops.krait.gated_silu(x, gate)
    return _GatedSilu.apply(x, gate) if how & GRAD else _forward(x, gate)
