"""The models that Monet's benchmarks compare, at equal forward FLOPs a token.

The recipe is the quickstart. Monet layers replace its two PEER layers.
"""

from benchmarks.equal_flops import Arm, arm_of
from benchmarks.protocol import EVALUATION, OF_POOLS, SHARED, START, START_WITHOUT_POOLS
from benchmarks.sweep import Settings

PEER, HD, VD = "PEER, float32", "Monet HD, float32", "Monet VD, float32"
PEER_INT4, HD_INT4, VD_INT4 = "PEER, int4", "Monet HD, int4", "Monet VD, int4"


def _monet(kind: str, storage: str) -> Settings:
    """Returns settings of Monet layers with the FLOPs of PEER.

    The number of keys a side gives these FLOPs. k is about a sixteenth of it, as in the paper.
    """
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
    """Returns one of the models, with its sizes."""
    return arm_of({**EVALUATION, **MODELS[name]})


def start_of(name: str) -> dict[str, float]:
    """Returns the learning rates of a model, with their start values."""
    if name in (HD, VD):
        return START_WITHOUT_POOLS
    # Half experts are dense matrices. Packed ones start at the rate of dense matrices.
    return {**START, OF_POOLS: START[SHARED]} if name in (HD_INT4, VD_INT4) else START
