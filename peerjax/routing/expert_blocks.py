"""Products with the weights of the experts that tokens chose, and a mixture of MLPs made of them.

Tokens are sorted by expert into padded blocks, and each block is multiplied by the weights of one
expert. `jax.lax.ragged_dot` would need no padding. But on CPU and NVIDIA GPUs, XLA compiles it to
a multiplication by every expert. On TPUs it does so for the gradient of the weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.dispatch import Kernel, dispatch
from peerjax.routing.token_choice import Slots, block_size, sorted_slots
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import BATCH


def mixture(
    x_TD: Float[Array, "T D"],
    ids_Tk: Int[Array, "T k"],
    gates_Tk: Float[Array, "T k"],
    down_EDF: Float[Array, "E D F"],
    up_EFD: Float[Array, "E F D"],
    *,
    activation: str,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Returns `sum_j gates_j * act(x down_j) up_j` over the k experts that a token chose.

    No token is dropped and no expert has a capacity. Under `jax.set_mesh` every device computes
    its own tokens.

    Args:
        x_TD: tokens, in the dtype of the computation.
        ids_Tk: the experts that each token chose, all different.
        gates_Tk: weights of these experts, float32.
        down_EDF: first matrices of the experts, in the dtype of the tokens.
        up_EFD: second matrices of the experts, in the dtype of the tokens.
        activation: "gelu" (exact), "relu" or "relu2".
        implementation: implementation in the form that `pallas_kernels.dispatch` takes. "xla"
            multiplies block by block, "mosaic_tpu" uses `jax.lax.ragged_dot`, and "mosaic_gpu"
            multiplies all blocks at once. Each of them runs on every platform.

    Raises:
        ValueError: if the activation or the implementation is unknown.
    """
    num_experts = down_EDF.shape[0]

    def local(x_TD: Array, ids_Tk: Array, gates_Tk: Array, down_EDF: Array, up_EFD: Array) -> Array:
        block = block_size(ids_Tk.size, num_experts)
        slots = sorted_slots(ids_Tk, num_experts, block)
        blocks_SbD = to_slots(x_TD, slots).reshape(-1, block, x_TD.shape[-1])
        hidden_SbF = activation_by_name(activation)(
            expert_dot(implementation, blocks_SbD, down_EDF, slots.expert)
        )
        y_SbD = expert_dot(implementation, hidden_SbF, up_EFD, slots.expert)
        y_TkD = from_slots(y_SbD.reshape(-1, x_TD.shape[-1]), slots).astype(jnp.float32)
        return jnp.einsum("tkd,tk->td", y_TkD, gates_Tk).astype(x_TD.dtype)

    operands = (x_TD, ids_Tk, gates_Tk, down_EDF, up_EFD)
    return over_mesh(local, (BATCH, BATCH, BATCH, P(), P()), BATCH)(*operands)


@jax.custom_vjp
def to_slots(x: Float[Array, "T D"], slots: Slots) -> Float[Array, "slots D"]:
    """Copies each token to the slots of its pairs. Padding is 0."""
    k = slots.of_pair.shape[1]
    return x.at[slots.pair // k].get(mode="fill", fill_value=0)


@jax.custom_vjp
def from_slots(y: Float[Array, "slots D"], slots: Slots) -> Float[Array, "T k D"]:
    """Reads the rows of each token's pairs."""
    return y[slots.of_pair]


# Each function is the gradient of the other. Both read rows; differentiation would scatter-add.
to_slots.defvjp(
    lambda x, slots: (to_slots(x, slots), slots),
    lambda slots, dy: (from_slots(dy, slots).sum(1), None),
)
from_slots.defvjp(
    lambda y, slots: (from_slots(y, slots), slots),
    lambda slots, dy: (
        dy.reshape(-1, dy.shape[-1]).at[slots.pair].get(mode="fill", fill_value=0),
        None,
    ),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_dot(
    implementation: str | None,
    blocks: Float[Array, "blocks b M"],
    weights: Float[Array, "E M N"],
    expert: Int[Array, " blocks"],
) -> Float[Array, "blocks b N"]:
    """Multiplies each block by the weights of its expert. `expert` must be ascending."""
    return dispatch(
        "multiply blocks by experts",
        implementation,
        _one_by_one,
        {"mosaic_tpu": Kernel(_ragged), "mosaic_gpu": Kernel(_all_at_once)},
        blocks,
        weights,
        expert,
    )


def _forward(implementation, blocks, weights, expert):
    return expert_dot(implementation, blocks, weights, expert), (blocks, weights, expert)


def _backward(implementation, kept, dy):
    blocks, weights, expert = kept
    of_weights = dispatch(
        "sum the gradients of experts",
        implementation,
        _sum_one_by_one,
        {"mosaic_tpu": Kernel(_sum_one_by_one), "mosaic_gpu": Kernel(_sum_all_at_once)},
        blocks,
        dy,
        expert,
        jnp.zeros(weights.shape, jnp.float32),
    )
    of_blocks = expert_dot(implementation, dy, weights.swapaxes(1, 2), expert)
    return of_blocks, of_weights.astype(weights.dtype), None


expert_dot.defvjp(_forward, _backward)


def _one_by_one(blocks: Array, weights: Array, expert: Array) -> Array:
    return jax.lax.map(lambda each: each[0] @ weights[each[1]], (blocks, expert))


def _all_at_once(blocks: Array, weights: Array, expert: Array, interpret: bool = False) -> Array:
    return jnp.einsum("nbi,nij->nbj", blocks, weights[expert])


def _ragged(blocks: Array, weights: Array, expert: Array, interpret: bool = False) -> Array:
    num_blocks, block, _ = blocks.shape
    rows = block * jnp.bincount(expert, length=weights.shape[0])
    flat = jax.lax.ragged_dot(blocks.reshape(num_blocks * block, -1), weights, rows)
    return flat.reshape(num_blocks, block, -1)


def _sum_one_by_one(
    blocks: Array, dy: Array, expert: Array, zeros: Array, interpret: bool = False
) -> Array:
    def add(total: Array, each: tuple[Array, Array, Array]) -> tuple[Array, None]:
        block, dy, expert = each
        product = jnp.matmul(block.T, dy, preferred_element_type=jnp.float32)
        return total.at[expert].add(product), None

    return jax.lax.scan(add, zeros, (blocks, dy, expert))[0]


def _sum_all_at_once(
    blocks: Array, dy: Array, expert: Array, zeros: Array, interpret: bool = False
) -> Array:
    products = jnp.einsum("nbi,nbj->nij", blocks, dy, preferred_element_type=jnp.float32)
    return zeros + jax.ops.segment_sum(products, expert, len(zeros), indices_are_sorted=True)
