"""The wheel, and what happens beside the original packages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3] / "python" / "dropin"


def install(site: Path, package: str, distribution: str) -> Path:
    """What an installed original leaves on the path."""
    (site / package).mkdir(parents=True)
    information = site / f"{package}-2.2.4.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.2.4\n"
    )
    return site / package / "__init__.py"


@pytest.mark.parametrize("package, distribution", [
    ("mamba_ssm", "mamba-ssm"),
    ("causal_conv1d", "causal_conv1d"),
])  # fmt: skip
def test_original_in_the_same_folder(
    package: str, distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from krait_mamba_ssm_dropin import check_for_original

    file = install(tmp_path, package, distribution)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = package.replace("_", "-")
    with pytest.raises(ImportError, match=f"{name} 2.2.4 and krait-mamba-ssm-dropin are both"):
        check_for_original(package, name, str(file))


def test_original_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from krait_mamba_ssm_dropin import check_for_original

    install(tmp_path / "other", "mamba_ssm", "mamba-ssm")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="it hides mamba-ssm 2.2.4"):
        check_for_original("mamba_ssm", "mamba-ssm", str(tmp_path / "ours" / "__init__.py"))


def test_no_original(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from krait_mamba_ssm_dropin import check_for_original

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_for_original("mamba_ssm", "no-such-distribution", str(tmp_path / "__init__.py"))


def test_import_says_so(tmp_path: Path) -> None:
    """Our package with the original's metadata beside it."""
    install(tmp_path, "mamba_ssm", "mamba-ssm")
    for file in ("mamba_ssm/__init__.py", "krait_mamba_ssm_dropin.py"):
        (tmp_path / file).write_bytes((PROJECT / file).read_bytes())
    result = subprocess.run(
        [sys.executable, "-c", "import mamba_ssm"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: mamba-ssm 2.2.4 and krait-mamba-ssm-dropin are both installed"
    )
    assert "pip uninstall mamba-ssm krait-mamba-ssm-dropin" in last


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="the wheel is built by setuptools"
)
def test_wheel(tmp_path: Path) -> None:
    """Pure Python, everything in it, and a version that those accept who ask the distribution."""
    from packaging.metadata import parse_email
    from packaging.version import Version

    source = tmp_path / "source"
    for file in PROJECT.rglob("*"):
        kept = file.suffix in (".py", ".md", ".toml") and "build" not in file.parts
        if file.is_file() and kept:
            target = source / file.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if n.endswith(".py")}
        (metadata_name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        metadata, _ = parse_email(archive.read(metadata_name))
        (top_level_name,) = (n for n in archive.namelist() if n.endswith("/top_level.txt"))
        top_level = archive.read(top_level_name).decode().split()
    assert names == {
        str(f.relative_to(source)) for f in source.rglob("*.py") if "build" not in f.parts
    }
    assert sorted(top_level) == ["causal_conv1d", "krait_mamba_ssm_dropin", "mamba_ssm"]
    assert {"krait-ssm", "torch>=2.4"} <= set(metadata["requires_dist"])
    assert Version(metadata["version"]) >= Version("2.3.2")
