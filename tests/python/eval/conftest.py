"""Checkpoints and tasks of the tests of evaluation."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_tasks import GOLDEN, TASKS

# No test goes to the network, nor does the harness start processes for a bootstrap of some numbers.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DISABLE_MULTIPROC="1",
)

os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A golden model with the tokenizer that the golden ones lack."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            made[name].mkdir()
            for file in ("config.json", "model.safetensors"):
                shutil.copy(GOLDEN / name / file, made[name])
            for path in (GOLDEN / "eval").glob("tokenizer*.json"):
                shutil.copy(path, made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def golden_runs() -> list[dict[str, Any]]:
    """What the harness measured with transformers: see golden/eval/make.py."""
    runs: list[dict[str, Any]] = json.loads((GOLDEN / "eval" / "results.json").read_text())
    return runs


@pytest.fixture(scope="session")
def harness_tasks() -> Callable[[], list[dict[str, Any]]]:
    """The tasks as the harness takes them, with paths that do not depend on where a test runs."""
    tasks = []
    for path in sorted(TASKS.glob("*.json")):
        task = json.loads(path.read_text())
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {k: str(TASKS / v) for k, v in files.items()}
        tasks.append(task)
    return lambda: copy.deepcopy(tasks)


@pytest.fixture(scope="session")
def harness_directory(
    tmp_path_factory: pytest.TempPathFactory, harness_tasks: Callable[[], list[dict[str, Any]]]
) -> Path:
    """The same as files for --include_path: JSON is YAML."""
    directory = tmp_path_factory.mktemp("tasks")
    for task in harness_tasks():
        (directory / f"{task['task']}.yaml").write_text(json.dumps(task))
    return directory


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of data sets of their own, so that no run sees another's."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("huggingface"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
