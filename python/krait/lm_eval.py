"""lm-evaluation-harness over Krait: the model type ``krait``.

    lm_eval --model krait --model_args pretrained=state-spaces/mamba-130m --tasks piqa

Where the harness does not know the type by itself (docs/evaluation.md says when), the command
``python -m krait.lm_eval`` takes the same arguments. ``python -m krait.lm_eval export`` writes
tasks of the harness as files for ``krait eval``.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from krait._library import build_info, library
from krait.evaluation import likelihoods
from krait.model import LanguageModel
from krait.tokenizer import Tokenizer

__all__ = ["KraitLM", "export_task", "main"]

_logger = logging.getLogger("lm_eval.krait")

# What the harness, transformers and Krait call the types of matrices.
_DTYPES = {
    "float32": "f32",
    "float": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "half": "f16",
    "f32": "f32",
    "bf16": "bf16",
    "f16": "f16",
}


def _dtype(dtype: Any) -> Any:
    """A type as from_pretrained takes it, of transformers' names for it and torch's types."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto' or one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device(device: str | None) -> str:
    """Where to run. The harness says "cuda:0" where its user says nothing."""
    if device is None:
        return "auto"
    if device.startswith("cuda") and build_info()["cuda_devices"] == 0:
        _logger.info("device is %s and Krait has no GPU that it can use: on the CPU", device)
        return "cpu"
    return device


