"""The examples of PyTorch, as a user runs them, in few steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(script, *arguments):
    """What the script prints last of all, and the numbers in it."""
    command = [sys.executable, ROOT / "examples" / "python" / script, *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text, pattern):
    found = re.search(pattern, text)
    assert found, text
    return [float(n) for n in found.groups()]


def test_finetuning(tmp_path, golden):
    text = ROOT / "README.md"
    model = golden / "shakespeare"
    printed = run(
        "finetune.py", "--model", model, "--text", text, "--steps", 25, "--save", tmp_path
    )
    before, after = numbers(printed, r"held-out loss: ([\d.]+) before, ([\d.]+) after")
    assert after < before - 1
    # The checkpoint that it wrote is one to begin with.
    again = run("finetune.py", "--model", tmp_path, "--text", text, "--steps", 4)
    assert abs(numbers(again, r"held-out loss: ([\d.]+) before")[0] - after) < 0.01


def test_bidirectional_classifier():
    printed = run("bidirectional_classifier.py", "--steps", 60)
    left, both = numbers(printed, r"accuracy: ([\d.]+)% from the left alone, ([\d.]+)% both ways")
    assert both > left + 5


def test_forecasting():
    printed = run("forecasting.py", "--steps", 60)
    error, naive = numbers(printed, r"steps: ([\d.]+); of the last value repeated: ([\d.]+)")
    assert error < 0.7 * naive
