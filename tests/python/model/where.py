"""Where the models of these tests compute: KRAIT_TEST_DEVICE=cuda is a GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import krait

DEVICE = os.environ.get("KRAIT_TEST_DEVICE", "cpu")


def assert_near(model: krait.LanguageModel, found: Any, expected: Any, bound: float) -> None:
    """Two ways to one result of the model; `bound` is a CPU's.

    Weights of 16 bits, which the bundled model has, round what many tokens are multiplied with on a
    GPU, but not what one token is.
    """
    rounds = DEVICE != "cpu" and model.name == "bundled model"
    np.testing.assert_allclose(found, expected, atol=1e-2 if rounds else bound)
