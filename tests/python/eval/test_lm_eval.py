"""The model type ``krait`` of lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_tasks import DEVICE, MODELS, ROOT, TASKS

import krait

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from krait.lm_eval import KraitLM, export_task, main

Checkpoint = Callable[[str], Path]
Tasks = Callable[[], list[dict[str, Any]]]


def run(model: Any, tasks: list[Any], **options: Any) -> dict[str, Any]:
    """Samples and metrics of each task."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        device=DEVICE,
        log_samples=True,
        bootstrap_iters=1000,
        **options,
    )
    assert found is not None
    return {
        task: {
            "metrics": {
                key: value
                for key, value in metrics.items()
                if key.endswith(",none") and value != "N/A"
            },
            "resps": [
                sample["resps"]
                for sample in sorted(found["samples"][task], key=lambda s: s["doc_id"])
            ],
        }
        for task, metrics in found["results"].items()
    }


def numbers(value: Any) -> list[float]:
    """All numbers in lists of lists."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers(item)]
    return [float(value)]


@pytest.mark.parametrize(("name", "max_length"), list(zip(MODELS, (None, 64, 64), strict=True)))
def test_agrees_with_transformers(
    name: str, max_length: int | None, checkpoint: Checkpoint, harness_tasks: Tasks
) -> None:
    pytest.importorskip("accelerate")
    arguments: dict[str, Any] = {"pretrained": str(checkpoint(name)), "dtype": "float32"}
    if max_length is not None:
        arguments["max_length"] = max_length
    theirs = run("hf", harness_tasks(), model_args=arguments, batch_size=4)
    ours = run("krait", harness_tasks(), model_args=arguments, batch_size="auto")
    native = {
        result.name: result
        for result in krait.evaluate(
            krait.LanguageModel.from_pretrained(checkpoint(name), device=DEVICE),
            TASKS,
            max_length=max_length,
            bootstrap_iterations=1000,
        )
    }
    assert ours.keys() == theirs.keys() == native.keys()
    for task in theirs:
        assert ours[task]["metrics"] == pytest.approx(theirs[task]["metrics"], rel=1e-4, abs=1e-4)
        assert numbers(ours[task]["resps"]) == pytest.approx(
            numbers(theirs[task]["resps"]), abs=1e-4
        )
        for metric, value in native[task].metrics.items():
            assert ours[task]["metrics"][f"{metric},none"] == pytest.approx(value.value, rel=1e-6)
            if value.standard_error is not None:
                assert ours[task]["metrics"][f"{metric}_stderr,none"] == pytest.approx(
                    value.standard_error, rel=1e-6
                )


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("added", [(), ("<s>",), ("<s>", "<|endoftext|>")])
def test_encodes_as_transformers_does(
    added: tuple[str, ...], add_bos_token: bool | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Tokenizers that add nothing, a beginning, and a beginning and an end."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    shutil.copytree(checkpoint("hf-mamba-tiny"), tmp_path, dirs_exist_ok=True)
    if added:
        path = tmp_path / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        ids = {"<s>": len(tokenizer["model"]["vocab"]), "<|endoftext|>": 0}
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "content": "<s>"})
        tokenizer["added_tokens"][-1]["id"] = ids["<s>"]
        template: list[dict[str, Any]] = [
            {"SpecialToken": {"id": token, "type_id": 0}} for token in added
        ]
        template.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in added
            },
        }
        path.write_text(json.dumps(tokenizer))
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<s>"}))
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", add_bos_token=add_bos_token)
    ours = KraitLM(str(tmp_path), device="cpu", add_bos_token=add_bos_token)
    assert ours.prefix_token_id == theirs.prefix_token_id
    for text in ("the king", " of", "", "<s>the king", "<|endoftext|>the"):
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
    for pair in (("the king ", "of"), ("<s>the", " king")):
        assert ours._encode_pair(*pair) == theirs._encode_pair(*pair), pair


GENERATION = {
    "task": "tiny_generation",
    "output_type": "generate_until",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_target": "",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize(
    ("name", "until"), list(zip(MODELS, (["\n"], ["e", "q"], ["e", "q"]), strict=True))
)
def test_generates_as_transformers_does(
    name: str, until: list[str], checkpoint: Checkpoint
) -> None:
    pytest.importorskip("accelerate")
    task = {
        **GENERATION,
        "dataset_kwargs": {"data_files": {"test": str(TASKS / "last_word.jsonl")}},
        "generation_kwargs": {"until": until, "max_gen_toks": 24, "do_sample": False},
    }
    arguments = {"pretrained": str(checkpoint(name)), "dtype": "float32", "max_length": 64}
    # One at a time: left padding, which is theirs, changes the states of SSMs.
    theirs = run("hf", [dict(task)], model_args=arguments, batch_size=1)
    ours = run("krait", [dict(task)], model_args=arguments)
    assert ours["tiny_generation"]["resps"] == theirs["tiny_generation"]["resps"]


def test_generation_arguments(checkpoint: Checkpoint) -> None:
    from lm_eval.api.instance import Instance

    model = KraitLM(str(checkpoint("hf-mamba-tiny")), device=DEVICE, max_length=64)

    def ask(*arguments: dict[str, Any]) -> list[str]:
        return model.generate_until(
            [Instance("generate_until", {}, ("The king", a), i) for i, a in enumerate(arguments)],
            disable_tqdm=True,
        )

    greedy = {"until": [], "max_gen_toks": 8}
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "seed": 3}
    first, second, third = ask(greedy, drawn, greedy)
    assert first == third != second
    assert ask(drawn) == [second]
    with pytest.raises(ValueError, match="num_beams are not understood"):
        ask({"until": [], "num_beams": 4})
    with pytest.raises(ValueError, match="max_gen_toks is 64, expected less than max_length = 64"):
        ask({"until": [], "max_gen_toks": 64})


def test_arguments(checkpoint: Checkpoint) -> None:
    directory = str(checkpoint("hf-gptneox-tiny"))
    model = KraitLM(directory, device="cuda:0", dtype="bfloat16", batch_size="auto:4")
    assert model.max_length == 512
    assert model.prefix_token_id == 0
    assert model.eot_token_id == 0
    assert model.batch_size == 0
    assert model.get_model_info()["model_dtype"].startswith("bf16")
    assert KraitLM(directory, device=DEVICE, batch_size=5).batch_size == 5
    assert KraitLM(directory, device=DEVICE, batch_size=1, max_batch_size=3)._states() == 3
    given = KraitLM(
        krait.LanguageModel.from_pretrained(),
        tokenizer=directory,
        prefix_token_id=5,
        max_length=100,
        add_bos_token=False,
    )
    assert given.max_length == 100
    assert given.prefix_token_id == 5
    assert given.tok_decode(given.tok_encode("the king")) == "the king"
    for arguments, message in (
        ({"dtype": "int8"}, "dtype is 'int8', expected 'auto' or one of float32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"device": "tpu"}, "tpu"),
    ):
        with pytest.raises(ValueError, match=message):
            KraitLM(directory, **{"device": "cpu", **arguments})
    with pytest.raises(FileNotFoundError):
        KraitLM(directory + "-that-is-not-there", device=DEVICE)


def metrics_of(directory: Path) -> dict[str, float]:
    (path,) = directory.rglob("results_*.json")
    return {
        f"{task} {key}": value
        for task, values in json.loads(path.read_text())["results"].items()
        for key, value in values.items()
        if key.endswith(",none") and value != "N/A"
    }


def test_the_whole_command(
    checkpoint: Checkpoint,
    harness_directory: Path,
    golden_runs: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """``lm_eval --model krait``, as where the distribution is installed."""
    # What an installation has, in a directory that Python treats as one.
    site = tmp_path / "site"
    information = site / "krait_ssm-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: krait-ssm\nVersion: 0\n")
    declared = '[project.entry-points."lm_eval.models"]\nkrait = "krait.lm_eval:KraitLM"\n'
    assert declared in (ROOT / "pyproject.toml").read_text()
    (information / "entry_points.txt").write_text(
        "[lm_eval.models]\nkrait = krait.lm_eval:KraitLM\n"
    )
    for file in ("krait_lm_eval.pth", "krait_lm_eval_plugin.py"):
        shutil.copy(ROOT / "python" / file, site)
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})\n")
    paths = [str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "krait"),
            *("--model_args", f"pretrained={checkpoint('hf-mamba-tiny')},max_length=512"),
            *("--tasks", "tiny_choice,tiny_texts", "--include_path", str(harness_directory)),
            *("--output_path", str(tmp_path / "out")),
        ],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in paths if path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wanted = golden_runs[0]["tasks"]
    assert golden_runs[0]["model"] == "hf-mamba-tiny" and golden_runs[0]["max_length"] == 512
    assert metrics_of(tmp_path / "out") == pytest.approx(
        {
            f"{task} {key},none": value
            for task in ("tiny_choice", "tiny_texts")
            for key, value in wanted[task]["metrics"].items()
        },
        rel=1e-4,
    )


def test_importing_the_plugin_imports_nothing() -> None:
    """Every start of Python does it."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import krait_lm_eval_plugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    imported = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT / "python")),
    ).stdout.split()
    assert set(imported) <= {"__future__", "krait_lm_eval_plugin"}


