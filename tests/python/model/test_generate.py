"""Generation, whole and as a stream."""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from where import DEVICE, assert_near

import krait

CHECKPOINTS = ["hf-mamba-tiny", "hf-mamba2-tiny", "hf-gptneox-tiny", "mamba1-tiny", "mamba2-tiny"]
ENDLESS = 1 << 30


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_ids_are_those_of_other_implementations(golden: Path, name: str) -> None:
    model = krait.LanguageModel.from_pretrained(golden / name, device=DEVICE)
    prompts = np.load(golden / name / "prompt_ids.npy")
    expected = np.load(golden / name / "greedy_ids.npy")
    new = expected.shape[1] - prompts.shape[1]
    made = model.generate(prompts, new, top_k=1, ignore_eos=True)
    assert [g.ids for g in made] == expected.tolist()
    assert all(g.text == "" and g.finish_reason == "length" for g in made)
    alone = model.generate(prompts[1], new, temperature=0, ignore_eos=True)
    assert alone.ids == expected[1].tolist() and alone.prompt_length == prompts.shape[1]


def test_a_generation(bundled: krait.LanguageModel) -> None:
    made = bundled.generate("ROMEO:", max_new_tokens=12, seed=1)
    assert made.new_ids == made.ids[made.prompt_length :] and len(made.new_ids) == 12
    assert made.text == bundled.tokenizer.decode(made.new_ids) and made.text
    assert made.finish_reason == "length" and made.seed == 1
    assert made.timing.prompt_tokens == made.prompt_length and made.timing.new_tokens == 12
    logits = bundled.logits(made.ids).astype(np.float64)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    places = np.arange(made.prompt_length, len(made.ids))
    expected = logits[places - 1, made.new_ids]
    assert_near(bundled, made.logprobs, expected, 1e-4)


def test_seeds(bundled: krait.LanguageModel) -> None:
    def text(seed: int | None) -> krait.Generation:
        return bundled.generate("ROMEO:", 24, seed=seed)

    assert text(7) == text(7)
    assert text(7).text != text(8).text
    drawn = text(None)
    assert drawn == text(drawn.seed) == text(np.uint64(drawn.seed))  # type: ignore[arg-type]
    assert text(2**64 - 1) == text(2**64 - 1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed is"):
            text(seed)


def test_kinds_of_prompts(bundled: krait.LanguageModel) -> None:
    tokenizer = bundled.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=True) for text in ("ROMEO:", "JULIET:\nAy")]
    texts = bundled.generate(["ROMEO:", "JULIET:\nAy"], 5, temperature=0)
    assert [g.ids for g in bundled.generate(ids, 5, temperature=0)] == [g.ids for g in texts]
    for one, expected in zip(ids, texts, strict=True):
        assert bundled.generate(one, 5, temperature=0).text == expected.text
        assert bundled.generate(np.array(one), 5, temperature=0).text == expected.text
    rows = [np.array(ids[0], np.int32), np.array(ids[1], np.int32)]
    assert [g.text for g in bundled.generate(rows, 5, temperature=0)] == [g.text for g in texts]
    assert bundled.generate([], 5) == []
    assert bundled.generate("ROMEO:", 0).text == ""


def test_stop_texts_and_ends(bundled: krait.LanguageModel) -> None:
    free = bundled.generate("ROMEO:", 60, seed=3)
    stop = free.text[10:14]
    ended = bundled.generate("ROMEO:", 60, seed=3, stop=stop)
    assert ended.text == free.text[: free.text.index(stop)] and ended.finish_reason == "stop"
    assert bundled.generate("ROMEO:", 60, seed=3, stop=["never there", stop]) == ended
    eos = bundled.eos_token_ids[0]
    likely = bundled.generate([eos], 3, temperature=0, ignore_eos=True)
    assert likely.finish_reason == "length"


def test_sampling_options_reach_the_library(bundled: krait.LanguageModel) -> None:
    greedy = bundled.generate("ROMEO:", 16, temperature=0).ids
    assert bundled.generate("ROMEO:", 16, top_k=1, seed=5).ids == greedy
    assert bundled.generate("ROMEO:", 16, top_p=1e-9, seed=5).ids == greedy
    assert bundled.generate("ROMEO:", 16, min_p=1.0, seed=5).ids == greedy
    penalised = bundled.generate("ROMEO:", 16, temperature=0, repetition_penalty=1e6)
    assert len(set(penalised.new_ids)) == 16
    half = bundled.generate("ROMEO:", 8, temperature=0, state_dtype="bf16")
    assert len(half.new_ids) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"state_dtype": "f64"}, "dtype is 'f64'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_options_out_of_range(
    bundled: krait.LanguageModel, options: dict[str, object], message: str, stream: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        made = bundled.generate("ROMEO:", stream=stream, **options)  # type: ignore[call-overload]
        if stream:
            list(made)


