import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.counter_hash import Purpose, hash_words
from peerjax.layers.metapeer import MetaPeerConfig
from peerjax.layers.peer import PeerConfig
from peerjax.layers.spec import Context, Sizes
from peerjax.pool import ExpertPool, initialize_pool
from peerjax.routing.auxiliary import CHOICE, METAEXPERTS
from peerjax.routing.choice import largest
from peerjax.training.gradients import loss_and_gradients
from tests.training.test_step import LENGTH, ROWS, assert_close, make_batch
from tests.training.test_step import make as make_run

D, KEYS, HEADS, K, KEY_WIDTH = 32, (6, 8), 3, 4, 8
N = KEYS[0] * KEYS[1]
PEER = PeerConfig(KEYS, HEADS, K, KEY_WIDTH)


def context_of(weights, x, **more):
    positions = jnp.tile(jnp.arange(x.shape[1]), (len(x), 1))
    given = {"positions": positions, "segments": jnp.zeros_like(positions), **more}
    return Context(pools={"pool": ExpertPool.of_floats(weights)}, **given)


def make(seed=0, peer=PEER, **fields):
    config = MetaPeerConfig(**fields, peer=peer)
    layer = config.module(Sizes(D))
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = initialize_pool(keys[0], 1, config.pools["pool"], D).weights[0]
    x = jax.random.normal(keys[1], (2, 12, D))
    variables = jax.jit(layer.init)(keys[2], x, context_of(weights, x))
    params = variables["params"]
    logits = params["metarouter"]["logits"]["kernel"]
    params["metarouter"]["logits"]["kernel"] = 20 * logits  # as if it had been trained
    return layer, {"params": params, "stats": variables["stats"]}, weights, x


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, variables, x, context):
    """Returns the output of a layer, and what it sows into "routing"."""
    (y, _), kept = layer.apply(variables, x, context, mutable=["routing"])
    return y, kept["routing"]


def params_of_peer(params, metaexpert):
    """Parameters of one metaexpert as a PEER layer has them."""
    return {
        "query": {"kernel": params["query"][metaexpert]},
        "query_norm": {
            "scale": params["query_norm_scale"][metaexpert],
            "bias": params["query_norm_bias"][metaexpert],
        },
        "keys1": params["keys1"][metaexpert],
        "keys2": params["keys2"][metaexpert],
    }


def test_one_metaexpert_is_peer():
    layer, variables, weights, x = make(metaexperts=1, chosen=1)
    found, kept = apply(layer, variables, x, context_of(weights, x))
    given = {"params": params_of_peer(variables["params"], 0)}
    expected, of_peer = apply(PEER.module(Sizes(D)), given, x, context_of(weights, x))
    one, other = (each["pool"][CHOICE] for each in (kept, of_peer))
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.gates, other.gates, atol=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def weighted_sum_of_peers(variables, weights, x, chosen):
    """Computes four PEER layers for every token, and adds two of them by weight."""
    params = variables["params"]
    logits = x.reshape(-1, D) @ params["metarouter"]["logits"]["kernel"]
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = probabilities >= jnp.sort(probabilities, axis=-1)[:, -chosen, None]
    shares = jnp.where(kept, probabilities, 0)
    if chosen > 1:
        shares = shares / shares.sum(-1, keepdims=True)
    total = 0.0
    for number, own in enumerate(jnp.split(weights, logits.shape[-1])):
        given = {"params": params_of_peer(params, number)}
        y = PEER.module(Sizes(D)).apply(given, x, context_of(own, x))[0]
        total += shares[:, number, None] * y.reshape(-1, D)
    return total.reshape(x.shape)


