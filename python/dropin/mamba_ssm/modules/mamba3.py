"""Stands where upstream has Mamba-3, so that an import says what is missing."""

raise ImportError(
    "Mamba3 and its kernels are not part of krait-mamba-ssm-dropin, which offers Mamba and Mamba2"
)
