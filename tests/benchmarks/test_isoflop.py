import pytest

from benchmarks.isoflop import DENSE, MOE, PEER, PEER_INT4, SIZES, arms, flops_of, with_flops


def test_all_models_of_a_size_take_the_same_flops():
    every = arms()
    for size in SIZES:
        wanted = every[size, PEER].flops
        assert all(
            arm.flops == pytest.approx(wanted, rel=0.01)
            for (of, _), arm in every.items()
            if of == size
        )
    # The pools are those of 16,384 and 65,536 experts in two layers.
    for name in (PEER, PEER_INT4):
        assert every["D=64", name].expert_parameters == 2 * 128**2 * 2 * 64
        assert every["D=128", name].expert_parameters == 2 * 256**2 * 2 * 128
    # Beside dense layers, mixtures add parameters and no FLOPs.
    assert every["D=128", MOE].parameters > 5 * every["D=128", DENSE].parameters


def test_the_width_found_is_the_nearest():
    settings = {"model.layers": (("dense", 3),)}
    wanted = flops_of({**settings, "model.mlp_width": 345}) + 500  # a unit makes 3 * 512
    assert with_flops(settings, "model.mlp_width", wanted)["model.mlp_width"] == 345
    with pytest.raises(ValueError, match="no model.mlp_width makes"):
        with_flops(settings, "model.mlp_width", 1000.0)
