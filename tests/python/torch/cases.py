"""Inputs of operators, by name, and the device that the tests run on."""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("KRAIT_TEST_DEVICE", "cpu")


def scan_inputs(B=2, D=6, L=9, N=3, G=1, dtype=torch.float64, complex=False, constant=""):
    """u, delta, A, B, C, D, z, delta_bias; B or C constant where `constant` names them."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    A = -torch.rand(D, N, dtype=wide) - 0.2
    if complex:
        A = torch.complex(A, torch.randn(D, N, dtype=wide))

    def coefficients(name):
        if name in constant:
            return torch.randn(D, N, dtype=A.dtype)
        t = torch.randn(B, G, N, 2 * L if complex else L, dtype=dtype)
        return t if G > 1 else t.squeeze(1)

    return [
        torch.randn(B, D, L, dtype=dtype),
        torch.rand(B, D, L, dtype=dtype),
        A,
        coefficients("B"),
        coefficients("C"),
        torch.randn(D, dtype=wide),
        torch.randn(B, D, L, dtype=dtype),
        torch.randn(D, dtype=wide),
    ]


def ssd_inputs(B=2, L=9, H=4, P=3, N=5, G=2, dtype=torch.float64, wide_D=False):
    """x, dt, A, B, C, D, z, dt_bias."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return [
        torch.randn(B, L, H, P, dtype=dtype),
        torch.rand(B, L, H, dtype=dtype),
        -torch.rand(H, dtype=wide) - 0.2,
        torch.randn(B, L, G, N, dtype=dtype),
        torch.randn(B, L, G, N, dtype=dtype),
        torch.randn((H, P) if wide_D else (H,), dtype=wide),
        torch.randn(B, L, H, P, dtype=dtype),
        torch.randn(H, dtype=wide),
    ]


def leaves(tensors):
    """The same tensors, each asking for its gradient."""
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
