"""lm-eval's model type mamba_ssm, and a model registered as upstream does, on local tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm_eval's models of transformers need it")

from mamba_ssm import MambaLMHeadModel  # noqa: E402
from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402

WORDS = "the a cat dog sat ran on under mat tree and then slept ate fish bone big small".split()
TEXTS = [
    ("the cat sat on the", ["mat", "tree ran", "dog"], 0),
    ("a dog ran under a big", ["fish", "tree", "bone ate"], 1),
    ("the small cat ate a", ["big tree", "mat", "fish"], 2),
    ("then the dog", ["slept", "sat on a mat", "ate a bone and slept"], 2),
    ("a", ["cat", "tree", "mat"], 0),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=32, n_layer=2, vocab_size=len(vocabulary), ssm_cfg={"layer": "Mamba1"}
    )
    model = MambaLMHeadModel(config)
    with torch.no_grad():
        model.backbone.embedding.weight.normal_(std=0.6)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A multiple choice task and one that generates, in files."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(folder / "data.jsonl", "w") as file:
        for query, choices, gold in TEXTS:
            file.write(json.dumps({"query": query, "choices": choices, "gold": gold}) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "data.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{query}}",
    }
    choosing = {
        **common,
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    writing = {
        **common,
        "task": "local_writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choosing, writing):
        # JSON is YAML.
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def log_likelihoods(folder: Path) -> list[list[float]]:
    """The log-likelihood of each continuation, from forward passes of single texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MambaLMHeadModel.from_pretrained(str(folder))
    found = []
    for query, choices, _ in TEXTS:
        row = []
        for choice in choices:
            start = len(tokenizer(query).input_ids)
            ids = torch.tensor([tokenizer(f"{query} {choice}").input_ids])
            with torch.no_grad():
                scores = F.log_softmax(model(ids).logits[0, :-1].float(), dim=-1)
            steps = scores.gather(1, ids[0, 1:, None])[start - 1 :]
            row.append(float(steps.sum()))
        found.append(row)
    return found


def check_choices(results: Any, folder: Path) -> None:
    samples = sorted(results["samples"]["local_choice"], key=lambda s: s["doc_id"])
    right = 0
    for sample, row, (_, _, gold) in zip(samples, log_likelihoods(folder), TEXTS, strict=True):
        values = [float(response[0][0]) for response in sample["resps"]]
        assert values == pytest.approx(row, abs=1e-4)
        right += row.index(max(row)) == gold
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(TEXTS))


def evaluate(model: Any, tasks: Any, names: list[str], **arguments: Any) -> Any:
    return lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=tasks,
        bootstrap_iters=0,
        log_samples=True,
        **arguments,
    )


def test_model_type(checkpoint: Path, tasks: Any) -> None:
    results = evaluate(
        "mamba_ssm",
        tasks,
        ["local_choice", "local_writing"],
        model_args=f"pretrained={checkpoint},tokenizer={checkpoint},dtype=float32",
        device="cpu",
        batch_size=3,
    )
    check_choices(results, checkpoint)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = MambaLMHeadModel.from_pretrained(str(checkpoint))
    texts = {s["doc_id"]: s["resps"][0][0] for s in results["samples"]["local_writing"]}
    # The first text has the most tokens, so nothing is padded on its left.
    ids = torch.tensor([tokenizer(TEXTS[1][0]).input_ids])
    for _ in range(6):
        following = model(ids).logits[:, -1, : model.config.vocab_size].argmax(-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
    expected = tokenizer.decode(ids[0, -6:]).split("<end>")[0]
    assert texts[1].split() == expected.split()


def test_registered_as_upstream_does(checkpoint: Path, tasks: Any) -> None:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    @register_model("local_mamba")
    class LocalMamba(HFLM):
        # What releases of lm-eval since look at besides.
        backend = "causal"
        add_bos_token = logits_cache = truncation = enable_thinking = False
        custom_prefix_token_id = mixed_precision_dtype = softmax_dtype = None
        pretrained = revision = peft = delta = ""

        def __init__(self, pretrained, max_length=2048, batch_size=None, device="cuda", dtype=None):  # type: ignore[no-untyped-def]
            LM.__init__(self)
            self._model = MambaLMHeadModel.from_pretrained(pretrained, device=device, dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
            self.tokenizer.pad_token_id = self.tokenizer.eos_token_id
            self.vocab_size = self.tokenizer.vocab_size
            self._batch_size = int(batch_size)
            self._max_length = max_length
            self._device = torch.device(device)

        @property
        def batch_size(self) -> int:
            return self._batch_size

    results = evaluate(
        "local_mamba",
        tasks,
        ["local_choice"],
        model_args=f"pretrained={checkpoint}",
        device="cpu",
        batch_size=2,
    )
    check_choices(results, checkpoint)
