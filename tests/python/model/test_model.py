"""Loading, logits and scores."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from where import DEVICE, assert_near

import krait

CHECKPOINTS = [
    "hf-mamba-tiny",
    "hf-mamba2-tiny",
    "hf-gptneox-tiny",
    "mamba1-tiny",
    "mamba2-tiny",
    "mamba2attn-tiny",
    "transformerpp-tiny",
]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_other_implementations(golden: Path, name: str) -> None:
    model = krait.LanguageModel.from_pretrained(golden / name, device=DEVICE)
    ids = np.load(golden / name / "input_ids.npy")
    expected = np.load(golden / name / "logits.npy")
    logits = model.logits(ids)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(model.logits(ids[1]), expected[1], atol=2e-4, rtol=1e-3)
    last = model.logits(ids, last=True)
    np.testing.assert_allclose(last, expected[:, -1], atol=2e-4, rtol=1e-3)


def test_rows_of_different_lengths(bundled: krait.LanguageModel) -> None:
    rows = [[5, 6, 7, 8], [9], [10, 11]]
    together = bundled.logits(rows, last=True)
    for row, logits in zip(rows, together, strict=True):
        assert_near(bundled, logits, bundled.logits(row, last=True), 1e-5)
    with pytest.raises(ValueError, match="rows of 1 to 4 tokens, expected equal lengths"):
        bundled.logits(rows)


def test_ids_of_every_integer_type(bundled: krait.LanguageModel) -> None:
    expected = bundled.logits([1, 2, 3], last=True)
    for kind in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64):
        ids = np.array([1, 2, 3], kind)
        np.testing.assert_array_equal(bundled.logits(ids, last=True), expected)
    strided = np.array([1, 0, 2, 0, 3, 0])[::2]
    np.testing.assert_array_equal(bundled.logits(strided, last=True), expected)
    np.testing.assert_array_equal(bundled.logits((1, 2, 3), last=True), expected)


def test_a_text_is_encoded(bundled: krait.LanguageModel) -> None:
    ids = bundled.tokenizer.encode("ROMEO:", add_special_tokens=True)
    np.testing.assert_array_equal(bundled.logits("ROMEO:"), bundled.logits(ids))


def test_refusals(bundled: krait.LanguageModel) -> None:
    model = bundled
    with pytest.raises(ValueError, match="id 99999 at position 1 of sequence 0, expected 0 to"):
        model.logits([1, 99999])
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        model.logits([[1], []], last=True)
    with pytest.raises(ValueError, match="no rows"):
        model.logits([])
    with pytest.raises(TypeError, match="dtype float64, expected integers"):
        model.logits([1.5])
    with pytest.raises(TypeError, match="prompts are int"):
        model.logits(3)
    with pytest.raises(ValueError, match="row of shape"):
        model.logits(np.zeros((1, 1, 1), np.int64))
    with pytest.raises(ValueError, match="18446744073709551615"):
        model.logits(np.array([2**64 - 1], np.uint64))


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        krait.LanguageModel.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        krait.LanguageModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="forbids to fetch it"):
        krait.LanguageModel.from_pretrained("some/model", offline=True, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="some/model@v2"):
        krait.LanguageModel.from_pretrained(
            "some/model", revision="v2", offline=True, cache_dir=tmp_path
        )
    with pytest.raises(TypeError):
        krait.LanguageModel.from_pretrained(3)  # type: ignore[arg-type]


def test_options_out_of_range(golden: Path) -> None:
    with pytest.raises(ValueError, match="device is 'tpu', expected cpu"):
        krait.LanguageModel.from_pretrained(device="tpu")
    with pytest.raises(ValueError, match="dtype is 'i8', expected one of 'f32', 'bf16', 'f16'"):
        krait.LanguageModel.from_pretrained(dtype="i8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads is 5000"):
        krait.LanguageModel.from_pretrained(threads=5000)


def test_damaged_checkpoints(golden: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(golden / "hf-mamba-tiny", directory)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        krait.LanguageModel.from_pretrained(directory)
    (directory / "config.json").write_text(config)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors"):
        krait.LanguageModel.from_pretrained(directory)


def test_a_model_of_the_cache(golden: Path, tmp_path: Path) -> None:
    commit = "a" * 40
    root = tmp_path / "models--some--model"
    shutil.copytree(golden / "hf-mamba-tiny", root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "v2").write_text(commit)
    for revision in ("v2", commit):
        model = krait.LanguageModel.from_pretrained(
            "some/model", revision=revision, cache_dir=tmp_path, offline=True
        )
        assert model.name.startswith("some/model") and model.format == "mamba"


def test_what_a_model_says_of_itself(bundled: krait.LanguageModel, golden: Path) -> None:
    assert bundled.name == "bundled model"
    assert bundled.device.partition(":")[0] == DEVICE and bundled.format == "mamba_ssm"
    assert bundled.vocab_size == bundled.padded_vocab_size == 1024
    assert bundled.config["d_model"] == 192 and bundled.config["ssm_cfg"]["layer"] == "Mamba2"
    described = bundled.describe()
    assert described.architecture == "6 x Mamba2" and described.n_layer == 6
    assert described.parameters == sum(described.parameters_by_part.values())
    assert described.weight_bytes == sum(described.bytes_by_dtype.values())
    assert described.parameters == sum(w.size for w in bundled.parameters().values())
    assert "bundled model" in repr(bundled)
    hybrid = krait.LanguageModel.from_pretrained(golden / "mamba2attn-tiny", device=DEVICE)
    assert hybrid.describe().state_bytes_per_token > 0
    assert hybrid.padded_vocab_size >= hybrid.vocab_size
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        _ = hybrid.tokenizer
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        hybrid.logits("text")


def test_the_dtype_of_matrices(bundled: krait.LanguageModel) -> None:
    half = krait.LanguageModel.from_pretrained(device=DEVICE, dtype="bf16")
    assert set(half.describe().bytes_by_dtype) == {"bf16", "f32"}
    exact = bundled.logits("ROMEO:", last=True)
    rounded = half.logits("ROMEO:", last=True)
    assert 0 < np.abs(exact - rounded).max() < 0.5


@pytest.mark.parametrize("format", ["krait", "upstream", "hf"])
def test_saved_models_are_the_same(golden: Path, tmp_path: Path, format: str) -> None:
    model = krait.LanguageModel.from_pretrained(golden / "hf-mamba-tiny", device=DEVICE)
    model.save_pretrained(tmp_path / "copy", format=format)  # type: ignore[arg-type]
    again = krait.LanguageModel.from_pretrained(tmp_path / "copy", device=DEVICE)
    np.testing.assert_array_equal(again.logits([1, 2, 3]), model.logits([1, 2, 3]))
    for name, weight in model.parameters().items():
        np.testing.assert_array_equal(again.parameters()[name], weight)


def test_saving(bundled: krait.LanguageModel, golden: Path, tmp_path: Path) -> None:
    bundled.save_pretrained(tmp_path, dtype="bf16")
    again = krait.LanguageModel.from_pretrained(tmp_path, device=DEVICE)
    assert again.tokenizer.encode("Ay") == bundled.tokenizer.encode("Ay")
    with pytest.raises(ValueError, match="is there already"):
        bundled.save_pretrained(tmp_path, format="upstream")
    with pytest.raises(ValueError, match="format is 'gguf', expected one of 'krait', 'upstream'"):
        bundled.save_pretrained(tmp_path, format="gguf")  # type: ignore[arg-type]
    neox = krait.LanguageModel.from_pretrained(golden / "hf-gptneox-tiny", device=DEVICE)
    with pytest.raises(ValueError):
        neox.save_pretrained(tmp_path / "neox", format="upstream")
    assert not (tmp_path / "neox").exists()


def test_fresh_weights(tmp_path: Path) -> None:
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"layer": "Mamba1"}}
    model = krait.LanguageModel.from_config(config, seed=3, device=DEVICE)
    assert model.padded_vocab_size == 64
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    again = krait.LanguageModel.from_config(path, seed=3, device=DEVICE)
    other = krait.LanguageModel.from_config(path, seed=2**64 - 1, device=DEVICE)
    np.testing.assert_array_equal(model.logits([1, 2]), again.logits([1, 2]))
    assert np.abs(model.logits([1, 2]) - other.logits([1, 2])).max() > 0
    with pytest.raises(ValueError, match="d_model"):
        krait.LanguageModel.from_config({"d_model": -1}, device=DEVICE)
    with pytest.raises(FileNotFoundError):
        krait.LanguageModel.from_config(tmp_path / "absent.json", device=DEVICE)


def test_scores(bundled: krait.LanguageModel) -> None:
    text = "But soft, what light through yonder window breaks?"
    ids = np.array(bundled.tokenizer.encode(text))
    logits = bundled.logits(ids).astype(np.float64)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    losses = -logits[np.arange(len(ids) - 1), ids[1:]]
    score = bundled.score(text)
    assert score.tokens == len(ids) - 1
    assert math.isclose(score.loss, losses.mean(), rel_tol=1e-5)
    assert math.isclose(score.perplexity, math.exp(score.loss), rel_tol=1e-9)
    bits = score.loss / math.log(2) * len(ids) / len(text)
    assert score.bits_per_byte is not None and math.isclose(score.bits_per_byte, bits, rel_tol=1e-6)
    by_ids = bundled.score(ids)
    assert math.isclose(by_ids.loss, score.loss, rel_tol=1e-6) and by_ids.bits_per_byte is None
    blocks = bundled.score(text, block=4)
    rows = ids[: len(ids) // 4 * 4].reshape(-1, 4)
    assert blocks.tokens == rows.shape[0] * 3
    assert math.isclose(bundled.score(rows).loss, blocks.loss, rel_tol=1e-6)


def test_a_published_loss(golden: Path) -> None:
    model = krait.LanguageModel.from_pretrained(golden / "shakespeare", device=DEVICE)
    ids = np.load(golden / "shakespeare" / "val_ids.npy")[:8]
    rows = [model.score(row).loss for row in ids]
    assert math.isclose(model.score(ids).loss, np.mean(rows), rel_tol=1e-6)
    whole = float(np.load(golden / "shakespeare" / "val_loss.npy"))
    assert abs(np.mean(rows) - whole) < 0.5


def test_refused_scores(bundled: krait.LanguageModel) -> None:
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        bundled.score("")
    with pytest.raises(ValueError, match="block is 1"):
        bundled.score("some text", block=1)
    with pytest.raises(ValueError, match="block is 2 with token ids"):
        bundled.score([1, 2, 3], block=2)
    with pytest.raises(ValueError, match=r"ids have shape \(1, 1\)"):
        bundled.score([1])


def test_warnings_are_pythons(bundled: krait.LanguageModel) -> None:
    with pytest.warns(RuntimeWarning, match="min_p is ignored where top_k is given") as caught:
        bundled.generate("ROMEO:", 1, top_k=5, min_p=0.1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundled.generate("ROMEO:", 1)


def test_one_model_in_several_threads(
    bundled: krait.LanguageModel, in_threads: Callable[[int, Callable[[int], None]], None]
) -> None:
    prompts = [[index + 1, 2, 3] for index in range(6)]
    expected = [bundled.logits(prompt) for prompt in prompts]
    greedy = [bundled.generate(prompt, 6, temperature=0).ids for prompt in prompts]

    def work(index: int) -> None:
        for _ in range(5):
            assert_near(bundled, bundled.logits(prompts[index]), expected[index], 1e-5)
            state = bundled.new_state()
            bundled.logits(prompts[index], state=state)
            fork = state.fork()
            del state
            assert fork.position == 3
            stream = bundled.generate(prompts[index], 6, temperature=0, stream=True)
            list(stream)
            assert stream.generation.ids == greedy[index]

    in_threads(6, work)


def test_a_forked_process_is_told(bundled: krait.LanguageModel) -> None:
    bundled.logits([1])
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        text = b"no error"
        try:
            bundled.logits([1])
        except ValueError as error:
            text = str(error).encode()
        os.write(write, text)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "loaded by another process" in pipe.read()
    assert os.waitpid(process, 0)[1] == 0


def test_models_and_states_are_not_pickled(bundled: krait.LanguageModel) -> None:
    with pytest.raises(TypeError, match="load it in the other process"):
        pickle.dumps(bundled)
    with pytest.raises(TypeError, match="to_bytes"):
        copy.copy(bundled.new_state())


def test_a_model_at_work_can_be_looked_at(bundled: krait.LanguageModel) -> None:
    with bundled.generate("ROMEO:", 1 << 30, ignore_eos=True, stream=True) as stream:
        next(stream)
        state_of = repr(bundled), bundled.describe(), bundled.tokenizer.encode("Ay")
        assert next(stream) and all(state_of)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_nothing_leaks(golden: Path) -> None:
    def once() -> None:
        model = krait.LanguageModel.from_pretrained(
            golden / "hf-mamba2-tiny", device=DEVICE, dtype="f32", threads=1
        )
        state = model.new_state()
        model.logits([1, 2, 3], state=state)
        states = [state.fork() for _ in range(20)]
        model.load_state(states[0].to_bytes()).step(1)
        model.generate([1, 2], 4)
        with pytest.raises(ValueError):
            model.logits([-1])

    for _ in range(30):
        once()
    before = _resident_bytes()
    for _ in range(120):
        once()
    grown = _resident_bytes() - before
    # A model and its states hold more than 1 MB, so a leak of either would be far larger.
    assert grown < 16 << 20, f"{grown / 2**20:.1f} MiB more after 120 models"
