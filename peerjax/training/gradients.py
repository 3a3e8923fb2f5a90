"""The gradient of a batch: arrays for params, and factored gradients for pools."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.factored_gradient import FactoredGradient
from peerjax.layers.look_up import TAP, TAPS
from peerjax.model import HEAD, ModelConfig, kept_of, zero_taps
from peerjax.objectives.task import Batch, Task, inputs_of
from peerjax.optim import dequantize
from peerjax.routing.auxiliary import CHOICE, LOSSES, ROUTING, by_module
from peerjax.routing.running import MOMENTS, pooled
from peerjax.sharding.batches import split_rows
from peerjax.sharding.weights import whole
from peerjax.stacks import is_stacked
from peerjax.training.head_loss import mean_loss


class Gradients(NamedTuple):
    """The gradients of a batch, and other values from the same pass.

    Attributes:
        params: a tree like the params.
        pools: a tree like the pools, with the factored gradient of each stack of pools.
        moments: moments of the batch for routers; see `peerjax.routing.running`.
        losses: the terms that layers add to the loss; see `loss_terms`.
    """

    params: Any
    pools: dict[str, dict[str, FactoredGradient]]
    moments: Any
    losses: dict[str, Float[Array, ""]]


def loss_and_gradients(
    task: Task,
    variables: dict[str, Any],
    batch: Batch,
    *,
    frozen: Any = (),
    microbatches: int = 1,
    seed: int = 0,
    step: Any = 0,
) -> tuple[Float[Array, ""], Gradients]:
    """Returns the mean loss of a batch, and gradients of that loss plus the terms of layers.

    Microbatches are computed one after the other, to save memory. Gradients of params are added,
    and factored gradients are joined along their tokens. The result is that of the whole batch.
    Only the terms of layers can differ, because they are means over the parts, and losses that put
    the tokens of a call in relation, as `peerjax.objectives.distillation.output_distance` does.

    Args:
        task: task with the model and the loss.
        variables: collections "params", "pools" and "stats" of the model. The gradient of params is
            with respect to `peerjax.optim.dequantize` of them.
        batch: rows of text.
        frozen: arrays that the loss reads, such as those of a teacher.
        microbatches: number of parts in which the batch is computed. It must divide the rows.
        seed: seed of the run, for layers that draw random numbers.
        step: number of the step.
    """
    model = task.model
    params, fixed = dequantize(variables["params"]), {**variables, "params": None}
    kept_collections = list(dict.fromkeys((ROUTING, MOMENTS, LOSSES, *task.keeps)))

    def loss_of(params: Any, taps: Any, part: Batch) -> tuple[Array, tuple[Array, Any]]:
        params = {name: own if is_stacked(name) else whole(own) for name, own in params.items()}
        trained = {**fixed, "params": params, TAPS: taps}
        x_BLD, kept = model.apply(
            trained,
            *inputs_of(part),
            seed=seed,
            step=step,
            rows_B=part.get("row"),
            mutable=kept_collections,
            with_head=False,
        )
        read = {name: kept.get(name, {}) for name in task.keeps}
        loss = mean_loss(task, params[HEAD], x_BLD, read, part, frozen, step)
        terms = [jnp.sum(term) for term in jax.tree.leaves(kept.get(LOSSES, {}))]
        kept = {name: kept.get(name, {}) for name in (ROUTING, MOMENTS, LOSSES)}
        return sum(terms, loss) / microbatches, (loss / microbatches, kept)

    def of_part(part: Batch) -> tuple[Array, Gradients]:
        taps = zero_taps(model, part["inputs"].size)
        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (_, (loss, kept)), (grads, tap_grads) = differentiate(params, taps, part)
        factored = factored_gradients(model.config, kept[ROUTING], tap_grads)
        terms = loss_terms(model.config, kept[LOSSES])
        return loss, Gradients(grads, factored, kept[MOMENTS], terms)

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


def loss_terms(config: ModelConfig, collection: Any) -> dict[str, Float[Array, ""]]:
    """Returns the terms that layers added to the loss, as means over the layers of a stack.

    Their names are `<layers>/<name>`. If several modules of a block add terms of one name, the
    result's names also contain the module's path.
    """
    found: dict[tuple[str, str], dict[tuple[str, ...], list[Array]]] = {}
    for path, values in by_module(collection).items():
        within = config.place(path).within
        for name, term in values.items():
            of_name = found.setdefault((config.stack_name(path[0]), name), {})
            of_name.setdefault(within, []).append(term)
    terms = {}
    for (stack, name), by_path in found.items():
        for within, parts in by_path.items():
            module = "" if len(by_path) == 1 else ".".join(within) + "/"
            terms[f"{stack}/{module}{name}"] = jnp.mean(jnp.stack(parts))
    return terms


def factored_gradients(
    config: ModelConfig, routing: Any, tap_grads: Any
) -> dict[str, dict[str, FactoredGradient]]:
    """Joins the ids of lookups with the cotangents of their taps, as a tree like the pools.

    Raises:
        ValueError: if two modules of a block read one pool.
    """
    choices = by_module(routing)
    found: dict[tuple[str, str], dict[int, FactoredGradient]] = {}
    for path, taps in by_module(tap_grads).items():
        of_pool = found.setdefault((path[0], path[-1]), {})
        first = config.place(path).layers[0]
        if first in of_pool:
            raise ValueError(
                f"two modules in a block of {path[0]} read the pool {path[-1]!r}; give each its own"
            )
        of_pool[first] = FactoredGradient.from_tap(choices[path][CHOICE].ids, taps[TAP])
    gradients: dict[str, dict[str, FactoredGradient]] = {}
    for (stack, pool), of_pool in found.items():
        blocks = [of_pool[first] for first in sorted(of_pool)]
        gradients.setdefault(stack, {})[pool] = _interleaved(blocks)
    return gradients


def gradient_shapes(task: Task, tokens: int) -> dict[str, dict[str, FactoredGradient]]:
    """Returns the shapes of the factored gradients of a batch, as a tree like the pools."""
    routing, taps = (kept_of(task.model, name, tokens) for name in (ROUTING, TAPS))
    join = partial(factored_gradients, task.model.config)
    return jax.eval_shape(join, routing, taps)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns whether every float in a tree is a finite number."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def only_if(condition: Bool[Array, ""], pools: Any) -> Any:
    """Returns the factored gradients of a tree, or gradients that hit no expert."""
    return jax.tree.map(
        lambda gradient: gradient.only_if(condition),
        pools,
        is_leaf=lambda node: isinstance(node, FactoredGradient),
    )


def _interleaved(blocks: list[FactoredGradient]) -> FactoredGradient:
    """Returns the gradient of a stack from the gradients of the blocks of its periods."""
    if len(blocks) == 1:
        return blocks[0]

    def interleave(*leaves: Array) -> Array:
        stacked = jnp.stack(leaves, axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    return jax.tree.map(interleave, *blocks)


def _join_tokens(parts: Array) -> Array:
    """Reshapes [parts, layers, T, ...] to [layers, parts * T, ...]."""
    joined = jnp.moveaxis(parts, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])
