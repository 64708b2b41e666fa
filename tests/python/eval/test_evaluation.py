"""krait.evaluate and krait.likelihoods."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_tasks import DEVICE, MODELS, TASKS

import krait

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_harness_over_transformers(
    name: str, checkpoint: Checkpoint, golden_runs: list[dict[str, Any]]
) -> None:
    model = krait.LanguageModel.from_pretrained(checkpoint(name), device=DEVICE)
    runs = [run for run in golden_runs if run["model"] == name]
    assert len(runs) == 2
    for run in runs:
        results = krait.evaluate(model, TASKS, max_length=run["max_length"])
        assert sorted(result.name for result in results) == sorted(run["tasks"])
        for result in results:
            wanted = run["tasks"][result.name]
            found = {metric: m.value for metric, m in result.metrics.items()}
            found |= {
                f"{metric}_stderr": m.standard_error
                for metric, m in result.metrics.items()
                if m.standard_error is not None
            }
            assert found == pytest.approx(wanted["metrics"], rel=1e-4, abs=1e-4)
            for document, golden in zip(result.documents, wanted["documents"], strict=True):
                values = [request.log_likelihood for request in document.requests]
                assert values == pytest.approx(golden["log_likelihoods"], abs=1e-4)
                assert [request.is_greedy for request in document.requests] == golden["is_greedy"]
                assert document.metrics.keys() == result.metrics.keys()


def test_the_program_of_the_package_agrees(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("hf-mamba-tiny")
    output = tmp_path / "out.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "krait",
            "eval",
            "--model",
            directory,
            "--tasks",
            TASKS,
            "--output",
            output,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    program = json.loads(output.read_text())["results"]
    for result in krait.evaluate(
        krait.LanguageModel.from_pretrained(directory, device=DEVICE), TASKS
    ):
        for metric, found in result.metrics.items():
            assert program[result.name][f"{metric},none"] == pytest.approx(found.value, rel=1e-6)


def test_limit_progress_and_options(checkpoint: Checkpoint) -> None:
    model = krait.LanguageModel.from_pretrained(checkpoint("hf-mamba-tiny"), device=DEVICE)
    seen: list[tuple[str, int, int]] = []
    (result,) = krait.evaluate(
        model,
        [TASKS / "choice.json"],
        limit=3,
        batch_size=2,
        bootstrap_iterations=0,
        progress=lambda *told: seen.append(told),
    )
    assert len(result.documents) == 3
    assert all(metric.standard_error is None for metric in result.metrics.values())
    assert seen[-1] == ("tiny_choice", 18, 18)
    assert len(seen) > 2
    with pytest.raises(ValueError, match="expected at most max_length = 3"):
        krait.evaluate(model, TASKS / "choice.json", max_length=3)
    (other,) = krait.evaluate(model, TASKS / "texts.json", prefix_token=7)
    (usual,) = krait.evaluate(model, TASKS / "texts.json")
    assert other.metrics["bits_per_byte"].value != usual.metrics["bits_per_byte"].value
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        krait.evaluate(model, TASKS / "nowhere.json")
    with pytest.raises(ValueError, match="tasks is empty"):
        krait.evaluate(model, [])
    with pytest.raises(TypeError, match="tasks is 3, expected a path"):
        krait.evaluate(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length is 0, expected at least 1"):
        krait.evaluate(model, TASKS, max_length=0)
    with pytest.raises(ValueError, match="prefix_token is -1, expected an id"):
        krait.evaluate(model, TASKS, prefix_token=-1)


def test_another_tokenizer(checkpoint: Checkpoint) -> None:
    model = krait.LanguageModel.from_pretrained()
    (own,) = krait.evaluate(model, TASKS / "texts.json")
    tokenizer = krait.Tokenizer.from_pretrained(checkpoint("hf-mamba-tiny"))
    (other,) = krait.evaluate(model, TASKS / "texts.json", tokenizer=tokenizer)
    assert own.metrics["bits_per_byte"].value < other.metrics["bits_per_byte"].value


def test_likelihoods_are_those_of_the_logits() -> None:
    model = krait.LanguageModel.from_pretrained(device=DEVICE)
    assert model.tokenizer is not None
    context = model.tokenizer.encode("ROMEO:\nBut soft, what light through yonder")
    pairs = [
        (context, model.tokenizer.encode(text))
        for text in (" window", " breaks", " window breaks?\n")
    ]
    pairs.append((np.array([0], np.int32), np.array(context)))
    found = krait.likelihoods(model, pairs)
    for (before, after), likelihood in zip(pairs, found, strict=True):
        ids = [*before, *after]
        logits = model.logits(ids[:-1]).astype(np.float64)[-len(after) :]
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert likelihood.log_likelihood == pytest.approx(
            sum(row[i] for row, i in zip(logprobs, after, strict=True)), abs=1e-4
        )
        assert likelihood.is_greedy == (logits.argmax(1) == after).all()
    for options in ({"share_prefixes": False}, {"batch_size": 1}, {"max_length": 2048}):
        again = krait.likelihoods(model, pairs, **options)  # type: ignore[arg-type]
        assert [a[0] for a in again] == pytest.approx([f[0] for f in found], abs=1e-4)
    assert krait.likelihoods(model, []) == []


def test_what_likelihoods_refuse() -> None:
    model = krait.LanguageModel.from_pretrained(device=DEVICE)
    with pytest.raises(ValueError, match="continuation 1 has no tokens"):
        krait.likelihoods(model, [([1], [2]), ([1], [])])
    with pytest.raises(ValueError, match="the context of continuation 0 has no tokens"):
        krait.likelihoods(model, [([], [1])])
    with pytest.raises(ValueError, match="id 99999 in continuation 0"):
        krait.likelihoods(model, [([1], [99999])])
    with pytest.raises(ValueError, match="max_length = 2"):
        krait.likelihoods(model, [([1], [2, 3, 4])], max_length=2)
    with pytest.raises(TypeError, match="expected integers"):
        krait.likelihoods(model, [([1.5], [2])])


def test_errors_of_callbacks_end_it() -> None:
    model = krait.LanguageModel.from_pretrained(device=DEVICE)
    pairs = [([i], [1] * 300) for i in range(1, 400)]
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        krait.likelihoods(model, pairs, batch_size=1, progress=interrupt)
    assert calls < 399
    assert math.isfinite(krait.likelihoods(model, pairs[:1])[0].log_likelihood)