def _batch_size(batch_size: int | str | None) -> int:
    """0: chosen by Krait. So are "auto" and 1, which is what the harness says where its user says
    nothing; numbers do not depend on it."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return 0
    count = int(batch_size)
    if count < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 'auto' or at least 1")
    return 0 if count == 1 else count


class KraitLM(TemplateLM):  # type: ignore[misc]
    """A model of Krait behind the harness's interface.

    ``pretrained``  what :meth:`krait.LanguageModel.from_pretrained` takes (a directory, or a name
        on the hub; the bundled model where left out), or a :class:`krait.LanguageModel`.
    ``dtype``  of the matrices: float32, bfloat16, float16, or "auto", the file's.
    ``device``  "cpu", "cuda", "cuda:N", "auto". "cuda..." where there is no GPU: the CPU, as with
        the harness's own models.
    ``batch_size``, ``max_batch_size``  sequences whose states exist at a time; "auto" and 1 leave
        it to Krait, under ``max_batch_size``. Sequences are packed, without padding, and one
        beginning that several have runs once: the numbers do not depend on it.
    ``max_length``  tokens that the model sees at a time; what config.json or the tokenizer says,
        else 2,048, where left out.
    ``tokenizer``  a directory, a tokenizer.json, "gpt-neox", a name on the hub, or a
        :class:`krait.Tokenizer`, in place of the model's own.
    ``prefix_token_id``  in place of an empty context; the token of the beginning of a text, else of
        its end, where left out.
    ``add_bos_token``  True: the token of the beginning of a text is in front of each, and nothing
        else is added, as transformers' tokenizers do; False: nothing is added; where left out, what
        the tokenizer adds.
    ``revision``, ``cache_dir``, ``offline``, ``threads``  as for ``from_pretrained``.

    Raises what ``from_pretrained`` raises, and ValueError for values that are not understood.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | LanguageModel | None = None,
        *,
        dtype: Any = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        tokenizer: str | Tokenizer | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        offline: bool | None = None,
        threads: int = 0,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LanguageModel):
            self.model = pretrained
        else:
            self.model = LanguageModel.from_pretrained(
                None if pretrained is None else str(pretrained),
                device=_device(device),
                dtype=_dtype(dtype),
                revision=None if revision is None else str(revision),
                cache_dir=cache_dir,
                offline=offline,
                threads=threads,
            )
        self._device = self.model.device
        self._own_tokenizer = tokenizer is None
        if isinstance(tokenizer, Tokenizer):
            self._tokenizer = tokenizer
        elif tokenizer is not None:
            self._tokenizer = Tokenizer.from_pretrained(
                str(tokenizer), cache_dir=cache_dir, offline=offline
            )
        else:
            self._tokenizer = self.model.tokenizer
        beginning = -1
        if prefix_token_id is None or add_bos_token:
            beginning = int(
                library().model_prefix_token(self.model._handle, self._tokenizer._handle)
            )
        self._prefix_token_id = int(beginning if prefix_token_id is None else prefix_token_id)
        self._bos = [beginning] if add_bos_token else []
        self._prefix_text = self._tokenizer.decode([self._prefix_token_id])
        self._add_bos_token = add_bos_token
        if max_length is None:
            max_length = int(library().model_max_length(self.model._handle))
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1")
        self._max_length = max_length
        self._max_gen_toks = max_gen_toks
        self.batch_size = _batch_size(batch_size)
        self._most = None if max_batch_size is None else int(max_batch_size)
        self._described = self.model.describe()

    # What the harness asks of a model.

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text: the tokenizer's, else the model's."""
        end = self._tokenizer.end_of_text
        if end is not None:
            return end
        ends = self.model.eos_token_ids
        return ends[0] if ends else self._prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in place of an empty context."""
        return self._prefix_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at a time."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a generation where its request says nothing."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests."""
        return self.model.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes beside its results."""
        return {
            "model_architecture": self._described.architecture,
            "model_num_parameters": self._described.parameters,
            "model_dtype": ", ".join(self._described.bytes_by_dtype),
            "model_device": self.model.device,
            "max_length": self.max_length,
            "krait_version": build_info()["version"],
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, with what the tokenizer adds unless it is there already."""
        if add_special_tokens is not None:
            return self._tokenizer.encode(string, add_special_tokens)
        if self._add_bos_token is False or string.startswith(self._prefix_text):
            return self._tokenizer.encode(string)
        if self._add_bos_token:
            return self._bos + self._tokenizer.encode(string)
        return self._tokenizer.encode(string, True)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._tokenizer.decode(tokens, skip_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            found = likelihoods(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch_size=self._states(),
                progress=lambda done, total: bar.update(done - bar.n),
            )
        results = [(value, greedy) for value, greedy in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in windows of ``max_length``."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            own = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, context, continuation) for context, continuation in own]
            counts.append(len(own))
        values = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [float(sum(next(values)[0] for _ in range(count))) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to a text that ends it."""
        texts = [""] * len(requests)
        # What is generated alike runs together.
        alike: defaultdict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        ) as bar:
            for group in alike.values():
                arguments = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
                until = handle_stop_sequences(
                    arguments.pop("until"), eos=self.tok_decode([self.eot_token_id], False)
                )
                until = [text for text in until if text]
                contexts = [self.tok_encode(requests[i].args[0]) for i in group]
                for begin, part in _parts(contexts, self._states()):
                    for i, text in zip(
                        group[begin:], self._generate(part, until, dict(arguments)), strict=False
                    ):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(part))
        return texts

    def _generate(
        self, contexts: list[list[int]], until: list[str], arguments: dict[str, Any]
    ) -> list[str]:
        new_tokens = int(arguments.pop("max_gen_toks"))
        arguments.pop("do_sample", None)
        options = {
            "temperature": float(arguments.pop("temperature", 0.0)),
            "top_k": int(arguments.pop("top_k", 0) or 0),
            "top_p": float(arguments.pop("top_p", 1.0) or 1.0),
            "min_p": float(arguments.pop("min_p", 0.0) or 0.0),
            "repetition_penalty": float(arguments.pop("repetition_penalty", 1.0) or 1.0),
            "seed": arguments.pop("seed", 0),
        }
        if arguments:
            raise ValueError(
                f"generation arguments {', '.join(arguments)} are not understood, expected until, "
                f"max_gen_toks, do_sample, {', '.join(options)}"
            )
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {new_tokens}, expected less than max_length = {self.max_length}"
            )
        prompts = [(ids or [self.prefix_token_id])[-room:] for ids in contexts]
        # Ends of texts other than the model's own are known to its own tokenizer alone.
        stop = until if self._own_tokenizer else ()
        generations = self.model.generate(prompts, new_tokens, stop=stop, **options)
        texts = []
        for generation in generations:
            ids = generation.new_ids
            text = generation.text
            if self.eot_token_id in ids:
                text = self.tok_decode(ids[: ids.index(self.eot_token_id)])
            elif not self._own_tokenizer:
                text = self.tok_decode(ids)
            for end in until:
                text = text.split(end)[0]
            texts.append(text)
        return texts

    def _states(self) -> int:
        """Sequences that run together; 0: chosen from the size of a state."""
        if self.batch_size == 0 and self._most is not None:
            return self._most
        return self.batch_size if self._most is None else min(self.batch_size, self._most)