def test_refused_prompts(bundled: krait.LanguageModel, golden: Path) -> None:
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        bundled.generate([[1], []])
    with pytest.raises(ValueError, match="id 1024 at position 0 of sequence 0"):
        bundled.generate([1024])
    with pytest.raises(ValueError, match="id 1024"):
        list(bundled.generate([1024], stream=True))
    with pytest.raises(TypeError, match="prompt 1 is int, expected str"):
        bundled.generate(["a", 3])
    with pytest.raises(TypeError, match="max_new_tokens is 'b', expected an integer"):
        bundled.generate("a", "b")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="max_new_tokens is 3.5, expected an integer"):
        bundled.generate("a", 3.5)  # type: ignore[call-overload]
    bare = krait.LanguageModel.from_pretrained(golden / "mamba1-tiny", device=DEVICE)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        bare.generate("text")
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        bare.generate([1, 2], stream=True)
    with pytest.raises(ValueError, match="stop texts need a tokenizer"):
        bare.generate([1, 2], stop="x")


def test_a_stream_is_the_text(bundled: krait.LanguageModel) -> None:
    whole = bundled.generate("ROMEO:", 50, seed=11, stop="lord")
    stream = bundled.generate("ROMEO:", 50, seed=11, stop="lord", stream=True)
    pieces = list(stream)
    assert len(pieces) > 5 and "".join(pieces) == whole.text
    assert stream.generation == whole and stream.generations == [whole]
    assert list(stream) == []


def test_a_stream_of_several(bundled: krait.LanguageModel) -> None:
    prompts = ["ROMEO:", "JULIET:", "Enter"]
    whole = bundled.generate(prompts, 30, seed=5)
    stream = bundled.generate(prompts, 30, seed=5, stream=True)
    texts = [""] * 3
    for index, piece in stream:
        texts[index] += piece
    assert texts == [g.text for g in whole] and stream.generations == whole
    with pytest.raises(ValueError, match="several prompts"):
        _ = stream.generation


def test_characters_are_never_cut(golden: Path) -> None:
    model = krait.LanguageModel.from_pretrained(device=DEVICE)
    # Tokens of single bytes, at random: most characters need several of them.
    stream = model.generate("ROMEO:", 200, temperature=50.0, top_p=1.0, seed=1, stream=True)
    assert "".join(stream) == stream.generation.text


def test_closing_a_stream_ends_the_generation(bundled: krait.LanguageModel) -> None:
    stream = bundled.generate("ROMEO:", ENDLESS, ignore_eos=True, stream=True)
    with pytest.raises(ValueError, match="has not ended yet"):
        _ = stream.generations
    first = list(itertools.islice(stream, 3))
    stream.close()
    made = stream.generation
    assert made.finish_reason == "interrupted" and made.text.startswith("".join(first))
    assert list(stream) == []
    stream.close()
    with bundled.generate("ROMEO:", ENDLESS, ignore_eos=True, stream=True) as other:
        next(other)
    assert other.generation.finish_reason == "interrupted"


def test_a_dropped_stream_ends(bundled: krait.LanguageModel) -> None:
    for _ in range(3):
        for _piece in bundled.generate("ROMEO:", ENDLESS, ignore_eos=True, stream=True):
            break
        gc.collect()
        began = time.monotonic()
        bundled.logits([1])  # waits for whoever works on the model
        assert time.monotonic() - began < 20


def test_streams_beside_each_other(bundled: krait.LanguageModel) -> None:
    one = bundled.generate("ROMEO:", 20, seed=1, stream=True)
    two = bundled.generate("ROMEO:", 20, seed=1, stream=True)
    assert list(zip(one, two, strict=True)) == [(piece, piece) for piece in list_of(bundled)]


def list_of(model: krait.LanguageModel) -> list[str]:
    return list(model.generate("ROMEO:", 20, seed=1, stream=True))


def test_a_stream_that_never_began(bundled: krait.LanguageModel) -> None:
    first = bundled.generate("ROMEO:", ENDLESS, ignore_eos=True, stream=True)
    next(first)
    second = bundled.generate("JULIET:", 10, stream=True)
    second.close()  # while the first is at work
    assert second.generation.finish_reason == "interrupted" and second.generation.new_ids == []
    first.close()
