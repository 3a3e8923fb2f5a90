"""The gradient of a batch: of params as a tree of arrays, of pools in factored form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, Float

from pallas_kernels.factored_gradient import FactoredGradient
from peerjax.model import Decoder
from peerjax.optim import dequantize
from peerjax.pool import ExpertPool
from peerjax.routing.auxiliary import LOSSES, ROUTING
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
        losses: the terms that layers add to the loss; see `loss_terms`.
    """

    params: Any
    pools: dict[str, FactoredGradient]
    moments: Any
    losses: dict[str, Float[Array, ""]]


def loss_and_gradients(
    model: Decoder, variables: dict[str, Any], batch: Batch, microbatches: int = 1
) -> tuple[Float[Array, ""], Gradients]:
    """Mean loss of a batch, and the gradients of its sum with the terms that layers add.

    Microbatches are computed one after the other, to save memory: gradients of params add up,
    factored ones are joined along their tokens, so that the result is that of the whole batch.
    Only terms of layers may differ from it: they are means over the parts.

    Args:
        model: the decoder.
        variables: its collections "params", "pools" and "stats"; the gradient of params is that
            with respect to `peerjax.optim.dequantize` of them.
        batch: rows of tokens.
        microbatches: in how many parts to compute; they divide the rows.
    """
    params, fixed = dequantize(variables["params"]), {**variables, "params": None}

    def loss_of(params: Any, taps: Any, part: Batch) -> tuple[Array, tuple[Array, Any]]:
        trained = {**fixed, "params": params, "taps": taps}
        logits, kept = model.apply(trained, *inputs_of(part), mutable=[ROUTING, MOMENTS, LOSSES])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part["targets"])
        loss = losses.mean()
        terms = [jnp.sum(term) for term in jax.tree.leaves(kept.get(LOSSES, {}))]
        return sum(terms, loss) / microbatches, (loss / microbatches, kept)

    def of_part(part: Batch) -> tuple[Array, Gradients]:
        taps = _zero_taps(model, part)
        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (_, (loss, kept)), (grads, tap_grads) = differentiate(params, taps, part)
        factored = factored_gradients(kept.get(ROUTING, {}), tap_grads)
        terms = loss_terms(kept.get(LOSSES, {}))
        return loss, Gradients(grads, factored, kept.get(MOMENTS, {}), terms)

    if microbatches == 1:
        return of_part(batch)

    def add_part(total: Any, part: Batch) -> tuple[Any, Any]:
        loss, gradients = of_part(part)
        total = jax.tree.map(jnp.add, total, (loss, gradients.params))
        return total, (gradients.pools, gradients.moments, gradients.losses)

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    parts = split_rows(batch, microbatches)
    (loss, grads), (factored, moments, terms) = jax.lax.scan(add_part, zeros, parts)
    factored, terms = jax.tree.map(_join_tokens, factored), jax.tree.map(jnp.mean, terms)
    return loss, Gradients(grads, factored, pooled(moments), terms)


def loss_terms(collection: Any) -> dict[str, Float[Array, ""]]:
    """Terms that layers added to the loss, named `<run>/<name>`: means over a run's layers."""
    return {
        f"{run}/{name}": jnp.mean(term)
        for run, layer in layer_by_run(collection).items()
        for name, term in layer.items()
    }


def factored_gradients(routing: Any, tap_grads: Any) -> dict[str, FactoredGradient]:
    """Joins the ids that the forward pass kept with the cotangents of its taps, by run."""
    layers = layer_by_run(routing)
    return {
        run: FactoredGradient.from_tap(layers[run]["ids"], taps["pool"])
        for run, taps in layer_by_run(tap_grads).items()
    }


def gradient_shapes(
    config: ml_collections.ConfigDict, model: Decoder
) -> dict[str, FactoredGradient]:
    """Shapes of the factored gradients of one step, by run."""

    def gradients() -> dict[str, FactoredGradient]:
        tokens = jnp.zeros((config.data.batch_size, config.data.sequence_length), jnp.int32)
        variables = model.init(jax.random.key(0), tokens, tokens, tokens)
        return factored_gradients(variables.get(ROUTING, {}), variables.get("taps", {}))

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


def layer_by_run(collection: Any) -> dict[str, Any]:
    """The leaves of each run, by name: one module of what a run scans has some."""

    def leaves_of(tree: Any) -> Any:
        inner = next(iter(tree.values()))
        return leaves_of(inner) if isinstance(inner, dict) else tree

    return {run: leaves_of(tree) for run, tree in collection.items()}


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