def _parts(items: list[Any], size: int) -> Iterable[tuple[int, list[Any]]]:
    """Pieces of a list, and where they begin."""
    step = size or 32
    for begin in range(0, len(items), step):
        yield begin, items[begin : begin + step]


# Tasks of the harness as files for `krait eval`.

_FEWSHOT_SEED = 1234  # what the harness draws examples with
_KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")


def export_task(
    task: Any, directory: str | Path, limit: int | None = None, num_fewshot: int | None = None
) -> Path:
    """Writes a task of the harness (a ConfigurableTask) as ``NAME.json`` and ``NAME.jsonl``.

    Contexts hold description and few-shot examples already. Metrics that ``krait eval`` does not
    know are left out. Returns the path of the description.

    Raises ValueError for tasks of other kinds than multiple_choice, loglikelihood and
    loglikelihood_rolling, and such as compute their metrics themselves: perplexities per word or
    byte of another text than the one that is scored (wikitext) among them.
    """
    config = task.config
    name = str(config.task)
    if task.OUTPUT_TYPE not in _KINDS:
        raise ValueError(f"task {name} is of kind {task.OUTPUT_TYPE}, expected {', '.join(_KINDS)}")
    if config.process_results is not None and task.OUTPUT_TYPE != "loglikelihood_rolling":
        raise ValueError(
            f"task {name} computes its metrics by a function, which a file cannot hold"
        )
    if num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    by_document: defaultdict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    known = {
        "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"),
        "loglikelihood": ("perplexity", "acc"),
        "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    }[task.OUTPUT_TYPE]
    description = {
        "task": name,
        "output_type": task.OUTPUT_TYPE,
        "documents": f"{name}.jsonl",
        "target_delimiter": config.target_delimiter,
        "metric_list": [metric for metric in known if metric in task.aggregation()],
    }
    if not description["metric_list"]:
        raise ValueError(f"task {name} has none of the metrics {', '.join(known)}")
    lines = [
        json.dumps(_document(task, instances), ensure_ascii=False)
        for _, instances in sorted(by_document.items())
    ]
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    path = target / f"{name}.json"
    path.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _document(task: Any, instances: list[Instance]) -> dict[str, Any]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        (text,) = instances[0].args
        if task.config.process_results is not None:
            sizes = {"word_perplexity": task.count_words(text)}
            sizes["byte_perplexity"] = sizes["bits_per_byte"] = task.count_bytes(text)
            own = task.config.process_results(instances[0].doc, (0.0,))
            # wikitext divides by the words of the page before it is made readable.
            if any(own[name][1] != size for name, size in sizes.items() if name in own):
                raise ValueError(
                    f"task {task.config.task} counts the words or bytes of another text than it "
                    "scores, which a file cannot hold"
                )
        return {"text": text}
    if task.OUTPUT_TYPE == "loglikelihood":
        context, continuation = instances[0].args
        return {"context": context, "continuation": continuation}
    document = instances[0].doc
    choices = list(task.doc_to_choice(document))
    pairs = [instance.args for instance in sorted(instances, key=lambda i: i.idx)][: len(choices)]
    if task.multiple_input:
        delimiter = task.config.target_delimiter
        return {
            "choices": [context for context, _ in pairs],
            "context": int(task.doc_to_text(document)),
            "continuation": pairs[0][1].removeprefix(delimiter),
        }
    gold = task.doc_to_target(document)
    if isinstance(gold, str) and gold in choices:  # of digits, it would be a place
        gold = choices.index(gold)
    return {"context": pairs[0][0], "choices": choices, "gold": gold}


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m krait.lm_eval export",
        description="Write tasks of the harness as files for krait eval",
    )
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write them")
    parser.add_argument("--include_path", metavar="DIR", help="a directory with more tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents alone")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples in each context")
    options = parser.parse_args(arguments)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path)
    for task in manager.load(options.tasks.split(","))["tasks"].values():
        print(export_task(task, options.output, options.limit, options.num_fewshot))


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m krait.lm_eval``: the harness's own command line, which knows ``--model krait``
    then, or ``export``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["export"]:
        _export(given[1:])
        return
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *given]
    run: Callable[[], None] = cli_evaluate
    run()


if __name__ == "__main__":
    # Not of this module, which is called __main__, but of the one that the harness knows.
    from krait.lm_eval import main as run_main

    run_main()
else:
    register_model("krait")(KraitLM)
