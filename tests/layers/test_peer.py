import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.layers.dense import DenseConfig
from peerjax.layers.peer import PeerConfig
from peerjax.layers.spec import Context, Sizes
from peerjax.pool import ExpertPool, initialize_pool

D, KEYS, HEADS, K_PER_HEAD, KEY_WIDTH = 32, 12, 3, 4, 16
SHAPE = (2, 9, D)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def make(query_norm="layernorm", num_experts=(KEYS, KEYS)):
    config = PeerConfig(num_experts, HEADS, K_PER_HEAD, KEY_WIDTH, query_norm=query_norm)
    layer = config.module(Sizes(D))
    pool = initialize_pool(jax.random.key(0), 1, num_experts[0] * num_experts[1], D)
    pool = ExpertPool.of_floats(pool.weights[0])
    x = jax.random.normal(jax.random.key(1), SHAPE)
    return layer, pool, x, jax.jit(layer.init)(jax.random.key(2), x, of(pool))["params"]


def of(pool):
    return Context(pools={"pool": pool})


def test_outputs_and_every_gradient_equal_peer_pytorch(reference):
    torch = reference("torch")
    peer_pytorch = reference("PEER_pytorch")
    layer, pool, x, params = make(query_norm="none")
    theirs = peer_pytorch.PEER(
        D,
        heads=HEADS,
        num_experts=KEYS**2,
        num_experts_per_head=K_PER_HEAD,
        dim_key=KEY_WIDTH,
        non_competing_scores=False,
    )
    with torch.no_grad():
        theirs.weight_down_embed.weight.copy_(torch.tensor(np.array(pool.weights[:, 0])))
        theirs.weight_up_embed.weight.copy_(torch.tensor(np.array(pool.weights[:, 1])))
        # Their queries are laid out (half, head, feature), ours (head, half, feature).
        kernel = np.array(params["query"]["kernel"]).reshape(D, HEADS, 2, KEY_WIDTH)
        theirs.to_queries[0].weight.copy_(
            torch.tensor(kernel.transpose(2, 1, 3, 0).reshape(-1, D).copy())
        )
        keys = np.stack([params["keys1"], params["keys2"]], axis=2)
        theirs.keys.copy_(torch.tensor(keys))

    def loss(params, weights, x):
        y = layer.apply({"params": params}, x, of(ExpertPool.of_floats(weights)))[0]
        return jnp.sum(jnp.sin(y)), y

    (_, y), (d_params, d_weights, d_x) = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        params, pool.weights, x
    )
    x_torch = torch.tensor(np.array(x), requires_grad=True)
    y_torch = theirs(x_torch)
    torch.sin(y_torch).sum().backward()

    d_query = theirs.to_queries[0].weight.grad.numpy().reshape(2, HEADS, KEY_WIDTH, D)
    d_keys = theirs.keys.grad.numpy()
    pairs = {
        "output": (y, y_torch.detach().numpy()),
        "x": (d_x, x_torch.grad.numpy()),
        "down": (d_weights[:, 0], theirs.weight_down_embed.weight.grad.numpy()),
        "up": (d_weights[:, 1], theirs.weight_up_embed.weight.grad.numpy()),
        "query": (d_params["query"]["kernel"], d_query.transpose(3, 1, 0, 2).reshape(D, -1)),
        "keys1": (d_params["keys1"], d_keys[:, :, 0]),
        "keys2": (d_params["keys2"], d_keys[:, :, 1]),
    }
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    assert max(errors.values()) <= 1e-5, errors


