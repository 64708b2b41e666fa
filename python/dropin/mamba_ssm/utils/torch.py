"""Decorators for functions under autocast."""

from __future__ import annotations

from functools import wraps
from typing import Callable

import torch

__all__ = ["custom_amp_decorator", "custom_bwd", "custom_fwd"]


def custom_amp_decorator(dec: Callable, cuda_amp_deprecated: bool):
    """``dec``, a ``custom_fwd`` or ``custom_bwd``, for CUDA, of torch.amp where that has them."""

    @wraps(dec)
    def decorator(*args, **kwargs):
        if cuda_amp_deprecated:
            kwargs["device_type"] = "cuda"
        return dec(*args, **kwargs)

    return decorator


_in_amp = hasattr(torch.amp, "custom_fwd")
_source = torch.amp if _in_amp else torch.cuda.amp
custom_fwd = custom_amp_decorator(_source.custom_fwd, _in_amp)
custom_bwd = custom_amp_decorator(_source.custom_bwd, _in_amp)
