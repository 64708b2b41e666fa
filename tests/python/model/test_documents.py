"""What the documentation shows, run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_of_the_guide(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^([^\n]*)\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [code for before, code in blocks if not before.endswith("<!-- needs the network -->")]
    assert len(blocks) > 5
    out = run("\n".join(blocks), tmp_path)
    assert "StepReport(step=10" in out
    assert os.listdir(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    "file", ["README.md", "python/README.md", "python/dropin/README.md"], ids=lambda file: file
)
def test_the_code_of_readmes(tmp_path: Path, file: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), re.M | re.S)
    assert blocks
    run("\n".join(blocks), tmp_path)


def test_the_example_of_generation(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "python" / "generate.py").read_text()
    out = run(code, tmp_path)
    assert "bundled model: 6 x Mamba2" in out and "bits per byte" in out
    assert out.rstrip().endswith("bytes hold all of it")
