"""States: prefill and steps, forks, images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from where import DEVICE, assert_near

import krait

MODELS = ["", "hf-mamba-tiny", "mamba2attn-tiny", "hf-gptneox-tiny"]
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name or "bundled")
def model(request: pytest.FixtureRequest, golden: Path) -> krait.LanguageModel:
    name = golden / request.param if request.param else None
    return krait.LanguageModel.from_pretrained(name, device=DEVICE)


def test_prefill_and_steps_agree(model: krait.LanguageModel) -> None:
    whole = model.logits(IDS)
    state = model.new_state()
    assert state.position == 0 and state.model is model
    split = [model.logits(IDS[:3], state=state), model.logits(IDS[3:5], state=state)]
    assert_near(model, np.concatenate(split), whole[:5], 1e-4)
    for place in range(5, len(IDS)):
        assert_near(model, state.step(IDS[place]), whole[place], 1e-4)
    assert state.position == len(IDS)


def test_forks_go_on_by_themselves(model: krait.LanguageModel) -> None:
    state = model.new_state()
    model.logits(IDS[:4], state=state)
    fork = state.fork()
    other = state.step(7)
    assert_near(model, fork.step(IDS[4]), model.logits(IDS[:5], last=True), 1e-4)
    assert_near(model, other, model.logits([*IDS[:4], 7], last=True), 1e-4)
    earlier = state.fork()
    again = state.step(8)
    state.rollback(earlier)
    assert state.position == earlier.position == 5
    np.testing.assert_array_equal(state.step(8), again)
    state.reset()
    assert state.position == 0
    anew = model.logits(IDS[:4], state=state, last=True)
    assert_near(model, anew, model.logits(IDS[:4], last=True), 1e-5)


def test_a_batch_of_states(model: krait.LanguageModel) -> None:
    states = model.new_states(3)
    rows = [IDS[:5], IDS[2:4], IDS[:1]]
    last = model.logits(rows, state=states, last=True)
    for row, logits in zip(rows, last, strict=True):
        assert_near(model, logits, model.logits(row, last=True), 1e-4)
    assert [state.position for state in states] == [5, 2, 1]
    stepped = model.step([7, 8, 9], states)
    for row, id, logits in zip(rows, (7, 8, 9), stepped, strict=True):
        assert_near(model, logits, model.logits([*row, id], last=True), 1e-4)
    # States that were made one by one are of the same pool.
    model.step([1, 2], [states[0], model.new_state()])
    assert model.step([], []).shape == (0, model.padded_vocab_size)


def test_images(model: krait.LanguageModel, golden: Path) -> None:
    state = model.new_state()
    model.logits(IDS[:6], state=state)
    image = state.to_bytes()
    assert isinstance(image, bytes) and len(image) > state.nbytes
    copy = krait.State.from_bytes(model, image)
    assert copy.position == 6
    np.testing.assert_array_equal(copy.step(2), state.fork().step(2))
    # On the same model, loaded anew.
    name = None if model.name == "bundled model" else model.name
    other = krait.LanguageModel.from_pretrained(name, device=DEVICE)
    assert_near(model, other.load_state(image).step(2), state.step(2), 1e-5)


def test_damaged_images(bundled: krait.LanguageModel, golden: Path) -> None:
    state = bundled.new_state()
    bundled.logits(IDS, state=state)
    image = state.to_bytes()
    for bad in (b"", b"nonsense", image[:-1], image[:100], image[:-8] + b"12345678"):
        with pytest.raises(ValueError, match="state"):
            bundled.load_state(bad)
    flipped = bytearray(image)
    flipped[len(image) // 2] ^= 1
    with pytest.raises(ValueError):
        krait.State.from_bytes(bundled, bytes(flipped))
    other = krait.LanguageModel.from_pretrained(golden / "hf-mamba-tiny", device=DEVICE)
    with pytest.raises(ValueError, match="belongs to a model with fingerprint"):
        other.load_state(image)
    with pytest.raises(TypeError):
        bundled.load_state("text")  # type: ignore[arg-type]


def test_states_of_16_bits(bundled: krait.LanguageModel) -> None:
    exact, half = bundled.new_state(), bundled.new_state("bf16")
    assert (exact.dtype, half.dtype) == ("f32", "bf16") and half.nbytes < exact.nbytes
    difference = bundled.logits(IDS, state=exact) - bundled.logits(IDS, state=half)
    assert np.abs(difference).max() < 1.0
    np.testing.assert_allclose(
        bundled.load_state(exact.to_bytes(), "bf16").step(1), exact.step(1), atol=1.0
    )
    copy = krait.State.from_bytes(bundled, half.to_bytes(), "bf16")
    assert copy.dtype == "bf16" and krait.State.from_bytes(bundled, half.to_bytes()).dtype == "f32"
    bundled.step([1, 2], [copy, half])  # one batch
    with pytest.raises(ValueError, match="different pools"):
        bundled.step([1, 2], [exact, half])
    with pytest.raises(ValueError, match="rollback to a state of another"):
        exact.rollback(half)


def test_refusals_leave_states_as_they_were(bundled: krait.LanguageModel, golden: Path) -> None:
    state = bundled.new_state()
    bundled.logits(IDS[:3], state=state)
    image = state.to_bytes()
    with pytest.raises(ValueError, match="id 5000 at position 1"):
        bundled.logits([1, 5000], state=state)
    with pytest.raises(ValueError, match="id -1"):
        state.step(-1)
    with pytest.raises(ValueError, match="share one state"):
        bundled.step([1, 2], [state, state])
    with pytest.raises(ValueError, match="1 states for 2 rows"):
        bundled.logits([[1], [2]], state=state)
    other = krait.LanguageModel.from_pretrained(device=DEVICE)
    with pytest.raises(ValueError, match="state 0 belongs to another model"):
        other.step(1, state)
    with pytest.raises(ValueError):
        state.rollback(other.new_state())
    with pytest.raises(ValueError, match="count of states is -1"):
        bundled.new_states(-1)
    if DEVICE == "cpu":
        with pytest.raises(MemoryError, match="count of states is 1000000000000: at .* bytes each"):
            bundled.new_states(10**12)
    assert state.to_bytes() == image


def test_many_states_come_and_go(bundled: krait.LanguageModel) -> None:
    kept = bundled.new_state()
    bundled.logits(IDS, state=kept)
    expected = kept.fork().step(1)
    for count in (1, 40, 3):
        forks = [kept.fork() for _ in range(count)]
        out = bundled.step([1] * count, forks)
        assert_near(bundled, out, np.tile(expected, (count, 1)), 1e-4)
    assert kept.position == len(IDS)


def test_a_state_outlives_its_model(golden: Path) -> None:
    state = krait.LanguageModel.from_pretrained(golden / "hf-mamba-tiny", device=DEVICE).new_state()
    assert state.step(3).shape == (state.model.padded_vocab_size,)
