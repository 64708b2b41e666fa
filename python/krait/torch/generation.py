"""Text generation for PyTorch language models with a recurrent state.

The names, arguments and defaults are those of ``mamba_ssm.utils.generation``; docs/dropin.md lists
where the results differ from it. Shapes: B sequences, L tokens, V logits (the rows that pad the
head included).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Protocol, Sequence

import torch
from torch import Tensor

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "GenerationOutput",
    "InferenceParams",
    "TextStreamer",
    "capture_graph",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]

_MINUS_INFINITY = float("-inf")


class TextStreamer(Protocol):
    """What ``decode`` asks of a streamer; ``transformers.TextStreamer`` is one."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt (B, L), then the ids (B,) of each step, on the CPU."""

    def end(self) -> None:
        """Called once, after the last step."""


@dataclass
class InferenceParams:
    """The state that layers carry from one call of a model to the next.

    ``key_value_memory_dict[layer_idx]`` holds what a layer keeps: ``(conv_state, ssm_state)``, with
    conv_state (B, D, K) and ssm_state (B, D, N) or (B, H, P, N); for attention its cache of keys
    and values. Layers update it in place. A call with ``seqlen_offset == 0`` is a prefill, any
    other a step.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Optional[Tensor] = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Goes back to the start of a sequence; the tensors of the state stay allocated."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerationOutput:
    """``sequences`` (B, L) int64 and, when asked for, ``scores``: a tuple with the logits (B, V) of
    each step.

    The fields are items too, by name or, as in a tuple of those that are not None, by position.
    """

    sequences: Tensor
    scores: Optional[tuple[Tensor, ...]] = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return (self.sequences,) if self.scores is None else (self.sequences, self.scores)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in ("sequences", "scores"):
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Sets logits (..., V) of tokens less probable than ``min_p`` times the most probable to -inf,
    in place.

    Nothing is dropped for ``min_p`` outside (0, 1).
    """
    if min_p <= 0.0 or min_p >= 1.0:
        return
    wide = logits.float()
    dropped = wide < wide.amax(dim=-1, keepdim=True) + math.log(min_p)
    logits.masked_fill_(dropped, _MINUS_INFINITY)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Sets all but the ``top_k`` largest of the logits (..., V) to -inf, in place. 0 drops nothing.

    Of equal logits the smaller ids are kept first.
    """
    if top_k < 0:
        raise ValueError(f"[sample] top_k is {top_k}, expected 0 (off) or more")
    if top_k == 0 or top_k >= logits.shape[-1]:
        return
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)
    logits.scatter_(-1, order[..., top_k:], _MINUS_INFINITY)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keeps the smallest set of the logits (..., V) whose probability reaches ``top_p``; the others
    become -inf.

    In place; nothing is dropped for ``top_p`` outside (0, 1). Of equal logits the smaller ids are
    kept first.
    """
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ordered, order = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    # A token goes when those before it reach top_p already, so the first always stays.
    dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
    dropped[..., 0] = False
    logits.masked_fill_(torch.zeros_like(dropped).scatter(-1, order, dropped), _MINUS_INFINITY)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Penalises ids seen before (Keskar et al., 2019, CTRL): score * p where negative, score / p
    elsewhere.

    logits (B, V) are changed in place and returned; prev_output_tokens (B, L) int64. An id counts
    once however often it occurs.
    """
    if repetition_penalty == 1.0:
        return logits
    if repetition_penalty <= 0.0:
        raise ValueError(
            f"[sample] repetition_penalty is {repetition_penalty}, expected more than 0"
        )
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def _draw(logits: Tensor) -> Tensor:
    """One index for each row of logits (B, V)."""
    return torch.multinomial(logits.float().softmax(dim=-1), num_samples=1).squeeze(-1)


def sample(
    logits: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Token ids (B,) drawn from logits (B, V), which stay as they are.

    ``top_k == 1`` or ``temperature == 0`` takes the largest. ``top_k > 1`` keeps the k largest,
    then applies temperature and top_p. ``top_k == 0`` applies min_p (relative to the largest
    probability), temperature and top_p, in this order. top_p and min_p are off outside (0, 1).
    """
    if top_k < 0:
        raise ValueError(f"[sample] top_k is {top_k}, expected 0 (off) or more")
    if temperature < 0.0:
        raise ValueError(f"[sample] temperature is {temperature}, expected 0 or more")
    if top_k == 1 or temperature == 0.0:
        return logits.argmax(dim=-1)
    if top_k > 0:
        kept, indices = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
        kept = kept / temperature
        modify_logits_for_top_p_filtering(kept, top_p)
        return indices.gather(-1, _draw(kept).unsqueeze(-1)).squeeze(-1)
    kept = logits.clone()
    modify_logits_for_min_p_filtering(kept, min_p)
    kept = kept / temperature
    modify_logits_for_top_p_filtering(kept, top_p)
    return _draw(kept)


