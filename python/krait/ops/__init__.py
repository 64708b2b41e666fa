"""The operators, over NumPy arrays and arrays of any library that speaks DLPack.

Each function mirrors the C++ header of its name (``include/krait/ops``): the same arguments, shapes
and errors. Arrays may lie on the CPU or on a GPU, with any strides, and are not copied; on a GPU
the work is queued on the stream that PyTorch works on (else on the legacy default stream). Results
are arrays of the kind of the first argument, in its element type unless the text says otherwise.

Shapes: B batch, L length, D channels, N states per channel (d_state), H heads, P channels per head
(headdim), G groups. "real" is float32, bfloat16 or float16 in any mixture; float64 (complex128)
anywhere makes the slow reference compute in double precision, on the CPU. Times and steps have no
unit. Sequences:

- ``seq_idx`` (B, L), int32 or int64: the number of the sequence that each token belongs to; the
  state restarts where it changes, and -1 is padding, whose output is 0.
- ``cu_seqlens`` (n + 1), int32 or int64, with B = 1: sequence i is the tokens cu_seqlens[i] ..
  cu_seqlens[i + 1] - 1.
- ``state_positions`` (B, M), int32 or int64: states are wanted after those tokens.

All functions raise ValueError, naming the array, what was found and what was expected, where
shapes, element types, devices or strides do not fit; TypeError for what is no array; MemoryError.
Python's lock is released while they compute.
"""

from __future__ import annotations

from ._activation import (
    gated_silu,
    gated_silu_backward,
    gelu,
    gelu_backward,
    negative_exp,
    negative_exp_backward,
)
from ._attention import (
    AttentionGradients,
    attention,
    attention_backward,
    rotary_embedding,
)
from ._causal_conv1d import (
    CausalConv1dGradients,
    causal_conv1d,
    causal_conv1d_backward,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from ._cross_entropy import (
    CrossEntropy,
    LinearCrossEntropyGradients,
    cross_entropy,
    cross_entropy_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from ._linear import (
    LinearGradients,
    dropout,
    embedding,
    embedding_backward,
    linear,
    linear_backward,
)
from ._norm import (
    NormGradients,
    layer_norm,
    norm,
    norm_backward,
    rms_norm,
)
from ._optimizer import (
    adamw,
    global_norm,
    update_average,
)
from ._projection import (
    Projection,
    projection,
)
from ._sampling import (
    Sample,
    sample,
    sample_rows,
    sampling_distribution,
)
from ._selective_scan import (
    SelectiveScanGradients,
    selective_scan,
    selective_scan_backward,
)
from ._ssd import (
    SsdGradients,
    selective_step,
    ssd,
    ssd_backward,
    ssd_discretize,
    ssd_minimal_discrete,
    ssd_undiscretize,
    state_update,
)

__all__ = [
    "AttentionGradients",
    "CausalConv1dGradients",
    "CrossEntropy",
    "LinearCrossEntropyGradients",
    "LinearGradients",
    "NormGradients",
    "Projection",
    "Sample",
    "SelectiveScanGradients",
    "SsdGradients",
    "adamw",
    "attention",
    "attention_backward",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "cross_entropy",
    "cross_entropy_backward",
    "dropout",
    "embedding",
    "embedding_backward",
    "gated_silu",
    "gated_silu_backward",
    "gelu",
    "gelu_backward",
    "global_norm",
    "layer_norm",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "negative_exp",
    "negative_exp_backward",
    "norm",
    "norm_backward",
    "projection",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "sample_rows",
    "sampling_distribution",
    "selective_scan",
    "selective_scan_backward",
    "selective_step",
    "ssd",
    "ssd_backward",
    "ssd_discretize",
    "ssd_minimal_discrete",
    "ssd_undiscretize",
    "state_update",
    "update_average",
]
