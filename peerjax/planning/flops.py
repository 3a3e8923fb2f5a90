"""Forward FLOPs a token, by formula: a compiled scan reports those of one iteration only.

A multiply-add counts as 2. Counted are products of matrices and vectors, and the sums of
retrieval; norms, activations, softmaxes and sorting are not, nor is padding of experts' blocks.
"""

from collections import defaultdict

from peerjax.model import ModelConfig


def forward_flops(
    config: ModelConfig, sequence_length: int, full_attention: bool = False
) -> dict[str, float]:
    """FLOPs of a token by part of the model; their sum is that of the whole.

    Args:
        config: of the model.
        sequence_length: L, tokens of a sequence.
        full_attention: count all L keys for every query, as a program without causal blocks
            computes them, instead of the (L + 1) / 2 that a token sees on average. (Documents
            shorter than a sequence leave it fewer still.)
    """
    keys = sequence_length if full_attention else (sequence_length + 1) / 2
    flops: dict[str, float] = defaultdict(float)
    flops["attention projections"] = config.depth * 8 * config.width**2
    flops["attention scores and mixing"] = config.depth * 4 * config.width * keys
    for spec, count in config.layers:
        for part, of_layer in spec.flops(config.width).items():
            flops[part] += count * of_layer
    flops["head"] = 2 * config.width * config.vocab_size
    return {part: float(each) for part, each in flops.items()}