def test_equals_brute_force_over_all_experts_with_unequal_sub_keys():
    layer, pool, x, params = make(num_experts=(7, 11))
    y = jax.jit(layer.apply)({"params": params}, x, of(pool))[0]

    x_TD = np.asarray(x, np.float64).reshape(-1, D)
    query = (x_TD @ np.asarray(params["query"]["kernel"])).reshape(-1, HEADS, 2 * KEY_WIDTH)
    query = (query - query.mean(-1, keepdims=True)) / np.sqrt(query.var(-1, keepdims=True) + 1e-6)
    s1 = np.einsum("thd,hnd->thn", query[..., :KEY_WIDTH], params["keys1"])
    s2 = np.einsum("thd,hnd->thn", query[..., KEY_WIDTH:], params["keys2"])
    scores = (s1[..., :, None] + s2[..., None, :]).reshape(*s1.shape[:2], -1)
    kept = scores >= np.sort(scores, axis=-1)[..., -K_PER_HEAD, None]
    gates = np.where(kept, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    gates = (gates / gates.sum(-1, keepdims=True)).sum(1)
    hidden = jax.nn.gelu(x_TD @ np.asarray(pool.weights[:, 0]).T, approximate=False)
    expected = (gates * hidden) @ np.asarray(pool.weights[:, 1])
    assert relative_error(y.reshape(-1, D), expected) <= 1e-5


@pytest.mark.parametrize(
    ("heads", "k", "keys"), [(8, 16, 64), (1, 32, 32), (4, 8, 256), (8, 1, 32)]
)
def test_fresh_output_is_a_stated_share_of_a_dense_mlps(heads, k, keys):
    width = 128
    x = jax.random.normal(jax.random.key(0), (4, 64, width))
    mlp = DenseConfig(4 * width).module(Sizes(width))
    dense = mlp.apply(mlp.init(jax.random.key(1), x, Context()), x, Context())[0]
    layer = PeerConfig((keys, keys), heads, k, 64).module(Sizes(width))
    pool = initialize_pool(jax.random.key(2), 1, keys**2, width)
    pool = ExpertPool.of_floats(pool.weights[0])
    params = jax.jit(layer.init)(jax.random.key(3), x, of(pool))["params"]
    y = jax.jit(layer.apply)({"params": params}, x, of(pool))[0]
    share = (heads / (k * width)) ** 0.5
    assert 0.8 * share < float(jnp.std(y) / jnp.std(dense)) < 1.25 * share


def test_pool_values_do_not_repeat_and_have_the_stated_moments():
    pool = initialize_pool(jax.random.key(5), 2, 8192, 16, residual_scale=0.5)
    weights = np.asarray(pool.weights)
    assert weights.shape == (2, 8192, 2, 16)
    np.testing.assert_allclose(weights[:, :, 0].std(), 16**-0.5, rtol=0.01)
    np.testing.assert_allclose(weights[:, :, 1].std(), 0.5 * 16**-0.5, rtol=0.01)
    rows = weights.reshape(-1, 16)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_initial_sub_key_norms_are_recorded():
    layer, pool, x, _ = make()
    variables = jax.jit(layer.init)(jax.random.key(2), x, of(pool))
    for name in ("keys1", "keys2"):
        norms = np.linalg.norm(variables["params"][name], axis=-1)
        np.testing.assert_allclose(variables["stats"][f"initial_norm_{name}"], norms, rtol=1e-6)


def naive_jump_relu(params, weights, x, target, bandwidth, mean_active):
    """A layer with the gate jumprelu by sums over all experts; the surrogate is written out."""
    query = (x.reshape(-1, D) @ params["query"]["kernel"]).reshape(-1, HEADS, 2 * KEY_WIDTH)
    s1 = jnp.einsum("thd,hnd->thn", query[..., :KEY_WIDTH], params["keys1"])
    s2 = jnp.einsum("thd,hnd->thn", query[..., KEY_WIDTH:], params["keys2"])
    scores = (s1[..., :, None] + s2[..., None, :]).reshape(*s1.shape[:2], -1)
    retrieved = scores >= jnp.sort(scores, axis=-1)[..., -K_PER_HEAD, None]
    threshold = (params["gate"]["threshold"] * mean_active)[None, :, None]
    fixed = jax.lax.stop_gradient(threshold)
    is_near = retrieved & (jnp.abs(scores - fixed) < bandwidth / 2)
    slope = -jnp.where(is_near, 1 / bandwidth, 0) * (threshold - fixed)
    is_active = retrieved & (scores > fixed)
    gates = (jnp.where(is_active, scores, 0) + fixed * slope) * HEADS / (mean_active * target)
    hidden = jax.nn.gelu(x.reshape(-1, D) @ weights[:, 0].T, approximate=False)
    y = (gates.sum(1) * hidden) @ weights[:, 1]
    count = jnp.sum(is_active + slope) / len(query)
    return y, (count / target - 1) ** 2, is_active, is_near


@pytest.mark.parametrize("remat", [False, True])
def test_jump_relu_equals_the_sum_over_all_experts_with_its_surrogate(remat):
    target, width = 5.0, 0.8
    _, pool, x, params = make(query_norm="none")
    config = PeerConfig(
        (KEYS, KEYS), HEADS, K_PER_HEAD, KEY_WIDTH, query_norm="none",
        gate="jumprelu", target=target, bandwidth=width,
    )  # fmt: skip
    layer = config.module(Sizes(D))
    context = of(pool)._replace(step=jnp.int32(3))
    stats = jax.jit(layer.init)(jax.random.key(2), x, context)["stats"]
    first = layer.apply(
        {"params": {**params, "gate": {"threshold": jnp.zeros(HEADS)}}, "stats": stats},
        x, of(pool), mutable=["first"],
    )[1]["first"]["gate"]  # fmt: skip
    params = {**params, "gate": {"threshold": first["threshold"]}}
    stats = {**stats, "gate": {"scale": first["scale"]}}
    bandwidth = width * first["scale"].deviation
    weights = jax.random.normal(jax.random.key(7), (len(x.reshape(-1, D)), D))

    def loss(params, pool_weights, x):
        given = context._replace(pools={"pool": ExpertPool.of_floats(pool_weights)})

        def apply(params, x):
            variables = {"params": params, "stats": stats}
            (y, _), sown = layer.apply(variables, x, given, mutable=["losses", "routing"])
            return y.reshape(-1, D), sown["losses"]["target"], sown["routing"]

        saved = jax.checkpoint_policies.save_only_these_names("expert_ids")
        y, penalty, kept = (jax.checkpoint(apply, policy=saved) if remat else apply)(params, x)
        return jnp.sum(weights * y) + 10 * penalty, (y, penalty, kept)

    def naive(params, pool_weights, x):
        y, penalty, *rest = naive_jump_relu(
            params, pool_weights, x, target, bandwidth, first["scale"].mean_active
        )
        return jnp.sum(weights * y) + 10 * penalty, (y, penalty, *rest)

    operands = (params, pool.weights, x)
    (_, (y, penalty, kept)), found = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        *operands
    )
    (_, (expected, expected_penalty, is_active, is_near)), gradients = jax.jit(
        jax.value_and_grad(naive, (0, 1, 2), has_aux=True)
    )(*operands)
    assert relative_error(y, expected) <= 1e-5
    assert penalty == pytest.approx(float(expected_penalty), rel=1e-4, abs=1e-9)
    # Some experts are skipped, some act, and some are there for the threshold alone.
    below = np.sum(is_near & ~is_active)
    assert below > 0
    assert np.sum(kept["pool"]["choice"].ids < KEYS**2) == np.sum(is_active) + below
    assert np.sum(is_active) < is_active.shape[0] * HEADS * K_PER_HEAD - below
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, one), other in zip(leaves, jax.tree.leaves(found), strict=True):
        assert relative_error(other, one) <= 1e-4, path