class _Timer:
    """Milliseconds between two points of a device's stream, or of the host where there is none."""

    def __init__(self, device: torch.device):
        self._device = device
        self._start = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def milliseconds(self) -> float:
        return (self._now() - self._start) * 1000.0


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: Optional[int] = None,
    teacher_outputs: Optional[Tensor] = None,
    vocab_size: Optional[int] = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Optional[TextStreamer] = None,
) -> GenerationOutput:
    """Continues input_ids (B, L) int64 up to ``max_length`` tokens, prompt included.

    A row that drew eos_token_id goes on with it, and decoding ends once every row did.
    teacher_outputs (B, T) int64 are taken in place of drawn tokens at the positions they cover, for
    scoring. Ids at and beyond vocab_size (by default ``model.config.vocab_size``) are never drawn.
    cg records a decoding step as a CUDA graph and replays it; on the CPU it changes nothing.
    enable_timing prints the time taken.

    Returns ``sequences`` (B, <= max_length) and ``scores``, the logits (B, V) of each step as the
    model gave them (cut to vocab_size where that was passed).
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"[decode] input_ids has shape {tuple(input_ids.shape)}, expected (B, L) with L > 0"
        )
    batch_size, prompt_length = input_ids.shape
    if streamer is not None:
        streamer.put(input_ids.cpu())
    drawable = vocab_size
    if drawable is None:
        drawable = getattr(getattr(model, "config", None), "vocab_size", None)

    if cg:
        model._decoding_cache = update_graph_cache(
            model, getattr(model, "_decoding_cache", None), batch_size, prompt_length, max_length
        )
        inference_params = model._decoding_cache.inference_params
        inference_params.reset(max_length, batch_size)
    else:
        inference_params = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)

    def next_logits(tokens: Tensor) -> Tensor:
        offset = inference_params.seqlen_offset
        if offset == 0:
            logits = model(
                tokens, position_ids=None, inference_params=inference_params, num_last_tokens=1
            ).logits
        else:
            position_ids = torch.full(
                (batch_size, 1), offset, dtype=torch.long, device=tokens.device
            )
            if cg:
                logits = model._decoding_cache.run(tokens, position_ids, offset)
            else:
                logits = model(
                    tokens,
                    position_ids=position_ids,
                    inference_params=inference_params,
                    num_last_tokens=1,
                ).logits
        last: Tensor = logits[:, -1]
        return last if vocab_size is None else last[..., :vocab_size]

    def next_tokens(logits: Tensor, previous: Tensor) -> Tensor:
        position = previous.shape[1]
        if teacher_outputs is not None and position < teacher_outputs.shape[1]:
            return teacher_outputs[:, position]
        choice = logits
        if repetition_penalty != 1.0:
            choice = modify_logit_for_repetition_penalty(
                logits.clone(), previous, repetition_penalty
            )
        if drawable is not None:
            choice = choice[..., :drawable]
        return sample(choice, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)

    timer = _Timer(input_ids.device) if enable_timing else None
    scores: list[Tensor] = []
    sequences = input_ids.new_empty((batch_size, max(max_length, prompt_length)))
    sequences[:, :prompt_length] = input_ids
    length = prompt_length
    tokens = input_ids
    finished = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    while length < max_length:
        logits = next_logits(tokens)
        if output_scores:
            scores.append(logits)
        inference_params.seqlen_offset += tokens.shape[1]
        drawn = next_tokens(logits, sequences[:, :length])
        if eos_token_id is not None and teacher_outputs is None:
            drawn = drawn.masked_fill(finished, eos_token_id)
            finished |= drawn == eos_token_id
        sequences[:, length] = drawn
        length += 1
        tokens = drawn.unsqueeze(1)
        if streamer is not None:
            streamer.put(drawn.cpu())
        if eos_token_id is not None and (
            bool(finished.all()) if teacher_outputs is None else bool((drawn == eos_token_id).all())
        ):
            break
    if streamer is not None:
        streamer.end()
    if timer is not None:
        print(f"Prompt processing + decoding time: {timer.milliseconds():.0f}ms")
    return GenerationOutput(sequences[:, :length], tuple(scores) if output_scores else None)


class GenerationMixin:
    """Gives a model ``generate``; the model offers ``allocate_inference_cache`` and ``forward``."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Zeroed states of all layers: what ``InferenceParams.key_value_memory_dict`` holds."""
        raise NotImplementedError(
            f"[generate] {type(self).__name__} does not define allocate_inference_cache"
        )

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``decode`` with this model: sequences (B, L), or with return_dict_in_generate all of the
        output.
        """
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences


_Step = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class DecodingCGCache:
    """Recorded decoding steps and the state they work on, kept on a model from one generation to
    the next.
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    callables: dict[tuple[int, int], _Step] = field(default_factory=dict)
    inference_params: Optional[InferenceParams] = None
    run: Optional[_Step] = None
    device: Optional[torch.device] = None
    dtype: Optional[torch.dtype] = None
    mempool: Any = None
    parameters: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are empty: graphs belong to one model in one process."""
        return DecodingCGCache, ()


def _freezes_positions(model: Any, decoding_seqlen: int) -> bool:
    """Whether a graph would freeze where in the sequence it was recorded.

    Attention reads the positions of single tokens from ``lengths_per_sample``, on the device, but
    those of longer steps from ``seqlen_offset``.
    """
    config = getattr(model, "config", None)
    return decoding_seqlen > 1 and bool(getattr(config, "attn_layer_idx", None))


@torch.inference_mode()
def update_graph_cache(
    model: Any,
    cache: Optional[DecodingCGCache],
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    dtype: Optional[torch.dtype] = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Returns a cache whose ``run(input_ids (B, T), position_ids (B, T), offset)`` gives logits (B,
    T, V).

    What ``cache`` recorded before is used again where it fits: same weights, device, dtype and
    number of sequences, and no more tokens than it was made for. On the CPU ``run`` calls the
    model, and so it does for steps of several tokens where there are attention layers.
    """
    if cache is None:
        cache = DecodingCGCache()
    first = next(iter(model.parameters()))
    device, dtype = first.device, first.dtype if dtype is None else dtype
    # A graph reads the weights where they lay when it was recorded.
    parameters = tuple(parameter.data_ptr() for parameter in model.parameters())
    if (
        (device, dtype) != (cache.device, cache.dtype)
        or batch_size != cache.max_batch_size
        or max_seqlen > cache.max_seqlen
        or parameters != cache.parameters
    ):
        cache.callables = {}
        cache.mempool = None
        cache.device, cache.dtype = device, dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.parameters = parameters
        cache.inference_params = InferenceParams(
            max_seqlen=max_seqlen,
            max_batch_size=batch_size,
            seqlen_offset=seqlen_og,
            key_value_memory_dict=model.allocate_inference_cache(batch_size, max_seqlen, dtype),
            lengths_per_sample=torch.full(
                (batch_size,), seqlen_og, dtype=torch.int32, device=device
            ),
        )
        if device.type == "cuda":
            cache.mempool = torch.cuda.graphs.graph_pool_handle()
    state = cache.inference_params
    assert state is not None
    for decoding_seqlen in decoding_seqlens:
        if (batch_size, decoding_seqlen) not in cache.callables:
            cache.callables[batch_size, decoding_seqlen] = capture_graph(
                model,
                state,
                batch_size,
                max_seqlen,
                decoding_seqlen=decoding_seqlen,
                mempool=cache.mempool,
                n_warmups=n_warmups,
            )

    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        rows, tokens = new_input_ids.shape
        return cache.callables[rows, tokens](new_input_ids, new_position_ids, seqlen)

    cache.run = run
    # The state was written while recording; a prefill starts it afresh.
    state.seqlen_offset = 0
    return cache


