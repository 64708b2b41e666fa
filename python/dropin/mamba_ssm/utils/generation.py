"""Generation, by upstream's interface."""

from krait.torch.generation import (  # noqa: F401
    DecodingCGCache,
    GenerationMixin,
    GenerationOutput,
    InferenceParams,
    TextStreamer,
    capture_graph,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    update_graph_cache,
)
