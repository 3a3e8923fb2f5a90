"""Measures training steps of one layer of a million experts, in peerjax and in PEER-pytorch.

    python -m benchmarks.layer_step ARM STEPS

The output is JSON. Each arm has its own process, so that peak memory is its own too. The shape is
that of the PEER paper: 1024^2 experts, 8 heads of 16, here with D = 256 and 512 tokens.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SIDE, D, HEADS, PER_HEAD, KEY_WIDTH, TOKENS = 1024, 256, 8, 16, 128, 512
ROUTER_RATE, POOL_RATE = 1e-3, 1e-2
INT4, ADAMW, ROUTER = "peerjax int4", "peerjax float32 + AdamW", "router of peerjax alone"
TORCH_SPARSE, TORCH_ADAMW = "PEER-pytorch SparseAdam", "PEER-pytorch AdamW"
ARMS = (INT4, TORCH_SPARSE, TORCH_ADAMW, ADAMW, ROUTER)


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields new inputs and targets [1, T, D] for every step, the same for all arms."""
    rng = np.random.default_rng(0)
    while True:
        x, target = rng.standard_normal((2, 1, TOKENS, D), np.float32)
        yield x, target


def _layer(storage: str) -> tuple[Callable[..., Any], Any, Callable[[Any], Any]]:
    """Returns a PEER layer, its pool, and a function that draws the params of its router.

    The layer is a function of variables, x and the pool. It returns its output and its choice.
    """
    import jax
    import jax.numpy as jnp

    from peerjax.layers.peer import PeerConfig
    from peerjax.layers.spec import Context, Sizes
    from peerjax.pool import initialize_pool

    config = PeerConfig((SIDE, SIDE), HEADS, PER_HEAD, KEY_WIDTH, query_norm="none")
    layer = config.module(Sizes(width=D))

    def make_pool():
        return initialize_pool(jax.random.key(0), 1, SIDE**2, D, storage=storage)

    def context(pool):
        return Context(pools={"pool": pool}, layer=jnp.int32(0))

    def init(pool):
        x = jnp.zeros((1, TOKENS, D))
        return layer.init(jax.random.key(1), x, context(pool))["params"]

    def apply(variables, x, pool):
        (y, _), kept = layer.apply(variables, x, context(pool), mutable=["routing"])
        return y, kept["routing"]["pool"]["choice"]

    return apply, jax.jit(make_pool)(), init


def peerjax_step(packed: bool) -> Callable[[np.ndarray, np.ndarray], float]:
    """Makes a step that returns its loss, with int4 pools or with dense AdamW."""
    import jax
    import jax.numpy as jnp
    import optax

    from pallas_kernels.factored_gradient import FactoredGradient, Tap
    from peerjax.optim import apply_updates, int4_accumulation
    from peerjax.pool import ExpertPool

    layer, pool, init = _layer("int4" if packed else "float32")

    def fresh(pool):
        trained = {"params": init(pool), "pool": pool}
        return trained, optimizer.init(trained)

    of_pool = int4_accumulation(POOL_RATE) if packed else optax.adamw(POOL_RATE)
    rules = {"params": optax.adamw(ROUTER_RATE), "pool": of_pool}
    optimizer = optax.partition(rules, {"params": "params", "pool": "pool"})

    def step(trained, opt_state, x, target):
        pool = trained["pool"]

        def loss_of(params, tap):
            variables = {"params": params, "taps": {"pool": {"tap": tap}}}
            y, choice = layer(variables, x, pool)
            return jnp.mean((y - target) ** 2), choice.ids

        tap = Tap.zeros_for(jnp.zeros((TOKENS, HEADS * PER_HEAD), jnp.int32), x[0])
        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, ids), (grads, tap) = differentiate(trained["params"], tap)
        gradient = jax.tree.map(lambda leaf: leaf[None], FactoredGradient.from_tap(ids, tap))
        if not packed:
            gradient = ExpertPool.of_floats(gradient.dense(pool.num_experts))
        gradients = {"params": grads, "pool": gradient}
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return apply_updates(trained, updates), opt_state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(fresh, donate_argnums=0)(pool)

    def run(x: np.ndarray, target: np.ndarray) -> float:
        nonlocal state
        *state, loss = compiled(*state, x, target)
        return float(jax.block_until_ready((state, loss))[1])

    return run


def router_step() -> Callable[[np.ndarray, np.ndarray], float]:
    """Makes a step without any expert: retrieval, gates, their gradient, AdamW."""
    import jax
    import jax.numpy as jnp
    import optax

    layer, pool, init = _layer("int4")
    optimizer = optax.adamw(ROUTER_RATE)

    def fresh():
        params = init(pool)
        return params, optimizer.init(params)

    def step(params, opt_state, x, target):
        def loss_of(params):
            # The lookup's result is not used, so XLA removes the lookup.
            _, choice = layer({"params": params}, x, pool)
            gates = choice.gates
            return jnp.mean(gates * target[0, :, : gates.shape[1]])

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(fresh)()

    def run(x: np.ndarray, target: np.ndarray) -> float:
        nonlocal state
        *state, loss = compiled(*state, x, target)
        return float(jax.block_until_ready((state, loss))[1])

    return run


def torch_step(sparse: bool) -> Callable[[np.ndarray, np.ndarray], float]:
    """Makes the step of PEER-pytorch: sparse with SparseAdam, or dense with AdamW."""
    import PEER_pytorch
    import torch

    torch.manual_seed(0)
    layer = PEER_pytorch.PEER(
        D,
        heads=HEADS,
        num_experts=SIDE**2,
        num_experts_per_head=PER_HEAD,
        dim_key=KEY_WIDTH,
        non_competing_scores=False,
    )
    pools = [layer.weight_down_embed.weight, layer.weight_up_embed.weight]
    for weight in pools:
        torch.nn.init.normal_(weight, std=D**-0.5)
    layer.weight_down_embed.sparse = layer.weight_up_embed.sparse = sparse
    others = [p for p in layer.parameters() if all(p is not weight for weight in pools)]
    rule = torch.optim.SparseAdam if sparse else torch.optim.AdamW
    optimizers = [torch.optim.AdamW(others, lr=ROUTER_RATE), rule(pools, lr=1e-3)]

    def run(x: np.ndarray, target: np.ndarray) -> float:
        loss = torch.mean((layer(torch.from_numpy(x)) - torch.from_numpy(target)) ** 2)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    return run


def measure(arm: str, steps: int) -> dict[str, float | list[float]]:
    """Returns the seconds of each step, and the peak memory.

    The first two steps compile and make states. They are not counted.
    """
    make = {
        INT4: lambda: peerjax_step(packed=True),
        ADAMW: lambda: peerjax_step(packed=False),
        ROUTER: router_step,
        TORCH_SPARSE: lambda: torch_step(sparse=True),
        TORCH_ADAMW: lambda: torch_step(sparse=False),
    }
    step, seconds = make[arm](), []
    for (x, target), _ in zip(batches(), range(steps + 2), strict=False):
        start = time.perf_counter()
        loss = step(x, target)
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(loss):
        raise RuntimeError(f"{arm} diverged")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds[2:], "peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
