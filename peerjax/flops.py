"""Forward FLOPs a token by formula, because a compiled scan reports only those of one iteration.

A multiply-add counts as 2. Products of matrices and vectors are counted, and the sums of retrieval.
Norms, activations, softmaxes, sorting and the padding of experts' blocks are not counted.
"""

from collections import defaultdict

from peerjax.layers.attention import GATE
from peerjax.model import ModelConfig


def forward_flops(
    config: ModelConfig, sequence_length: int, full_attention: bool = False
) -> dict[str, float]:
    """Returns the FLOPs of a token by part of the model. Their sum is the total.

    Args:
        config: configuration of the model.
        sequence_length: L, tokens of a sequence.
        full_attention: whether to count all L keys for every query, which a program without causal
            blocks computes. Otherwise (L + 1) / 2 keys are counted, the number that a token sees on
            average. (It sees even fewer if documents are shorter than a sequence.)
    """
    keys = sequence_length if full_attention else (sequence_length + 1) / 2
    flops: dict[str, float] = defaultdict(float)
    attention = config.attention
    of_keys_and_values = attention.kv_heads / attention.heads
    projections = 4 * config.width**2 * (1 + of_keys_and_values)
    if attention.sink == GATE:
        projections += 2 * config.width * attention.heads
    flops["attention projections"] = config.depth * projections
    flops["attention scores and mixing"] = config.depth * 4 * config.width * keys
    for spec, count in config.layers:
        for part, of_layer in spec.flops(config.width).items():
            flops[part] += count * of_layer
        if spec.is_sparse and config.shared_mlp:
            flops["shared path"] += count * 4 * config.width * config.shared_mlp
    flops["head"] = 2 * config.width * config.vocab_size
    return {part: float(each) for part, each in flops.items()}
