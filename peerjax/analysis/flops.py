"""Forward FLOPs a token, by formula: a compiled scan reports those of one iteration only.

A multiply-add counts as 2. Counted are products of matrices and vectors, and the sums of
retrieval; norms, activations, softmaxes and sorting are not, nor is padding of experts' blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping

from peerjax.model import DENSE, MOE_KIND, MONET_HD, MONET_VD, PEER_KIND, ModelConfig
from peerjax.routing.monet import keys_per_side

# Parts of a model.
PROJECTIONS, MIXING, MLP, ROUTER, RETRIEVAL, LOOKUP, EXPERTS, HEAD = (
    "attention projections", "attention scores and mixing", "mlp", "router", "retrieval", "lookup",
    "experts", "head",
)  # fmt: skip


def forward_flops(
    config: ModelConfig, sequence_length: int, full_attention: bool = False
) -> dict[str, float]:
    """FLOPs of a token by part of the model; their sum is that of the whole.

    Args:
        config: of the model.
        sequence_length: L, tokens a row.
        full_attention: count all L keys for every query, as a program without causal blocks
            computes them, instead of the (L + 1) / 2 that a token sees on average. (Documents
            shorter than a row leave it fewer still.)
    """
    keys = sequence_length if full_attention else (sequence_length + 1) / 2
    flops: dict[str, float] = defaultdict(float)
    flops[PROJECTIONS] = config.depth * 8 * config.width**2
    flops[MIXING] = config.depth * 4 * config.width * keys
    for kind, count in config.layers:
        for part, of_layer in _OF_KIND[kind](config).items():
            flops[part] += count * of_layer
    flops[HEAD] = 2 * config.width * config.vocab_size
    return {part: float(each) for part, each in flops.items()}


def _of_mlp(config: ModelConfig) -> dict[str, int]:
    return {MLP: 4 * config.width * config.mlp_width}


def _of_peer(config: ModelConfig) -> dict[str, int]:
    peer = config.peer
    n1, n2 = peer.num_experts
    queries = 2 * config.width * peer.heads * 2 * peer.key_width
    scores = 2 * peer.heads * (n1 + n2) * peer.key_width
    pairs = min(peer.experts_per_head, n1) * min(peer.experts_per_head, n2)
    return {
        ROUTER: queries + scores,
        RETRIEVAL: peer.heads * pairs,
        LOOKUP: 2 * peer.heads * peer.experts_per_head * 2 * config.width,
    }


def _of_moe(config: ModelConfig) -> dict[str, int]:
    moe = config.moe
    return {
        ROUTER: 2 * config.width * moe.num_experts,
        EXPERTS: moe.experts_per_token * 4 * config.width * moe.hidden,
    }


def _of_monet(config: ModelConfig) -> dict[str, float]:
    monet = config.monet
    keys = keys_per_side(monet.num_experts)
    hidden = keys * monet.expert_width
    return {
        ROUTER: 2 * config.width * 2 * monet.heads * keys / monet.group,
        EXPERTS: 4 * config.width * hidden + 4 * monet.heads * hidden + 2 * config.width * keys,
    }


_OF_KIND: dict[str, Callable[[ModelConfig], Mapping[str, float]]] = {
    DENSE: _of_mlp,
    PEER_KIND: _of_peer,
    MOE_KIND: _of_moe,
    MONET_HD: _of_monet,
    MONET_VD: _of_monet,
}
