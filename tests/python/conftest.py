"""Where all suites of this folder compute: KRAIT_TEST_DEVICE=cuda (cuda:N) is a GPU."""

from __future__ import annotations

import os

import pytest


def pytest_sessionstart() -> None:
    """Ends a session that is for a GPU where there is none; ctest knows the line that says so."""
    wanted = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
    if wanted == "cpu":
        return
    import krait

    if krait.build_info()["cuda_devices"] == 0:
        pytest.exit(f"GPU tests are skipped: there is no device {wanted}", returncode=0)
