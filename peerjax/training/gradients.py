"""The gradient of a batch: of params as a tree of arrays, of pools in factored form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, Float

from pallas_kernels.factored_gradient import FactoredGradient
from peerjax.model import Decoder
from peerjax.pool import ExpertPool
from peerjax.routing.running_norm import MOMENTS, pooled
from peerjax.sharding.batches import split_rows
from peerjax.sharding.pools import dense_pool_gradient, gather_tokens

Batch = dict[str, Array]


class Gradients(NamedTuple):
    """What a batch says about every parameter.

    Attributes:
        params: a tree like the params.
        pools: by run of blocks, the factored gradient of its stack of pools.
        moments: what routers found in the batch; see `peerjax.routing.running_norm`.
    """

    params: Any
    pools: dict[str, FactoredGradient]
    moments: Any


def loss_and_gradients(
    model: Decoder, variables: dict[str, Any], batch: Batch, microbatches: int = 1
) -> tuple[Float[Array, ""], Gradients]:
    """Mean loss of a batch, and its gradients.

    Microbatches are computed one after the other, to save memory: gradients of params add up,
    factored ones are joined along their tokens, so that the result is that of the whole batch.

    Args:
        model: the decoder.
        variables: its collections "params", "pools" and "stats".
        batch: rows of tokens.
        microbatches: in how many parts to compute; they divide the rows.
    """
    params, fixed = variables["params"], {**variables, "params": None}

    def loss_of(params: Any, taps: Any, part: Batch) -> tuple[Array, Any]:
        trained = {**fixed, "params": params, "taps": taps}
        logits, kept = model.apply(trained, *inputs_of(part), mutable=["routing", MOMENTS])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part["targets"])
        return losses.mean() / microbatches, kept

    def of_part(part: Batch) -> tuple[Array, Gradients]:
        taps = _zero_taps(model, part)
        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, kept), (grads, tap_grads) = differentiate(params, taps, part)
        factored = factored_gradients(kept.get("routing", {}), tap_grads)
        return loss, Gradients(grads, factored, kept.get(MOMENTS, {}))

    if microbatches == 1:
        return of_part(batch)

    def add_part(total: Any, part: Batch) -> tuple[Any, tuple[Any, Any]]:
        loss, gradients = of_part(part)
        total = jax.tree.map(jnp.add, total, (loss, gradients.params))
        return total, (gradients.pools, gradients.moments)

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    parts = split_rows(batch, microbatches)
    (loss, grads), (factored, moments) = jax.lax.scan(add_part, zeros, parts)
    return loss, Gradients(grads, jax.tree.map(_join_tokens, factored), pooled(moments))


def factored_gradients(routing: Any, tap_grads: Any) -> dict[str, FactoredGradient]:
    """Joins the ids that the forward pass kept with the cotangents of its taps, by run."""
    taps = layers_with_pool(tap_grads)
    return {
        run: FactoredGradient.from_tap(layer["ids"], taps[run]["pool"])
        for run, layer in layers_with_pool(routing).items()
    }


def gradient_shapes(
    config: ml_collections.ConfigDict, model: Decoder
) -> dict[str, FactoredGradient]:
    """Shapes of the factored gradients of one step, by run."""

    def gradients() -> dict[str, FactoredGradient]:
        tokens = jnp.zeros((config.data.batch_size, config.data.sequence_length), jnp.int32)
        variables = model.init(jax.random.key(0), tokens, tokens, tokens)
        return factored_gradients(variables.get("routing", {}), variables.get("taps", {}))

    return jax.eval_shape(gradients)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every float in a tree is a finite number."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def dense_gradients(pools: Any, factored: dict[str, FactoredGradient]) -> Any:
    """The dense gradients of pools as trees like the pools themselves, as floats."""
    gradients = {}
    for run, gradient in factored.items():
        pool = pools[run]["pool"]
        weights = dense_pool_gradient(gradient, pool.num_experts)
        if not pool.is_packed:
            weights = weights.astype(pool.weights.dtype)
        gradients[run] = {"pool": ExpertPool.of_floats(weights)}
    return gradients


def whole_gradients(pools: Any, factored: dict[str, FactoredGradient]) -> Any:
    """Factored gradients as a tree like the pools, with the tokens of all devices."""
    return {run: {"pool": gather_tokens(factored[run])} for run in pools}


def layers_with_pool(collection: Any) -> dict[str, Any]:
    """Takes `{run: {"block": {layer name: leaves}}}` apart, one layer with a pool a run."""
    return {run: next(iter(tree["block"].values())) for run, tree in collection.items()}


def inputs_of(batch: Batch) -> tuple[Array, Array, Array]:
    """What of a batch the model reads."""
    return batch["inputs"], batch["positions"], batch["segments"]


def _join_tokens(parts: Array) -> Array:
    """[parts, layers, T, ...] as [layers, parts * T, ...]."""
    joined = jnp.moveaxis(parts, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])


def _zero_taps(model: Decoder, batch: Batch) -> Any:
    """Zeros for the model's taps; their shapes depend on the batch."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs_of(batch))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("taps", {}))
