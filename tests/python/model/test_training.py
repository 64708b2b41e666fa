"""Training runs."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from where import DEVICE

import krait
from krait import training
from krait._library import library

CONFIG = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 512,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16},
}


@pytest.fixture(scope="module")
def files(golden: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("train")
    text = (data / "tinyshakespeare.txt").read_text()
    (folder / "train.txt").write_text(text[:40000])
    (folder / "val.txt").write_text(text[-4000:])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {
        "config": folder / "config.json",
        "tokenizer": golden / "tokenizer-train" / "shakespeare.json",
        "data": [folder / "train.txt"],
        "val": folder / "val.txt",
        "batch_size": 2,
        "seq_len": 32,
        "lr": 3e-3,
        "seed": 1,
        "device": DEVICE,
        "threads": 1,
    }


def test_the_keywords_are_the_settings_of_the_library() -> None:
    table = library().train_settings_table()
    keywords = inspect.signature(krait.train).parameters
    names = [str(row[0]) for row in table]
    assert len(names) > 30
    assert [name for name in names if name not in keywords] == []
    others = {
        name for name in keywords if name not in names and not name.startswith("on_")
    }
    assert others == {
        "settings", "resume", "device", "threads", "cache_dir", "offline", "progress", "stop",
    }  # fmt: skip
    hints = inspect.get_annotations(krait.train, eval_str=True)
    for row in table:
        for choice in row[3]:
            assert f"'{choice}'" in str(hints[str(row[0])]), row[0]


def test_a_run(files: dict[str, Any], tmp_path: Path) -> None:
    told: dict[str, list[Any]] = {}

    def to(name: str) -> Any:
        return lambda report: told.setdefault(name, []).append(report)

    result = krait.train(
        **files,
        out=tmp_path / "run",
        steps=6,
        log_every=2,
        eval_every=3,
        save_every=3,
        sample_every=6,
        sample_tokens=4,
        sample_prompt="ROMEO:",
        export="best",
        schedule="cosine",
        betas=(0.9, 0.98),
        on_start=to("start"),
        on_step=to("step"),
        on_log=to("log"),
        on_evaluation=to("evaluation"),
        on_sample=to("sample"),
        on_checkpoint=to("checkpoint"),
    )
    assert result.end == "finished" and result.steps == 6 and result.seconds > 0
    (start,) = told["start"]
    assert start.steps == 6 and start.first_step == 0 and start.data_tokens > 5000
    assert [r.step for r in told["step"]] == [1, 2, 3, 4, 5, 6]
    assert [r.step for r in told["log"]] == [2, 4, 6]
    first = told["step"][0]
    assert isinstance(first, training.StepReport)
    assert math.isclose(first.loss, math.log(512), rel_tol=0.05) and first.tokens == 64
    assert not first.was_skipped and first.skipped == 0
    assert told["step"][-1].lr < first.lr == 3e-3
    evaluations = told["evaluation"]
    assert [r.step for r in evaluations] == [3, 6] and all(r.bits_per_byte for r in evaluations)
    best = min(evaluations, key=lambda r: r.loss)
    assert (result.best_step, result.best_loss) == (best.step, best.loss)
    assert told["sample"][0].text.startswith("ROMEO:")
    assert Path(told["checkpoint"][-1]).is_dir() and len(told["checkpoint"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [r.loss for r in told["log"]]
    settings = krait.run_settings(tmp_path / "run")
    assert settings is not None and settings["steps"] == 6 and settings["betas"] == [0.9, 0.98]
    assert krait.run_settings(tmp_path) is None
    model = krait.LanguageModel.from_pretrained(tmp_path / "run", device=DEVICE)
    assert math.isclose(
        model.score((files["val"]).read_text(), block=32).loss, best.loss, rel_tol=0.02
    )


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_runs_go_on(files: dict[str, Any], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    krait.train(**files, out=whole, steps=6)
    parts = tmp_path / "parts"
    steps: list[int] = []
    stopped = krait.train(
        **files,
        out=parts,
        steps=6,
        on_step=lambda report: steps.append(report.step),
        stop=lambda: len(steps) == 3,
    )
    assert stopped.end == "interrupted" and stopped.steps == 3
    assert not (parts / "model.safetensors").exists()
    # The settings are those that the run was started with.
    finished = krait.train(
        out=parts, resume=True, on_step=lambda r: steps.append(r.step), device=DEVICE, threads=1
    )
    assert finished.end == "finished" and steps == [1, 2, 3, 4, 5, 6]
    assert weights(parts) == weights(whole)
    again = krait.train(out=parts, resume=True, device=DEVICE)
    assert again.end == "already_finished" and again.steps == 6
    with pytest.raises(ValueError, match="lr is 0.1, but the run"):
        krait.train(out=parts, resume=True, lr=0.1, device=DEVICE)
    with pytest.raises(ValueError):
        krait.train(**files, out=parts, steps=6)


def test_settings_in_files_and_mappings(files: dict[str, Any], tmp_path: Path) -> None:
    by_keywords = tmp_path / "keywords"
    krait.train(**files, out=by_keywords, steps=2, weight_decay=0.5)
    machine = {"device": DEVICE, "threads": 1}
    mapping = {k.replace("_", "-"): v for k, v in files.items() if k not in machine}
    mapping |= {"steps": 9, "weight_decay": 0.5}
    by_mapping = tmp_path / "mapping"
    krait.train(mapping, out=by_mapping, steps=2, **machine)
    settings = krait.run_settings(by_keywords)
    assert settings is not None
    del settings["out"]
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    by_file = tmp_path / "file"
    krait.train(path, out=by_file, **machine)
    assert weights(by_keywords) == weights(by_mapping) == weights(by_file)


def test_an_error_in_a_callback_leaves_a_checkpoint(files: dict[str, Any], tmp_path: Path) -> None:
    def fail(report: training.StepReport) -> None:
        if report.step == 2:
            raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        krait.train(**files, out=tmp_path / "run", steps=5000, on_step=fail)
    resumed = krait.train(
        out=tmp_path / "run", resume=True, device=DEVICE, threads=1, stop=lambda: True
    )
    assert resumed.end == "interrupted" and 2 <= resumed.steps < 5000


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": -1}, ValueError, "batch_size is -1, expected an integer of at least 0"),
        ({"lr": "fast"}, ValueError, "lr is 'fast', expected a number"),
        ({"dtype": "f64"}, ValueError, r"dtype is 'f64', expected f32\|bf16"),
        ({"betas": (0.9,)}, ValueError, "betas has 1 numbers, expected 2"),
        ({"steps": 2, "epochs": 1.0}, ValueError, "steps and epochs"),
        ({"data": []}, ValueError, "no data is given"),
        ({"data": "absent.txt"}, FileNotFoundError, "absent.txt"),
        ({"config": "absent.json"}, FileNotFoundError, "absent.json"),
        ({"device": "tpu"}, ValueError, "device is 'tpu'"),
        ({"export": "best", "val": []}, ValueError, "export is best, which needs val"),
    ],
)
def test_refusals(
    files: dict[str, Any],
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        krait.train(**{**files, "out": tmp_path / "run", **settings})
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_unknown_settings(files: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        krait.train(**files, learning_rate=1.0)
    with pytest.raises(ValueError, match="unknown setting 'learning_rate', expected one of model"):
        krait.train({"learning_rate": 1.0})
    with pytest.raises(ValueError, match="resume needs out"):
        krait.train(resume=True)


def test_training_a_checkpoint_on(golden: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 277, (4, 2, 17))
    np.save(tmp_path / "ids.npy", ids)
    losses: list[float] = []
    krait.train(
        model=golden / "mamba1-tiny",
        data=tmp_path / "ids.npy",
        out=tmp_path / "run",
        steps=3,
        device=DEVICE,
        threads=1,
        on_log=lambda report: losses.append(report.loss),
    )
    model = krait.LanguageModel.from_pretrained(golden / "mamba1-tiny", device=DEVICE)
    assert math.isclose(model.score(ids[0]).loss, losses[0], rel_tol=1e-4)
    trained = krait.LanguageModel.from_pretrained(tmp_path / "run", device=DEVICE)
    assert trained.score(ids[0]).loss < losses[0]


def test_packed_tokens(files: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = krait.Tokenizer.from_file(files["tokenizer"])
    packed = krait.pack_tokens(files["data"], tokenizer, tmp_path / "data.bin")
    text = files["data"][0].read_text()
    assert packed.bytes == len(text.encode()) and packed.documents == 1
    assert packed.tokens in (len(tokenizer.encode(text)), len(tokenizer.encode(text)) + 1)
    from_text = tmp_path / "text"
    krait.train(**files, out=from_text, steps=2)
    from_file = tmp_path / "packed"
    krait.train(**{**files, "data": tmp_path / "data.bin"}, out=from_file, steps=2)
    assert weights(from_text) == weights(from_file)
    with pytest.raises(FileNotFoundError, match="absent"):
        krait.pack_tokens([tmp_path / "absent.txt"], tokenizer, tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()