def assert_same_outputs_and_gradients(ours, theirs, operands):
    def both(function):
        def loss(*operands):
            y = function(*operands)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*operands)

    (found, y), (expected, y_expected) = both(ours), both(theirs)
    np.testing.assert_allclose(y, y_expected, atol=1e-6)
    assert_close(found, expected)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_a_weighted_sum_of_peers(chosen):
    layer, variables, weights, x = make(metaexperts=4, chosen=chosen)

    def ours(params, weights, x):
        given = {**variables, "params": params}
        return layer.apply(given, x, context_of(weights, x))[0]

    def theirs(params, weights, x):
        return weighted_sum_of_peers({**variables, "params": params}, weights, x, chosen)

    operands = (variables["params"], weights, x)
    assert_same_outputs_and_gradients(ours, theirs, operands)


def test_only_the_experts_of_chosen_metaexperts_are_updated():
    changes = {
        "model.layers": (("metapeer", 1),), "metapeer.metaexperts": 4, "peer.num_experts": (8, 8),
    }  # fmt: skip
    _, task, _, state = make_run(**changes)
    gradients = jax.jit(lambda: loss_and_gradients(task, state.variables, make_batch())[1])()
    given = {**state.variables, "taps": {}}
    batch = make_batch()
    inputs = (batch["inputs"], batch["positions"], batch["segments"])
    routing = jax.jit(lambda: task.model.apply(given, *inputs, mutable=["routing"])[1]["routing"])()
    layer = routing["run_0"]["block"]["metapeer"]
    ids = gradients.pools["run_0"]["pool"].ids[0]
    metaexperts = layer["metarouter"][METAEXPERTS].ids[0]
    expected = jnp.repeat(metaexperts, ids.shape[1] // metaexperts.shape[1], axis=1)
    np.testing.assert_array_equal(ids // 64, expected)


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_spread_changes_the_numbers_of_experts_and_nothing_else(spread):
    peer = dataclasses.replace(PEER, num_experts=(8, 8), spread=spread)
    layer, variables, weights, x = make(metaexperts=4, peer=peer)
    plain, *_ = make(metaexperts=4, peer=dataclasses.replace(peer, spread=1))
    _, kept = apply(layer, variables, x, context_of(weights, x))
    _, of_plain = apply(plain, variables, x, context_of(weights, x))
    one, other = (each["pool"][CHOICE] for each in (kept, of_plain))
    np.testing.assert_array_equal(one.gates, other.gates)
    # By brute force: where expert (i, j) of metaexpert m has to be.
    moved = np.zeros(4 * 64, int)
    for m in range(4):
        for i in range(8):
            for j in range(8):
                v, r = (i + j) % spread, i * (8 // spread) + j // spread
                moved[m * 64 + i * 8 + j] = v * 256 // spread + m * 64 // spread + r
    assert sorted(moved) == list(range(256))
    np.testing.assert_array_equal(one.ids, moved[other.ids])


SEQUENCE = {"metaexperts": 6, "chosen": 2, "choice": "sequence", "chunk": 4}


def chosen_by_definition(variables, x, positions, chunk, switch, chosen):
    """The metaexperts and weights of every token, computed one token after the other."""
    kernel = np.asarray(variables["params"]["metarouter"]["logits"]["kernel"], np.float64)
    first = np.asarray(variables["stats"]["metarouter"]["shares"].probability, np.float64)
    logits = np.asarray(x, np.float64) @ kernel
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids, weights = [], []
    for row, places in zip(p, positions, strict=True):
        for place, position in enumerate(places):
            number = position // chunk if switch else min(position // chunk, 1)
            begin = place - position
            mean = row[begin : begin + number * chunk].mean(0) if number else first
            best = np.argsort(-mean, kind="stable")[:chosen]
            ids.append(best)
            weights.append(mean[best] / mean[best].sum())
    return np.array(ids), np.array(weights)


@pytest.mark.parametrize("switch", [True, False])
def test_chunks_use_the_best_metaexperts_of_the_document_before_them(switch):
    layer, variables, weights, x = make(**SEQUENCE, switch=switch)
    shares = variables["stats"]["metarouter"]["shares"]
    uneven = jax.nn.softmax(jax.random.normal(jax.random.key(5), (6,)))
    variables["stats"]["metarouter"]["shares"] = shares._replace(probability=uneven)
    positions = np.array([[*range(12)], [*range(5), *range(7)]])
    segments = np.array([[0] * 12, [0] * 5 + [1] * 7])
    given = {"positions": jnp.array(positions), "segments": jnp.array(segments)}
    context = context_of(weights, x, **given)
    _, kept = apply(layer, variables, x, context)
    found = kept["metarouter"][METAEXPERTS]
    ids, shares = chosen_by_definition(variables, x, positions, 4, switch, 2)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.gates, shares, atol=1e-6)


def test_gradients_of_chunks_are_those_of_a_weighted_sum_of_peers():
    layer, variables, weights, x = make(**SEQUENCE)
    context = context_of(weights, x)
    _, kept = apply(layer, variables, x, context)
    chosen = kept["metarouter"][METAEXPERTS].ids.reshape(2, 12, 2)

    def ours(params, weights, x):
        return layer.apply({**variables, "params": params}, x, context_of(weights, x))[0]

    def theirs(params, weights, x):
        p = jax.nn.softmax(x @ params["metarouter"]["logits"]["kernel"], axis=-1)
        first = jnp.broadcast_to(variables["stats"]["metarouter"]["shares"].probability, (2, 6))
        means = [first if begin == 0 else p[:, :begin].mean(1) for begin in (0, 4, 8)]
        own = jnp.take_along_axis(jnp.repeat(jnp.stack(means, 1), 4, axis=1), chosen, axis=-1)
        own = own / own.sum(-1, keepdims=True)
        total = 0.0
        for number, part in enumerate(jnp.split(weights, 6)):
            given = {"params": params_of_peer(params, number)}
            y = PEER.module(Sizes(D)).apply(given, x, context_of(part, x))[0]
            total += jnp.sum(jnp.where(chosen == number, own, 0), -1, keepdims=True) * y
        return total

    operands = (variables["params"], weights, x)

    assert_same_outputs_and_gradients(ours, theirs, operands)


@pytest.mark.parametrize("choice", ["token", "sequence"])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_removed_metaexperts_add_nothing(choice, left):
    layer, variables, weights, x = make(**{**SEQUENCE, "choice": choice})
    removed = jnp.arange(6) >= left
    given = {**variables, "removed": {"metarouter": {"experts": removed}}}
    y, kept = apply(layer, given, x, context_of(weights, x))
    found = kept["metarouter"][METAEXPERTS]
    assert np.all(np.where(found.ids >= left, found.gates, 0) == 0)
    if left == 3:
        assert np.all(found.ids < left)
        np.testing.assert_allclose(found.gates.sum(-1), 1, atol=1e-6)
    elif left == 0:
        np.testing.assert_array_equal(y, 0)


def test_opening_needs_the_numbers_of_rows():
    layer, variables, weights, x = make(metaexperts=6, open=2)
    apply(layer, variables, x, context_of(weights, x))  # evaluation opens all
    with pytest.raises(ValueError, match="metapeer.open draws by the number of each row of text"):
        apply(layer, variables, x, context_of(weights, x, seed=0, step=0))


def test_as_many_are_open_as_drawn_and_they_are_the_best():
    rng = np.random.default_rng(0)
    scores, counts = rng.integers(0, 4, (2, 5, 6)).astype(np.float32), rng.integers(1, 7, (2, 5))
    found = np.asarray(largest(jnp.array(scores), jnp.array(counts)))
    for place in np.ndindex(2, 5):
        best = np.argsort(-scores[place], kind="stable")[: counts[place]]
        assert {*np.flatnonzero(found[place])} == {*best}


def test_the_weight_of_one_chosen_metaexpert_is_1_and_trains_the_metarouter():
    layer, variables, weights, x = make(**{**SEQUENCE, "chosen": 1})

    def loss(params):
        given = {**variables, "params": params}
        y, kept = apply(layer, given, x, context_of(weights, x))
        return jnp.sum(jnp.sin(y)), kept["metarouter"][METAEXPERTS].gates

    gradients, gates = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    np.testing.assert_array_equal(gates, 1)
    assert np.any(gradients["metarouter"]["logits"]["kernel"] != 0)


OPENED = {
    "model.layers": (("metapeer", 1),), "metapeer.metaexperts": 8, "metapeer.open": 2,
    "metapeer.chunk": 8, "peer.num_experts": (8, 8), "seed": 3,
}  # fmt: skip


def test_documents_open_some_metaexperts_whatever_the_split_of_the_batch():
    config, task, _, state = make_run(**OPENED)
    params = state.params["run_0"]["block"]["metapeer"]["metarouter"]["logits"]
    params["kernel"] = 50 * params["kernel"]
    batch = {**make_batch(), "row": jnp.arange(40, 40 + ROWS)}
    half = LENGTH // 2
    batch["positions"] = jnp.tile(jnp.arange(LENGTH) % half, (ROWS, 1))
    batch["segments"] = jnp.tile(jnp.arange(LENGTH) // half, (ROWS, 1))
    inputs = (batch["inputs"], batch["positions"], batch["segments"])

    read = jax.jit(functools.partial(task.model.apply, mutable=["routing"]))

    def metaexperts(**options):
        kept = read(state.variables, *inputs, **options)[1]
        ids = kept["routing"]["run_0"]["block"]["metapeer"]["metarouter"][METAEXPERTS].ids
        return np.asarray(ids).reshape(ROWS, 2, half // 8, 8 * 2)

    training = {"seed": config.seed, "step": 5, "rows_B": batch["row"]}
    found = metaexperts(**training)
    words = hash_words(Purpose.OPENED, 3, 5, batch["row"][:, None], jnp.arange(2))
    most = 2 + np.asarray(words % 7)
    counts = np.array([[[len({*c}) for c in doc] for doc in row] for row in found])
    assert np.all(counts <= most[:, :, None])
    assert np.mean(counts) < np.mean([[[len({*c}) for c in d] for d in r] for r in metaexperts()])
    assert np.any(metaexperts(**{**training, "step": 6}) != found)

    differentiate = jax.jit(
        lambda parts: loss_and_gradients(
            task, state.variables, batch, microbatches=parts, seed=config.seed, step=5
        ),
        static_argnums=0,
    )
    (whole_loss, whole), (loss, parts) = differentiate(1), differentiate(4)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    one, other = (each.pools["run_0"]["pool"] for each in (whole, parts))
    np.testing.assert_array_equal(one.ids, other.ids)
    # The balance too: it is linear in the batch.
    assert_close(parts.params, whole.params)
    assert_close(parts.losses, whole.losses)


@pytest.mark.parametrize(
    ("fields", "peer", "problem"),
    [
        ({"chosen": 9}, {}, "metapeer.chosen=9 is more than metapeer.metaexperts=8"),
        ({"choice": "document"}, {}, "metapeer.choice='document' is unknown; choose from token"),
        ({"open": 1}, {}, r"metapeer.open=1 is not in \[2, 8\]"),
        ({"open": 4, "choice": "sequence"}, {}, "metapeer.open=4 limits what tokens choose from"),
        ({}, {"gate": "product"}, "peer.gate='product' is the router of Monet, which cannot be a"),
        ({}, {"gate": "jumprelu"}, "peer.gate='jumprelu' does not work in metaexperts"),
        ({}, {"query_norm": "batchnorm"}, "peer.query_norm='batchnorm' does not work in"),
        ({}, {"always_on": 4}, "peer.always_on=4 does not work in metaexperts; set it to 0"),
        ({"switch": False}, {}, "metapeer.switch=False keeps the choice of a chunk, but"),
        ({"chunk": 0}, {}, "metapeer.chunk=0 is not positive"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields, peer, problem):
    config = MetaPeerConfig(**fields, peer=dataclasses.replace(PeerConfig(), **peer))
    with pytest.raises(ValueError, match=problem):
        config.check(64)
