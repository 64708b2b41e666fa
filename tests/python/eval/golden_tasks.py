"""Where the tasks and models of these tests are, and where the models compute."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
TASKS = GOLDEN / "eval" / "tasks"
MODELS = ("hf-mamba-tiny", "hf-mamba2-tiny", "hf-gptneox-tiny")
# KRAIT_TEST_DEVICE=cuda is a GPU.
DEVICE = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