def test_exported_tasks_give_the_same(
    checkpoint: Checkpoint, harness_tasks: Tasks, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    for task in manager.load(harness_tasks())["tasks"].values():
        export_task(task, tmp_path)
    model = krait.LanguageModel.from_pretrained(checkpoint("hf-mamba-tiny"), device=DEVICE)
    exported = {result.name: result for result in krait.evaluate(model, tmp_path)}
    original = {result.name: result for result in krait.evaluate(model, TASKS)}
    assert exported == original


def test_the_command_of_the_module(harness_directory: Path, tmp_path: Path) -> None:
    """Exporting is its own, everything else the harness's, which must know the type."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "krait.lm_eval", "export", "--tasks", "tiny_which,tiny_texts"),
            *("--include_path", str(harness_directory)),
            *("--output", str(tmp_path / "out"), "--limit", "2"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = ["tiny_texts.json", "tiny_which.json"]
    assert sorted(done.stdout.split()) == [str(tmp_path / "out" / name) for name in names]
    model = krait.LanguageModel.from_pretrained(device=DEVICE)
    for result in krait.evaluate(model, tmp_path / "out"):
        assert len(result.documents) == 2
    with pytest.raises(SystemExit):
        main(["--model", "krait", "--tasks"])
    from lm_eval.api.registry import get_model

    assert get_model("krait") is KraitLM


def test_exported_examples(harness_tasks: Tasks, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (choice,) = (task for task in harness_tasks() if task["task"] == "tiny_choice")
    choice["fewshot_split"] = "test"
    (task,) = TaskManager(include_defaults=False).load([choice])["tasks"].values()
    export_task(task, tmp_path, limit=2, num_fewshot=2)
    documents = [
        json.loads(line) for line in (tmp_path / "tiny_choice.jsonl").read_text().splitlines()
    ]
    assert len(documents) == 2
    assert documents[0]["context"].startswith("Answer the questions.\n\n")
    assert documents[0]["context"].count("Question:") == 3
    generation = {
        **GENERATION,
        "dataset_kwargs": {"data_files": {"test": str(TASKS / "last_word.jsonl")}},
    }
    (task,) = TaskManager(include_defaults=False).load([generation])["tasks"].values()
    with pytest.raises(ValueError, match="task tiny_generation is of kind generate_until"):
        export_task(task, tmp_path)


def test_exported_answers_and_counts_are_those_of_the_harness(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    def load(task: dict[str, Any], document: dict[str, Any]) -> Any:
        path = tmp_path / f"{task['task']}-documents.jsonl"
        path.write_text(json.dumps(document) + "\n")
        files = {"dataset_path": "json", "test_split": "test"}
        files["dataset_kwargs"] = {"data_files": {"test": str(path)}}
        (found,) = TaskManager(include_defaults=False).load([{**task, **files}])["tasks"].values()
        return found

    # An answer that is the text of a choice, though one of digits.
    sums = {
        "task": "sums",
        "output_type": "multiple_choice",
        "doc_to_text": "sum",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    document = {"sum": "1 + 1 =", "choices": ["1", "2", "0"], "answer": "2"}
    export_task(load(sums, document), tmp_path)
    assert json.loads((tmp_path / "sums.jsonl").read_text())["gold"] == 1

    # Metrics that a function computes, from the words and bytes of one text or another.
    def results_of(field: str) -> Any:
        def results(document: dict[str, str], likelihoods: tuple[float]) -> dict[str, Any]:
            words = len(document[field].split(" "))
            return {"word_perplexity": (likelihoods[0], words)}

        return results

    pages = {
        "task": "pages",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    document = {"text": "it's so", "raw": "it 's so"}
    export_task(load({**pages, "process_results": results_of("text")}, document), tmp_path)
    assert json.loads((tmp_path / "pages.jsonl").read_text()) == {"text": "it's so"}
    with pytest.raises(ValueError, match="task pages counts the words or bytes of another text"):
        export_task(load({**pages, "process_results": results_of("raw")}, document), tmp_path)
