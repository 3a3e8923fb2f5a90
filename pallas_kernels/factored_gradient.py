"""The gradient of a pool, stored as a sum of outer products and not as an array of vectors.

For expert n, with coefficients `c_down = gate * act'(h) * (up_n . dy_t)` and
`c_up = gate * act(h)`,

    dL/d down_n = sum_t c_down[t, n] * x_t        dL/d up_n = sum_t c_up[t, n] * dy_t.

The exact gradient of a whole pool therefore takes T * (3 K + 2 D) numbers, whatever N is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import storage
from pallas_kernels.sorted_pairs import num_chunks, row_sums, sort_pairs

# Hit experts or pairs that one pass of a loop over a whole gradient processes.
CHUNK = 256


def clip_factor(norm: Float[Array, ""], max_norm: float | Float[Array, ""]) -> Float[Array, ""]:
    """Returns the factor with which a gradient of some norm has at most the norm `max_norm`."""
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))


class Tap(NamedTuple):
    """Zeros for `lookup`. Their "gradient" is the factored gradient without its ids."""

    c_down: Float[Array, "*layers T K"]
    c_up: Float[Array, "*layers T K"]
    x: Float[Array, "*layers T D"]
    dy: Float[Array, "*layers T D"]

    @staticmethod
    def zeros_for(ids: Int[Array, "T K"], x: Float[Array, "T D"]) -> Tap:
        """Returns a tap for a lookup of `ids` with input `x`, whose dtype its x and dy have."""
        coefficients = jnp.zeros(ids.shape, jnp.float32)
        return Tap(coefficients, coefficients, jnp.zeros_like(x), jnp.zeros_like(x))


class FactoredGradient(NamedTuple):
    """The exact gradient of a pool, or of a stack of pools (leading axis `layers`)."""

    ids: Int[Array, "*layers T K"]
    c_down: Float[Array, "*layers T K"]
    c_up: Float[Array, "*layers T K"]
    x: Float[Array, "*layers T D"]
    dy: Float[Array, "*layers T D"]

    @staticmethod
    def from_tap(ids: Int[Array, "*layers T K"], tap: Tap) -> FactoredGradient:
        """Joins the cotangent of a tap with the ids of the same forward pass."""
        return FactoredGradient(ids.astype(jnp.int32), *tap)  # the sentinel fits in int32

    def only_if(self, condition: Bool[Array, ""]) -> FactoredGradient:
        """Returns the same gradient if `condition` holds, else one that hits no expert."""
        return self._replace(
            c_down=jnp.where(condition, self.c_down, 0), c_up=jnp.where(condition, self.c_up, 0)
        )

    def clip(self, max_norm: float | Float[Array, ""], num_experts: int) -> FactoredGradient:
        """Scales the coefficients so that `norm` is at most `max_norm`."""
        return self.scaled(clip_factor(self.norm(num_experts), max_norm))

    def scaled(self, factor: Float[Array, ""]) -> FactoredGradient:
        """Returns the gradient times a number."""
        return self._replace(c_down=self.c_down * factor, c_up=self.c_up * factor)

    def dense(self, num_experts: int) -> Float[Array, "*layers N 2 D"]:
        """Returns the gradient as a float32 array of the pool's shape.

        Tokens are processed in chunks, so no array of size [T, K, D] is ever made.
        """
        if self.ids.ndim == 2:
            stacked = jax.tree.map(lambda leaf: leaf[None], self)
            return stacked.dense(num_experts)[0]
        layers, tokens, num_chosen = self.ids.shape
        chunk = max(1, CHUNK // num_chosen)
        padding = -tokens % chunk
        no_expert = jnp.full((layers, padding, num_chosen), num_experts, self.ids.dtype)
        ids = jnp.concatenate([self.ids, no_expert], axis=1)
        rest = [jnp.pad(leaf, ((0, 0), (0, padding), (0, 0))) for leaf in self[1:]]
        chunks = [leaf.reshape(-1, chunk, leaf.shape[-1]) for leaf in (ids, *rest)]
        layer = jnp.repeat(jnp.arange(layers), (tokens + padding) // chunk)

        def add_chunk(total: Array, xs: tuple[Array, list[Array]]) -> tuple[Array, None]:
            layer, (ids, c_down, c_up, x, dy) = xs
            down_CKD = c_down[:, :, None] * x[:, None, :].astype(jnp.float32)
            up_CKD = c_up[:, :, None] * dy[:, None, :].astype(jnp.float32)
            width = x.shape[-1]
            down, up = down_CKD.reshape(-1, width), up_CKD.reshape(-1, width)
            return storage.add_to_experts(total, layer, ids.reshape(-1), down, up), None

        total = jnp.zeros((layers, num_experts, 2, self.x.shape[-1]), jnp.float32)
        return jax.lax.scan(add_chunk, total, (layer, chunks))[0]

    def rows(
        self, num_experts: int
    ) -> tuple[Int[Array, "*layers P"], Float[Array, "*layers P 2 D"]]:
        """Returns each expert with a gradient once, and its gradient vectors; P = T * K.

        This is for tests and inspection. The vectors (`rows` in code) take as much memory as
        [T, K, 2, D] floats.

        Args:
            num_experts: N, which also fills the ids of unused places.

        Returns:
            `(ids, rows)`. The ids ascend. The vectors of unused places are zero.
        """
        if self.ids.ndim == 3:
            return jax.vmap(lambda own: own.rows(num_experts))(self)
        pairs = sort_pairs(self.ids, self.c_down, self.c_up, num_experts)
        width = self.x.shape[-1]

        def put_chunk(chunk: Array, rows: Array) -> Array:
            place = chunk * CHUNK + jnp.arange(CHUNK)
            sums = row_sums(pairs, self.x, self.dy, chunk, CHUNK)
            return rows.at[place].set(sums, mode="drop", unique_indices=True)

        rows = jnp.zeros((self.ids.size, 2, width), jnp.float32)
        return pairs.expert, jax.lax.fori_loop(0, num_chunks(pairs, CHUNK), put_chunk, rows)

    def norm(self, num_experts: int) -> Float[Array, ""]:
        """Returns the exact Euclidean norm of the dense gradient of all layers together.

        Vectors whose squares are not finite do not count, because an update skips them. The method
        computes the vectors once more, in chunks. It makes no array of the size of all vectors.
        """
        stack = self if self.ids.ndim == 3 else jax.tree.map(lambda leaf: leaf[None], self)

        def add_layer(layer: Array, total: Array) -> Array:
            ids, c_down, c_up, x, dy = (leaf[layer] for leaf in stack)
            pairs = sort_pairs(ids, c_down, c_up, num_experts)

            def add_chunk(chunk: Array, total: Array) -> Array:
                squares = jnp.sum(jnp.square(row_sums(pairs, x, dy, chunk, CHUNK)), axis=-1)
                return total + jnp.sum(jnp.where(jnp.isfinite(squares), squares, 0))

            return jax.lax.fori_loop(0, num_chunks(pairs, CHUNK), add_chunk, total)

        return jnp.sqrt(jax.lax.fori_loop(0, stack.ids.shape[0], add_layer, jnp.zeros(())))