@pytest.mark.parametrize("gate", ["jumprelu", "threshold"])
def test_a_fresh_layer_meets_the_target_at_the_scale_of_the_softmax(gate):
    heads, k, keys, target = 4, 32, 64, 24.0
    x = jax.random.normal(jax.random.key(0), (8, 128, D))
    pool = ExpertPool.of_floats(initialize_pool(jax.random.key(2), 1, keys**2, D).weights[0])

    def output(gate, k):
        config = PeerConfig((keys, keys), heads, k, 64, gate=gate, target=target)
        layer = config.module(Sizes(D))
        variables = jax.jit(layer.init)(jax.random.key(3), x, of(pool))
        given = {name: variables[name] for name in ("params", "stats")}
        (y, _), sown = layer.apply(given, x, of(pool), mutable=["first", "routing"])
        return y, sown["routing"]["pool"]["choice"]

    y, choice = output(gate, k)
    active = np.sum(choice.ids < keys**2, axis=-1)
    np.testing.assert_allclose(active.mean(), target, rtol=0.01)
    assert active.std() > 1
    np.testing.assert_allclose(np.sum(choice.gates, axis=-1).mean(), heads, rtol=1e-3)
    softmax, _ = output("softmax", int(target / heads))
    # Tokens with few experts have larger outputs, so the scale is not exactly the same.
    assert 0.6 < float(jnp.std(y) / jnp.std(softmax)) < 1.8


def test_experts_that_are_always_on_are_added_with_their_gates():
    count = 5
    config = PeerConfig((KEYS, KEYS), HEADS, K_PER_HEAD, KEY_WIDTH, always_on=count)
    _, pool, x, _ = make()
    further = ExpertPool.of_floats(initialize_pool(jax.random.key(9), 1, count, D).weights[0])
    context = of(pool)._replace(
        pools={"pool": pool, "always_on": further}, budget=jnp.full(x.shape[:2], 3)
    )
    layer = config.module(Sizes(D))
    params = jax.jit(layer.init)(jax.random.key(2), x, context)["params"]
    y, _ = jax.jit(layer.apply)({"params": params}, x, context)
    alone = {name: each for name, each in params.items() if name != "always_on_gate"}
    plain = PeerConfig((KEYS, KEYS), HEADS, K_PER_HEAD, KEY_WIDTH).module(Sizes(D))
    expected, _ = plain.apply({"params": alone}, x, context)
    gates = 2 * jax.nn.sigmoid(x @ params["always_on_gate"]["kernel"]) / count**0.5
    hidden = jax.nn.gelu(x @ further.weights[:, 0].T, approximate=False)
    expected += (gates * hidden) @ further.weights[:, 1]
    assert relative_error(y, expected) <= 1e-5
