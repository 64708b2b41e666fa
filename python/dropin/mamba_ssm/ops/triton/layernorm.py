"""The name that releases of mamba_ssm before 2.0 had for ``layer_norm``."""

from .layer_norm import (  # noqa: F401
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
