"""Tokenizers against Hugging Face's."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import krait


@pytest.fixture(scope="module")
def neox() -> krait.Tokenizer:
    return krait.Tokenizer.from_pretrained("gpt-neox")


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads((golden / "tokenizer" / "cases.json").read_text())
    return made


def test_ids_and_texts(neox: krait.Tokenizer, cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 100
    for case in cases:
        assert neox.encode(case["text"]) == case["ids"]
        assert neox.decode(case["ids"]) == case["decoded"]
        assert neox.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]
    assert neox.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]
    assert neox.decode_batch([case["ids"] for case in cases]) == [case["decoded"] for case in cases]


def test_streams_of_ids(neox: krait.Tokenizer, cases: list[dict[str, Any]]) -> None:
    decoder = neox.stream_decoder()
    for case in cases:
        pieces = [decoder.push(id) for id in case["ids"]]
        assert "".join(pieces) + decoder.finish() == case["decoded"]
    with pytest.raises(ValueError, match="no token has the id"):
        decoder.push(10**9)


def test_tokens(neox: krait.Tokenizer) -> None:
    assert neox.vocab_size == len(neox) == 50277
    assert neox.token_to_id("<|endoftext|>") == 0 == neox.end_of_text
    assert neox.is_special(0) and not neox.is_special(100)
    assert 0 in neox.special_ids
    the = neox.encode(" the")[0]
    assert neox.id_to_token(the) == "\u0120the" and neox.token_to_id("\u0120the") == the
    assert neox.token_to_id("no such token") is None
    with pytest.raises(ValueError, match="no token has the id -1"):
        neox.id_to_token(-1)
    assert repr(neox) == "Tokenizer(vocab_size=50277)"


def test_kinds_of_ids(neox: krait.Tokenizer) -> None:
    ids = neox.encode("Mamba is")
    for same in (tuple(ids), np.array(ids), np.array(ids, np.int32), np.array(ids, np.uint16)):
        assert neox.decode(same) == "Mamba is"
    assert neox.decode([]) == ""
    with pytest.raises(TypeError, match="expected integers"):
        neox.decode([0.5])
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected one row"):
        neox.decode([[1, 2]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no token has the id"):
        neox.decode([10**12])
    with pytest.raises(TypeError):
        neox.encode(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one str"):
        neox.encode_batch("text")
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
        neox.encode("\ud800")
    assert neox.decode(neox.encode("a\0b")) == "a\0b"


def test_where_they_come_from(golden: Path, tmp_path: Path, bundled: krait.LanguageModel) -> None:
    path = golden / "shakespeare" / "tokenizer.json"
    from_file = krait.Tokenizer.from_file(path)
    expected = from_file.encode("Enter ROMEO")
    for same in (
        krait.Tokenizer.from_pretrained(path.parent),
        krait.Tokenizer.from_pretrained(path),
        krait.Tokenizer.from_json(path.read_text()),
        pickle.loads(pickle.dumps(from_file)),
    ):
        assert same.encode("Enter ROMEO") == expected
    default = krait.Tokenizer.from_pretrained()
    assert default.encode("Enter ROMEO") == bundled.tokenizer.encode("Enter ROMEO")
    from_file.save(tmp_path)
    assert krait.Tokenizer.from_pretrained(tmp_path).encode("Enter ROMEO") == expected
    from_file.save(tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == path.read_text()


def test_files_that_are_none(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.json"):
        krait.Tokenizer.from_file(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        krait.Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="vocabulary of 277"):
        krait.Tokenizer.from_pretrained(golden / "mamba1-tiny")
    with pytest.raises(FileNotFoundError, match="forbids to fetch it"):
        krait.Tokenizer.from_pretrained("some/model", cache_dir=tmp_path, offline=True)
    with pytest.raises(FileNotFoundError, match="nor a model of the hub"):
        krait.Tokenizer.from_pretrained(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="Unigram"):
        krait.Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError):
        krait.Tokenizer.from_json("[")


def tokens(tokenizer: krait.Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(id) for id in range(tokenizer.vocab_size)]


def test_training(golden: Path, data: Path, tmp_path: Path) -> None:
    folder = golden / "tokenizer-train"
    seen: list[tuple[int, int]] = []
    trained = krait.Tokenizer.train(
        folder / "mixed.jsonl", 700, progress=lambda done, total: seen.append((done, total))
    )
    assert trained.vocab_size == 700 and trained.end_of_text == 0
    assert tokens(trained) == tokens(krait.Tokenizer.from_file(folder / "mixed.json"))
    for case in json.loads((folder / "cases.json").read_text()):
        assert trained.encode(case["text"]) == case["ids"]
    assert seen and seen[-1][0] == seen[-1][1]
    shakespeare = krait.Tokenizer.train([data / "tinyshakespeare.txt"], 512, threads=1)
    assert tokens(shakespeare) == tokens(krait.Tokenizer.from_file(folder / "shakespeare.json"))


def test_refused_training(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab ab")
    with pytest.raises(ValueError, match="vocabulary size is 10, expected at least 257"):
        krait.Tokenizer.train(text, 10)
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        krait.Tokenizer.train([tmp_path / "absent.txt"], 300)
    with pytest.warns(RuntimeWarning, match="vocabulary"):
        small = krait.Tokenizer.train(text, 300, special_tokens=["<s>", "</s>"])
    assert small.vocab_size < 300 and small.token_to_id("</s>") == 1 == small.end_of_text
    text.write_text("")
    with pytest.raises(ValueError):
        krait.Tokenizer.train(text, 300)


def test_an_error_of_the_callback(data: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        krait.Tokenizer.train(data / "tinyshakespeare.txt", 400, progress=fail)


def test_several_threads(
    neox: krait.Tokenizer,
    cases: list[dict[str, Any]],
    in_threads: Callable[[int, Callable[[int], None]], None],
) -> None:
    def work(index: int) -> None:
        for case in cases[index::4]:
            assert neox.encode(case["text"]) == case["ids"]
        assert neox.encode_batch([case["text"] for case in cases[:20]]) == [
            case["ids"] for case in cases[:20]
        ]

    in_threads(4, work)
