"""Makes the tokenizer and results.json beside it: what lm-evaluation-harness measures on tasks/.

Needs tokenizers, transformers, accelerate and lm-eval from pip (0.4.13 made these).
"""

import copy
import json
import os
import pathlib
import shutil
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

here = pathlib.Path(__file__).resolve().parent


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(here.parent.parent / "data/tinyshakespeare.txt")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(here)


def read_tasks():
    for path in sorted((here / "tasks").glob("*.json")):
        task = json.loads(path.read_text())
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {k: str(path.parent / v) for k, v in files.items()}
        yield task


def pairs(sample):
    """(log-likelihood, is_greedy) of each request of a document."""
    return [r if isinstance(r, (list, tuple)) else (r, False) for r in sample["filtered_resps"]]


def measure(model, max_length):
    with tempfile.TemporaryDirectory() as directory:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(here.parent / model / name, directory)
        for path in here.glob("tokenizer*.json"):
            shutil.copy(path, directory)
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": directory, "dtype": "float32", "max_length": max_length},
            tasks=[copy.deepcopy(task) for task in read_tasks()],
            task_manager=TaskManager(include_defaults=False),
            device="cpu",
            batch_size=4,
            log_samples=True,
        )
    return {
        task: {
            "metrics": {
                key.removesuffix(",none"): value
                for key, value in metrics.items()
                if key.endswith(",none") and value != "N/A"
            },
            "documents": [
                {
                    "log_likelihoods": [float(ll) for ll, _ in pairs(sample)],
                    "is_greedy": [bool(greedy) for _, greedy in pairs(sample)],
                }
                for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])
            ],
        }
        for task, metrics in results["results"].items()
    }


if __name__ == "__main__":
    make_tokenizer()
    found = [
        {"model": model, "max_length": length, "tasks": measure(model, length)}
        for model in ("hf-mamba-tiny", "hf-mamba2-tiny", "hf-gptneox-tiny")
        for length in (512, 64)
    ]
    (here / "results.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
