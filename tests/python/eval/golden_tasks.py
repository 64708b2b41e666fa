"""Where the tasks and models of these tests are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
TASKS = GOLDEN / "eval" / "tasks"
MODELS = ("hf-mamba-tiny", "hf-mamba2-tiny", "hf-gptneox-tiny")
