"""The models that Monet's benchmarks compare, at equal forward FLOPs a token.

The recipe is the quickstart, whose two PEER layers are replaced.
"""

from benchmarks.equal_flops import Arm, arm_of
from benchmarks.protocol import EVALUATION, OF_POOLS, SHARED, START, START_WITHOUT_POOLS
from benchmarks.sweep import Settings

PEER, HD, VD = "PEER, float32", "Monet HD, float32", "Monet VD, float32"
PEER_INT4, HD_INT4, VD_INT4 = "PEER, int4", "Monet HD, int4", "Monet VD, int4"


def _monet(kind: str, storage: str) -> Settings:
    """As many keys a side as make the FLOPs of PEER; k is about a sixteenth, as in the paper."""
    return {
        "model.layers": (("dense", 1), (kind, 2), ("dense", 1)),
        "monet.num_experts": 120**2,
        "monet.expert_width": 4,
        "monet.heads": 4,
        "monet.top_k": 8,
        "monet.group": 2,
        "monet.storage": storage,
    }


MODELS = {
    PEER: {"pool.storage": "float32"},
    HD: _monet("monet_hd", "float32"),
    VD: _monet("monet_vd", "float32"),
    PEER_INT4: {"pool.storage": "int4"},
    HD_INT4: _monet("monet_hd", "int4"),
    VD_INT4: _monet("monet_vd", "int4"),
}


def arm_named(name: str) -> Arm:
    """One of the models."""
    return arm_of({**EVALUATION, **MODELS[name]})


def start_of(name: str) -> dict[str, float]:
    """The learning rates that a model has, and where to begin."""
    if name in (HD, VD):
        return START_WITHOUT_POOLS
    # Halves are dense matrices: packed, they begin at the rate that such have.
    return {**START, OF_POOLS: START[SHARED]} if name in (HD_INT4, VD_INT4) else START
