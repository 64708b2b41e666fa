"""What arguments of the wrong kind are told, by the name that the caller knows them under."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import krait

from_pretrained = krait.LanguageModel.from_pretrained


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: from_pretrained(3), "name_or_dir is 3, expected a path"),
        (lambda m: from_pretrained(dtype=np.float32), "dtype is <class 'numpy.float32'>, expected"),
        (lambda m: from_pretrained(threads="2"), "threads is '2', expected an integer"),
        (lambda m: krait.LanguageModel.from_config(None), "config is None, expected a path"),
        (lambda m: m.generate(b"a"), "prompts are bytes, expected a text, token ids"),
        (lambda m: m.generate("a", 2, temperature="hot"), "temperature is 'hot', expected a number"),
        (lambda m: m.generate("a", 2, stop=3), "stop is 3, expected a str or several"),
        (lambda m: m.generate("a", 2, stop=["b", 3]), "stop[1] is 3, expected a str"),
        (lambda m: m.generate("a", 2, seed=1.5), "seed is 1.5, expected an integer"),
        (lambda m: m.logits([1], state="x"), "state 0 is 'x', expected a State"),
        (lambda m: m.step([1], [None]), "state 0 is None, expected a State"),
        (lambda m: m.logits([1], state=3), "state is a int, expected a State, or one for each"),
        (lambda m: m.step(1, None), "state is None, expected a State, or one for each row"),
        (lambda m: m.new_states(2.0), "count is 2.0, expected an integer"),
        (lambda m: m.load_state("abc"), "image is str, expected bytes"),
        (lambda m: m.new_state().rollback(None), "earlier is None, expected a State"),
        (lambda m: m.tokenizer.encode(3), "text is 3, expected a str"),
        (lambda m: m.tokenizer.encode_batch(["a", 3]), "texts[1] is 3, expected a str"),
        (lambda m: krait.Tokenizer.from_file(3.0), "path is 3.0, expected a path"),
        (lambda m: krait.evaluate("m", "tasks"), "model is 'm', expected a LanguageModel"),
        (lambda m: krait.evaluate(m, [3]), "tasks is 3, expected a path"),
        (lambda m: krait.likelihoods(m, [1]), "continuation 0 is int, expected (context,"),
        (lambda m: krait.train(data=5), "data is 5, expected a path or several"),
        (lambda m: krait.train(lr=np.ones(3)), "lr is ndarray, expected a number"),
        (lambda m: m.from_config({"d_model": {1}}), "config has {1}, expected numbers, str,"),
        (lambda m: krait.pack_tokens("a", "gpt-neox", "b"), "tokenizer is 'gpt-neox', expected"),
        (lambda m: krait.set_num_threads("a"), "threads is 'a', expected an integer"),
    ],
)
def test_wrong_types(
    bundled: krait.LanguageModel, call: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(bundled)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("a", 2**63), "max_new_tokens is 9223372036854775808, expected an"),
        (lambda m: m.generate("a", 2, top_p=2), "top_p is 2, expected 0 to 1"),
        (lambda m: m.generate("a", 2, min_p=-0.5), "min_p is -0.5, expected 0 to 1"),
        (lambda m: m.generate("a", 2, top_p=float("nan")), "top_p is nan, expected 0 to 1"),
        (lambda m: m.generate([1, [2]], 2), "ids are rows of different lengths, or rows beside"),
        (lambda m: m.score([[1, 2], [3]]), "ids are rows of different lengths, or rows beside"),
        (lambda m: m.generate("a\ud800", 2), "text has the lone surrogate U+D800 at position 1"),
        # A variable that was not set is not the bundled model.
        (lambda m: from_pretrained(""), "name_or_dir is empty, expected a path"),
        (lambda m: krait.Tokenizer.from_pretrained(""), "name_or_dir is empty, expected a path"),
        (lambda m: krait.Tokenizer.from_file(""), "path is empty, expected a path"),
        (lambda m: m.save_pretrained(""), "directory is empty, expected a path"),
        (lambda m: krait.evaluate(m, ["a.json", ""]), "tasks is empty, expected a path"),
        (lambda m: krait.train(lr=float("nan")), "lr is nan, expected a finite number"),
        (lambda m: krait.train(config="c", data=["a.txt", ""]), "data is empty, expected a path"),
    ],
)
def test_wrong_values(
    bundled: krait.LanguageModel, call: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(bundled)


def test_a_thousand_million_tokens_are_made_one_by_one(bundled: krait.LanguageModel) -> None:
    with bundled.generate("ROMEO:", 10**9, ignore_eos=True, stream=True) as stream:
        pieces = [next(stream) for _ in range(3)]
    assert all(pieces)
    assert stream.generation.finish_reason == "interrupted"