@torch.inference_mode()
def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Records one step of ``decoding_seqlen`` tokens on the state of ``inference_params`` as a CUDA
    graph.

    Returns ``run(input_ids (B, T), position_ids (B, T), offset) -> logits (B, T, V)``. On the CPU
    nothing is recorded and ``run`` calls the model, and so it does for steps of several tokens
    where there are attention layers.
    """
    device = next(iter(model.parameters())).device
    if device.type != "cuda" or _freezes_positions(model, decoding_seqlen):

        def run_plain(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
            inference_params.seqlen_offset = seqlen
            if inference_params.lengths_per_sample is not None:
                inference_params.lengths_per_sample.fill_(seqlen)
            output = model(
                new_input_ids,
                position_ids=new_position_ids,
                inference_params=inference_params,
                num_last_tokens=decoding_seqlen,
            )
            logits: Tensor = output.logits
            return logits

        return run_plain

    input_ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    position_ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    seqlen_offset_og = inference_params.seqlen_offset
    inference_params.seqlen_offset = max_seqlen - decoding_seqlen
    if inference_params.lengths_per_sample is None:
        inference_params.lengths_per_sample = torch.empty(
            batch_size, dtype=torch.int32, device=device
        )
    lengths = inference_params.lengths_per_sample
    lengths.fill_(inference_params.seqlen_offset)

    def step() -> Any:
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits

    # Memory, libraries and autotuned choices are set up before recording, which allows none of it.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(max(n_warmups, 1)):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits: Tensor = step()
    inference_params.seqlen_offset = seqlen_offset_og

    # In the mode in which the buffers were made: nobody differentiates through a recording.
    @torch.inference_mode()
    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        lengths.fill_(seqlen)
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        graph.replay()
        return logits.clone()

    return run
