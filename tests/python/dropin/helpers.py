"""What the tests of the drop-in share."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Relative and absolute difference allowed from a reference computed in float32 on the same inputs.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (3e-4, 1e-3),
    torch.float16: (3e-3, 5e-3),
    torch.bfloat16: (1e-2, 5e-2),
}


def close(found: Any, expected: Any, dtype: torch.dtype = torch.float32, what: str = "") -> None:
    """Compares tensors, or tuples of them, by the tolerance of dtype."""
    if isinstance(expected, (tuple, list)):
        assert isinstance(found, (tuple, list)) and len(found) == len(expected), what
        for number, (f, e) in enumerate(zip(found, expected)):
            close(f, e, dtype, f"{what}[{number}]")
        return
    if expected is None:
        assert found is None, what
        return
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    rtol, atol = TOLERANCE[dtype]
    if found.is_complex() or expected.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}"
    )


def leaves(tensors: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """Copies that collect gradients of their own."""
    return [
        None
        if t is None
        else t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex())
        for t in tensors
    ]


def differentiated(
    function: Callable[..., Any], inputs: Sequence[Optional[Tensor]], seed: int = 1
) -> tuple[list[Tensor], list[Optional[Tensor]]]:
    """Outputs of function(*inputs), and gradients of its inputs for random ones of its outputs."""
    inputs = leaves(inputs)
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    grads = []
    for out in outputs:
        grad = torch.randn(
            torch.view_as_real(out).shape if out.is_complex() else out.shape, generator=generator
        )
        grads.append((torch.view_as_complex(grad) if out.is_complex() else grad).to(out.dtype))
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads))
    gradients = [next(found) if t is not None and t.requires_grad else None for t in inputs]
    return [o.detach() for o in outputs], gradients
