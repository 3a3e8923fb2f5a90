"""A PEER model made of a Monet model computes the same."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.config import model_config, validate
from peerjax.distillation.from_monet import MOST, addresses, converted, give_fields, pair_gates
from peerjax.distillation.starts import with_peer
from peerjax.model import Decoder
from peerjax.objectives.task import drawn_variables
from peerjax.optim import dequantize
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

VOCABULARY, N, M = 64, 16, 4


def make_monet(kind="monet_hd", group=2, **changes):
    """A model with two Monet layers, its variables with biases, and the PEER of its shape."""
    config = tiny_config("*.txt")
    config.model.layers = (("dense", 1), (kind, 2))
    config.monet.num_experts, config.monet.expert_width = N, M
    config.monet.heads, config.monet.top_k, config.monet.group = 2, 2, group
    config.update_from_flattened_dict(changes)
    model = Decoder(model_config(config, VOCABULARY))
    variables = jax.jit(partial(drawn_variables, model))(jax.random.key(0))

    def with_bias(path, leaf):
        if path[-1].key in ("b", "c", "b1", "b2", "c1", "c2"):
            return 0.3 * jax.random.normal(jax.random.key(len(str(path))), leaf.shape)
        return leaf

    params = jax.tree_util.tree_map_with_path(with_bias, dequantize(variables["params"]))
    return config, model, {**variables, "params": params}


def peer_of(config, plain=False, experts_per_head=N * M, **changes):
    """The PEER model with room for all experts of a Monet model."""
    config = config.copy_and_resolve_references()
    give_fields(config, plain)
    config.pool.storage, config.peer.experts_per_head = "float32", experts_per_head
    config.update_from_flattened_dict(changes)
    validate(config)
    return Decoder(model_config(config, VOCABULARY))


def logits_of(model, variables, batch):
    inputs = (batch["inputs"], batch["positions"], batch["segments"])
    return jax.jit(lambda variables: model.apply(dequantize(variables), *inputs))(variables)


def packed_batch():
    """Rows with several documents."""
    batch = make_batch()
    places = np.arange(batch["inputs"].shape[1]) + np.zeros_like(batch["inputs"])
    batch["positions"], batch["segments"] = jnp.asarray(places % 12), jnp.asarray(places // 12)
    return batch


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", ["monet_hd", "monet_vd"])
def test_the_map_is_exact_if_every_pair_is_kept(kind, group):
    config, monet, variables = make_monet(kind, group)
    peer = peer_of(config)
    new = jax.jit(lambda each: converted(each, monet.config, peer.config, {}))(variables)
    shapes = jax.eval_shape(partial(drawn_variables, peer), jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(shapes)
    assert [leaf.shape for leaf in jax.tree.leaves(new)] == [
        leaf.shape for leaf in jax.tree.leaves(shapes)
    ]
    batch = packed_batch()
    expected = logits_of(monet, variables, batch)
    np.testing.assert_allclose(logits_of(peer, new, batch), expected, atol=1e-4)
    # The test could fail: biases matter.
    for name in ("hidden_bias", "output_bias"):
        without = jax.tree_util.tree_map_with_path(
            lambda path, leaf, name=name: 0 * leaf if name in str(path) else leaf, new
        )
        assert np.abs(logits_of(peer, without, batch) - expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["monet_hd", "monet_vd"])
def test_pruning_pairs_that_are_not_used_changes_nothing(kind):
    config, monet, variables = make_monet(kind, **{"monet.top_k": 1})
    batch = packed_batch()
    batch |= {"inputs": batch["inputs"] % 2, "weight": jnp.ones(len(batch["inputs"]))}
    found = jax.device_get(jax.jit(pair_gates(monet))(variables, batch))
    most, used = found[MOST], found["run_1"][0] > 0
    assert 1 < used.sum() < N
    pairs = np.flatnonzero(used)[None]
    table = addresses(pairs, N)[0]
    assert [int(pair) for pair in np.argsort(table)[: used.sum()]] == pairs[0].tolist()
    peer = peer_of(config, experts_per_head=int(most) * M, **{"peer.kept_pairs": int(used.sum())})
    convert = jax.jit(lambda each: converted(each, monet.config, peer.config, {"run_1": pairs}))
    new = convert(variables)
    assert new["pools"]["run_1"]["pool"].num_experts == used.sum() * M
    expected = logits_of(monet, variables, batch)
    np.testing.assert_allclose(logits_of(peer, new, batch), expected, atol=1e-4)
    fewer = with_peer(peer, "float32", experts_per_head=M)
    assert np.abs(logits_of(fewer, new, batch) - expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["monet_hd", "monet_vd"])
def test_a_plain_layer_equals_one_without_biases_whose_keys_are_all_on(kind):
    config, monet, variables = make_monet(kind, **{"monet.top_k": 4})
    variables["params"] = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key in ("b", "c", "b1", "b2", "c1", "c2") else leaf,
        variables["params"],
    )
    peer = peer_of(config, plain=True)
    assert peer.config.layers[1][0].num_experts == (4, 4 * M)
    new = jax.jit(lambda each: converted(each, monet.config, peer.config, {}))(variables)
    batch = packed_batch()
    np.testing.assert_allclose(
        logits_of(peer, new, batch), logits_of(monet, variables, batch), atol=1e-4
    )


def test_gates_are_not_normalised_after_a_cut():
    config, monet, variables = make_monet()
    peer = peer_of(config, experts_per_head=M)  # one pair of each head
    new = converted(variables, monet.config, peer.config, {})
    batch = packed_batch()
    inputs = (batch["inputs"], batch["positions"], batch["segments"])
    _, kept = peer.apply(new, *inputs, mutable=["routing"])
    gates = kept["routing"]["run_1"]["group"]["block_0"]["peer"]["pool"]["choice"].gates
    of_heads = np.asarray(gates).reshape(-1, 2, M)
    np.testing.assert_array_equal(of_heads, np.broadcast_to(of_heads[..., :1], of_heads.shape))
    _, of_monet = monet.apply(variables, *inputs, mutable=["routing"])
    choice = of_monet["routing"]["run_1"]["group"]["block_0"]["monet"]["choice"]
    best = np.max(choice.g1, -1) * np.max(choice.g2, -1)
    np.testing.assert_allclose(of_heads[..., 0], best.reshape(-1, 2), rtol=1e-5)
    assert best.min() < 0.9


def test_fields_of_configurations_without_monet_are_refused():
    config = tiny_config("*.txt")
    with pytest.raises(ValueError, match="the teacher has no Monet layer"):
        give_fields(config, plain=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_head": 6, "experts_per_pair": 4}, "experts_per_head=6 is not divisible"),
        ({"kept_pairs": 65}, "kept_pairs=65 is more than the 64 pairs"),
        ({"spread": 3}, "peer.spread=3 does not divide"),
        ({"spread": 2, "kept_pairs": 8}, "peer.spread=2 has no effect with peer.kept_pairs=8"),
        ({"gate": "threshold", "experts_per_pair": 2}, "counts single experts, but peer.experts_p"),
        ({"biases": True}, "peer.biases needs peer.gate='product'"),
        ({"gate": "product", "num_experts": (8, 4)}, "has unequal sizes"),
        ({"gate": "product", "keys_on": 9}, "peer.keys_on: top_k=9 is not in 1 .. 8"),
    ],
)
def test_fields_that_do_not_fit_are_refused_by_name(fields, message):
    spec = model_config(tiny_config("*.txt"), VOCABULARY).layers[1][0]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **fields).check(16)
