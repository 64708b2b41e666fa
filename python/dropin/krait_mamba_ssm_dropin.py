"""What the packages ``mamba_ssm`` and ``causal_conv1d`` of this distribution share."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

__all__ = ["check_for_original"]


def check_for_original(package: str, distribution: str, file: str) -> None:
    """Raises an ImportError where the original ``distribution`` is installed into the folder of
    ``file``.

    The two then have overwritten each other's files, and what an import finds is a mixture. An
    original elsewhere on the path, which this package hides, is warned of.
    """
    try:
        original = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return
    folder = Path(file).resolve().parent
    found = f"{distribution} {original.version}"
    if Path(str(original.locate_file(package))).resolve() == folder:
        raise ImportError(
            f"{found} and krait-mamba-ssm-dropin are both installed into {folder} and have "
            f"overwritten each other: pip uninstall {distribution} krait-mamba-ssm-dropin, "
            "then install one of them"
        )
    warnings.warn(
        f"{package} is krait-mamba-ssm-dropin's, in {folder}; it hides {found} in "
        f"{original.locate_file(package)}",
        stacklevel=3,
    )
