"""Sampling, decoding and the state it goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import (
    DecodingCGCache,
    InferenceParams,
    capture_graph,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    update_graph_cache,
)
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden" / "sampler"


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, -1.0]])
    modify_logits_for_top_k_filtering(logits, 2)
    assert kept(logits) == [[1, 3], [0, 1]]
    before = logits.clone()
    for k in (0, 4, 100):
        modify_logits_for_top_k_filtering(logits, k)
    assert torch.equal(logits, before)
    with pytest.raises(ValueError, match="top_k is -1"):
        modify_logits_for_top_k_filtering(logits, -1)


def test_top_p() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    for p, expected in [
        (0.4, [[1], [0, 1]]),
        (0.6, [[1, 3], [0, 1, 2]]),
        (0.8, [[1, 2, 3], [0, 1, 2, 3]]),
        (0.0, [[0, 1, 2, 3]] * 2),
        (1.0, [[0, 1, 2, 3]] * 2),
    ]:
        logits = probabilities.log()
        modify_logits_for_top_p_filtering(logits, p)
        assert kept(logits) == expected, p


def test_min_p_is_relative_to_the_largest_probability() -> None:
    probabilities = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.01, 0.01, 0.01, 0.97]])
    for p, expected in [
        (0.2, [[1, 2, 3], [3]]),
        (0.5, [[1, 3], [3]]),
        (0.0, [[0, 1, 2, 3]] * 2),
        (1.0, [[0, 1, 2, 3]] * 2),
    ]:
        # Shifted logits mean the same.
        for shift in (-7.0, 0.0, 7.0):
            logits = probabilities.log() + shift
            modify_logits_for_min_p_filtering(logits, p)
            assert kept(logits) == expected, p


def test_repetition_penalty_counts_an_id_once() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [4.0, 4.0, 4.0]])
    previous = torch.tensor([[0, 1, 0], [2, 2, 2]])
    out = modify_logit_for_repetition_penalty(logits, previous, 2.0)
    assert out is logits
    assert logits.tolist() == [[1.0, -4.0, 1.0], [4.0, 4.0, 2.0]]
    assert modify_logit_for_repetition_penalty(logits, previous) is logits
    with pytest.raises(ValueError, match="repetition_penalty is 0"):
        modify_logit_for_repetition_penalty(logits, previous, 0.0)


def golden(name: str) -> Tensor:
    numpy = pytest.importorskip("numpy")
    return torch.from_numpy(numpy.load(GOLDEN / f"{name}.npy"))


def test_filters_agree_with_independent_ones() -> None:
    logits = golden("logits")

    def check(name: str, logits: Tensor) -> None:
        torch.testing.assert_close(logits.softmax(-1), golden(name), rtol=1e-4, atol=1e-6)

    for k in (5, 40):
        filtered = logits.clone()
        modify_logits_for_top_k_filtering(filtered, k)
        check(f"top_k_{k}", filtered)
    for p in (0.5, 0.9):
        cut = logits.clone()
        modify_logits_for_top_p_filtering(cut, p)
        check(f"top_p_{p}", cut)
    filtered /= 0.7
    modify_logits_for_top_p_filtering(filtered, 0.9)
    check("top_k_40_temp_0.7_top_p_0.9", filtered)
    penalised = modify_logit_for_repetition_penalty(logits.clone(), golden("prev").long(), 1.3)
    torch.testing.assert_close(penalised, golden("rep_penalty_1.3"))


def frequencies(logits: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    draws = sample(logits.expand(20000, -1), **options)
    return torch.bincount(draws, minlength=logits.shape[-1]) / 20000


def test_sample_draws_from_what_is_left() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.3])
    logits = probabilities.log()

    def check(expected: list[float], **options: Any) -> None:
        wanted = torch.tensor(expected)
        found = frequencies(logits, **options)
        assert (found[wanted == 0] == 0).all()
        assert torch.allclose(found, wanted / wanted.sum(), atol=0.015), (options, found)

    check([0, 1, 0, 0])
    check([0, 1, 0, 0], top_k=3, temperature=0.0)
    check([0.05, 0.4, 0.25, 0.3], top_k=0)
    check([0, 0.4, 0, 0.3], top_k=2)
    check([0, 0.4, 0.25, 0.3], top_k=4, top_p=0.9)
    check([0.05**2, 0.4**2, 0.25**2, 0.3**2], top_k=0, temperature=0.5)
    check([0, 0.4, 0.25, 0.3], top_k=0, min_p=0.5)
    # min_p comes before temperature, top_p after it.
    check([0, 0.4**2, 0.25**2, 0.3**2], top_k=0, min_p=0.5, temperature=0.5)
    check([0, 0.4, 0, 0.3], top_k=0, min_p=0.5, top_p=0.7)
    before = logits.clone()
    sample(logits[None], top_k=0, top_p=0.5, min_p=0.1)
    assert torch.equal(logits, before)
    with pytest.raises(ValueError, match="temperature is -1"):
        sample(logits[None], top_k=0, temperature=-1.0)


def model_of(kind: str, dtype: Optional[torch.dtype] = None) -> MambaLMHeadModel:
    torch.manual_seed(1)
    ssm_cfg: dict[str, Any] = {"layer": "Mamba1", "d_state": 8}
    changes: dict[str, Any] = {}
    if kind != "Mamba1":
        ssm_cfg = {"layer": "Mamba2", "d_state": 8, "headdim": 16}
    if kind == "hybrid":
        changes = {
            "attn_layer_idx": [1],
            "attn_cfg": {
                "num_heads": 4,
                "num_heads_kv": 2,
                "causal": True,
                "d_conv": 3,
                "rotary_emb_dim": 8,
            },
            "d_intermediate": 40,
        }
    config = MambaConfig(d_model=32, n_layer=3, vocab_size=53, ssm_cfg=ssm_cfg, **changes)
    config.tie_embeddings = False
    model = MambaLMHeadModel(config, dtype=dtype)
    with torch.no_grad():
        model.backbone.embedding.weight.normal_(std=0.7)
        model.lm_head.weight.normal_(std=0.3)
    return model


KINDS = ["Mamba1", "Mamba2", "hybrid"]


@pytest.mark.parametrize("cg", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_given_tokens_are_those_of_a_forward_pass(
    dtype: torch.dtype, kind: str, cg: bool
) -> None:
    model = model_of(kind, dtype)
    ids = torch.randint(0, 53, (3, 20))
    expected = model(ids).logits.detach()
    for prompt in (1, 2, 10):
        output = model.generate(
            ids[:, :prompt],
            max_length=20,
            cg=cg,
            teacher_outputs=ids,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert torch.equal(output.sequences, ids)
        scores = torch.stack(output.scores, dim=1)
        scale = expected.abs().max()
        close(scores / scale, expected[:, prompt - 1 : -1] / scale, dtype)


@pytest.mark.parametrize("cg", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_growing_sequences(kind: str, cg: bool) -> None:
    model = model_of(kind)
    # Padding rows of the head would win if they could.
    with torch.no_grad():
        model.lm_head.weight[53:] = 1e3 * torch.randn(3, 32)
    prompt = torch.randint(0, 53, (2, 5))
    ids = prompt
    for _ in range(12):
        following = model(ids).logits[:, -1, :53].argmax(-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
    assert torch.equal(model.generate(prompt, max_length=17, cg=cg), ids)
    # The state of the earlier text is left behind.
    assert torch.equal(model.generate(prompt, max_length=17, cg=cg), ids)
    assert torch.equal(model.generate(prompt[:1], max_length=17, cg=cg), ids[:1])


def test_what_generate_returns() -> None:
    model = model_of("Mamba2")
    prompt = torch.randint(0, 53, (2, 4))
    sequences = model.generate(prompt, max_length=7)
    assert isinstance(sequences, Tensor) and sequences.shape == (2, 7)
    output = model.generate(prompt, max_length=7, return_dict_in_generate=True)
    assert output.scores is None and torch.equal(output["sequences"], output[0])
    output = model.generate(prompt, max_length=7, return_dict_in_generate=True, output_scores=True)
    assert [s.shape for s in output.scores] == [(2, 56)] * 3
    assert output[1] is output.scores
    output = decode(prompt, model, 7, vocab_size=50, output_scores=True)
    assert [s.shape for s in output.scores] == [(2, 50)] * 3
    assert torch.equal(model.generate(prompt, max_length=3), prompt)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 0\)"):
        model.generate(prompt[:, :0], max_length=3)


def test_seeds() -> None:
    model = model_of("Mamba1")
    prompt = torch.randint(0, 53, (2, 4))

    def text(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(prompt, max_length=24, top_k=0, top_p=0.95, temperature=1.5)

    assert torch.equal(text(3), text(3))
    assert not torch.equal(text(3), text(4))


def test_ends_once_every_sequence_has_ended() -> None:
    model = model_of("Mamba2")
    prompt = torch.randint(0, 53, (2, 4))
    free = model.generate(prompt, max_length=40)
    # The token that the first sequence writes third ends both, at different places if at all.
    end = int(free[0, 6])
    out = model.generate(prompt, max_length=40, eos_token_id=end)
    first = [
        int((row[4:] == end).nonzero()[0]) + 4 if (row[4:] == end).any() else 39 for row in free
    ]
    assert out.shape[1] == max(first) + 1
    for row, whole, stop in zip(out, free, first):
        assert torch.equal(row[: stop + 1], whole[: stop + 1])
        assert (row[stop + 1 :] == end).all()


def test_streams_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.ended += 1

    streamer = Streamer()
    model = model_of("Mamba2")
    prompt = torch.randint(0, 53, (1, 4))
    out = model.generate(prompt, max_length=8, streamer=streamer, enable_timing=True)
    assert [tuple(p.shape) for p in streamer.pieces] == [(1, 4), (1,), (1,), (1,), (1,)]
    assert torch.equal(torch.cat([p.flatten() for p in streamer.pieces]), out[0].cpu())
    assert streamer.ended == 1
    assert "decoding time" in capsys.readouterr().out


def test_streamer_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")

    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    model = model_of("Mamba2")
    streamer = transformers.TextStreamer(Tokenizer(), skip_prompt=True)
    out = model.generate(torch.randint(0, 53, (1, 4)), max_length=9, streamer=streamer)
    assert capsys.readouterr().out.split() == [str(int(i)) for i in out[0, 4:]]


@pytest.mark.parametrize("kind", ["Mamba2"])
def test_packed_prompts(kind: str) -> None:
    """Prompts of different lengths in one row, then a step for all of them at once."""
    model = model_of(kind)
    lengths, new = [17, 6, 1, 9], 5
    prompts = [torch.randint(0, 53, (1, n)) for n in lengths]
    expected = [
        model.generate(
            p, max_length=p.shape[1] + new, return_dict_in_generate=True, output_scores=True
        )
        for p in prompts
    ]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    state = InferenceParams(max_seqlen=64, max_batch_size=len(lengths))
    with torch.no_grad():
        packed = model(
            torch.cat(prompts, dim=1),
            inference_params=state,
            seq_idx=seq_idx[None].to(torch.int32),
            cu_seqlens=bounds,
        ).logits
        logits = [packed[0, bounds[1:].long() - 1]]
        tokens = [logits[0][:, :53].argmax(-1)]
        for _ in range(new - 1):
            state.seqlen_offset += 1
            logits.append(model(tokens[-1][:, None], inference_params=state).logits[:, 0])
            tokens.append(logits[-1][:, :53].argmax(-1))
    for i, output in enumerate(expected):
        close(torch.stack([step[i] for step in logits]), torch.cat(output.scores))
        assert torch.equal(torch.stack([t[i] for t in tokens]), output.sequences[0, lengths[i] :])


def test_inference_params() -> None:
    params = InferenceParams(10, 2, seqlen_offset=3, lengths_per_sample=torch.tensor([3, 3]))
    params.key_value_memory_dict[0] = "state"
    params.reset(20, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (20, 4, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]
    assert params.key_value_memory_dict == {0: "state"}


@pytest.mark.parametrize("layer, shapes", [
    ("Mamba1", [(2, 64, 4), (2, 64, 8)]),
    ("Mamba2", [(2, 80, 4), (2, 4, 16, 8)]),
])  # fmt: skip
def test_shapes_of_the_state(layer: str, shapes: list[tuple[int, ...]]) -> None:
    model = model_of(layer)
    params = InferenceParams(max_seqlen=10, max_batch_size=2)
    model(torch.randint(0, 53, (2, 5)), inference_params=params)
    for i in range(3):
        assert [tuple(t.shape) for t in params.key_value_memory_dict[i]] == shapes
    cache = model.allocate_inference_cache(2, 10)
    assert [tuple(t.shape) for t in cache[0]] == shapes


def test_graph_cache_is_used_again() -> None:
    model = model_of("Mamba2")
    cache = update_graph_cache(model, None, 2, 5, 20)
    assert isinstance(cache, DecodingCGCache)
    assert cache.max_batch_size == 2 and cache.max_seqlen == 20
    state = cache.inference_params
    assert update_graph_cache(model, cache, 2, 5, 15).inference_params is state
    assert update_graph_cache(model, cache, 3, 5, 15).inference_params is not state
    state = cache.inference_params
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert update_graph_cache(model, cache, 3, 5, 15).inference_params is not state


def test_recorded_step() -> None:
    model = model_of("Mamba2")
    ids = torch.randint(0, 53, (2, 6))
    state = InferenceParams(10, 2, lengths_per_sample=torch.zeros(2, dtype=torch.int32))
    state.key_value_memory_dict = model.allocate_inference_cache(2, 10)
    run = capture_graph(model, state, 2, 10)
    state.seqlen_offset = 0
    with torch.no_grad():
        model(ids[:, :5], inference_params=state)
    logits = run(ids[:, 5:], torch.full((2, 1), 5), 5)
    close(logits, model(ids).logits[:, 5:])
