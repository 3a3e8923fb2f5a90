"""The two decompositions of Monet's experts: n * n experts of m neurons from two sets of n halves.

Park et al., "Monet: Mixture of Monosemantic Experts for Transformers", arXiv:2412.04139, section 3
and appendix A. Expert (i, j) has the gate `sum_h g1_hi * g2_hj`. Sums are reordered so that no
array has the size of all N = n * n experts, unless experts are removed. Every matrix is stored as
its linear map, [out, in], as in the published checkpoints. Neuron l of half i has the number
i * m + l.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.activations import ACTIVATIONS
from peerjax.routing.monet import mean_square_sum

# The mean and the mean square of relu^2 over standard normal inputs.
MEAN, MEAN_SQUARE = 0.5, 1.5


def horizontal(
    x: Float[Array, "*S D"],
    g1: Float[Array, "*S H n"],
    g2: Float[Array, "*S H n"],
    u: Float[Array, "nm D"],
    v: Float[Array, "D nm"],
    c: Float[Array, " nm"],
    b: Float[Array, "n D"],
    removed: Bool[Array, " N"] | None = None,
) -> Float[Array, "*S D"]:
    """Horizontal decomposition: expert (i, j) is `V_j relu2(U_i x + c_i) + b_j`.

    This is equation 12. A token takes about `4 D n m` operations for the two matrices, `4 H n m`
    to mix hidden neurons, and `2 n D` for output biases. The largest intermediate arrays have
    2 n m numbers a token.

    Args:
        x: inputs, in the dtype of the computation.
        g1: gates of the first halves. They sum to 1 in each head; otherwise `b` would need their
            sum.
        g2: gates of the second halves. They also sum to 1 in each head.
        u: U_1 .. U_n, one above the other.
        v: V_1 .. V_n, side by side.
        c: hidden biases.
        b: output biases.
        removed: whether each expert is left out of the sum; expert (i, j) has the number i * n + j.
            If this is given, arrays have n^2 numbers a token.
    """
    gates = _Gates(g1, g2, removed)
    moved = gates.to_second(_hidden(x, u, c, num_keys=g1.shape[-1]))
    return _linear(_flat(moved), v) + _biases(gates.of_second(), b)


def vertical(
    x: Float[Array, "*S D"],
    g1: Float[Array, "*S H n"],
    g2: Float[Array, "*S H n"],
    u1: Float[Array, "half_nm D"],
    u2: Float[Array, "half_nm D"],
    v11: Float[Array, "half_D half_nm"],
    v12: Float[Array, "half_D half_nm"],
    v21: Float[Array, "half_D half_nm"],
    v22: Float[Array, "half_D half_nm"],
    c1: Float[Array, " half_nm"],
    c2: Float[Array, " half_nm"],
    b1: Float[Array, "n half_D"],
    b2: Float[Array, "n half_D"],
    removed: Bool[Array, " N"] | None = None,
) -> Float[Array, "*S D"]:
    """Vertical decomposition: each half gives m / 2 hidden neurons and D / 2 outputs.

    With `x1 = relu2(U1_i x + c1_i)` and `x2 = relu2(U2_j x + c2_j)`, expert (i, j) is
    `[V11_i x1 + V12_i x2 + b1_i; V21_j x1 + V22_j x2 + b2_j]`. This is equation 15, in the terms of
    equations 22 to 29. It takes as many operations and intermediate values as `horizontal`.

    Args:
        x: inputs, in the dtype of the computation.
        g1: gates of the first halves. They sum to 1 in each head, so their sums are left out.
        g2: gates of the second halves. They also sum to 1 in each head.
        u1: U1_1 .. U1_n, one above the other.
        u2: U2_1 .. U2_n, one above the other.
        v11: V11_1 .. V11_n, side by side. They map first halves to the left outputs.
        v12: V12_1 .. V12_n, which map second halves to the left outputs. The first half of an
            expert selects among them.
        v21: V21_1 .. V21_n, which map first halves to the right outputs. The second half of an
            expert selects among them.
        v22: V22_1 .. V22_n, which map second halves to the right outputs.
        c1: hidden biases of first halves.
        c2: hidden biases of second halves.
        b1: biases of the left outputs.
        b2: biases of the right outputs.
        removed: see `horizontal`.
    """
    gates = _Gates(g1, g2, removed)
    x1 = _hidden(x, u1, c1, num_keys=g1.shape[-1])
    x2 = _hidden(x, u2, c2, num_keys=g2.shape[-1])
    first, second = gates.of_first(), gates.of_second()
    kept1 = first.astype(x.dtype)[..., None] * x1
    kept2 = second.astype(x.dtype)[..., None] * x2
    left = _linear(_flat(kept1), v11) + _linear(_flat(gates.to_first(x2)), v12)
    right = _linear(_flat(gates.to_second(x1)), v21) + _linear(_flat(kept2), v22)
    return jnp.concatenate([left + _biases(first, b1), right + _biases(second, b2)], axis=-1)


class _Gates(NamedTuple):
    """The gates of all experts as two factors, and their sums over hidden neurons.

    Without removed experts, sums that are known to be 1 are skipped, and the gates of pairs are
    never computed. With removed experts, each sum runs over the pairs that are left.

    Attributes:
        g1: gates of the first halves.
        g2: gates of the second halves.
        removed: whether each expert is left out, or `None`.
    """

    g1: Float[Array, "*S H n"]
    g2: Float[Array, "*S H n"]
    removed: Bool[Array, " N"] | None

    def of_first(self) -> Float[Array, "*S n"]:
        """Returns `sum_j gate_ij`."""
        if self.removed is None:
            return jnp.sum(self.g1, axis=-2)
        return jnp.sum(self._left(self.removed), axis=-1)

    def of_second(self) -> Float[Array, "*S n"]:
        """Returns `sum_i gate_ij`."""
        return self._turned().of_first()

    def to_second(self, hidden: Float[Array, "*S n m"]) -> Float[Array, "*S n m"]:
        """Returns `sum_i gate_ij hidden_i`, computed from [*S, H, m] if no expert is removed."""
        if self.removed is not None:
            left = self._left(self.removed).astype(hidden.dtype)
            return jnp.einsum("...ij,...im->...jm", left, hidden)
        g1, g2 = self.g1.astype(hidden.dtype), self.g2.astype(hidden.dtype)
        per_head = jnp.einsum("...im,...hi->...hm", hidden, g1)
        return jnp.einsum("...hm,...hj->...jm", per_head, g2)

    def to_first(self, hidden: Float[Array, "*S n m"]) -> Float[Array, "*S n m"]:
        """Returns `sum_j gate_ij hidden_j`."""
        return self._turned().to_second(hidden)

    def _turned(self) -> "_Gates":
        """Returns the same gates with the sides exchanged."""
        n = self.g1.shape[-1]
        removed = None if self.removed is None else self.removed.reshape(n, n).T.reshape(-1)
        return _Gates(self.g2, self.g1, removed)

    def _left(self, removed: Bool[Array, " N"]) -> Float[Array, "*S n n"]:
        """Returns the gates of all experts, with 0 for removed ones."""
        gates = jnp.einsum("...hi,...hj->...ij", self.g1, self.g2)
        return jnp.where(removed.reshape(gates.shape[-2:]), 0, gates)


def _hidden(x: Array, u: Array, c: Array, num_keys: int) -> Array:
    """Returns `relu2(U x + c)`, [*S, n, m]."""
    return ACTIVATIONS["relu2"](_linear(x, u) + c).reshape(*x.shape[:-1], num_keys, -1)


def _biases(gates: Array, b: Array) -> Array:
    return gates.astype(b.dtype) @ b


def _linear(x: Array, weights: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, weights)


def _flat(hidden: Array) -> Array:
    return hidden.reshape(*hidden.shape[:-2], -1)


def kept_square_sum(num_keys: int, heads: int, top_k: int) -> float:
    """Returns the mean of `sum_i (sum_h g_hi)^2 x_i^2` for a hidden neuron of a fresh layer.

    Heads are assumed to be independent, so two of them share a key with probability 1 / n.
    """
    concentration = mean_square_sum(num_keys, top_k)
    return MEAN_SQUARE * heads * (concentration + (heads - 1) / num_keys)


def moved_square_sum(num_keys: int, heads: int, top_k: int) -> float:
    """Returns the mean of `sum_j (sum_h g2_hj sum_i g1_hi x_i)^2` for a fresh hidden neuron.

    Heads are assumed to be independent, as in `kept_square_sum`.
    """

    def of_two_heads(together: float) -> float:
        """Returns `sum_j g2_hj g2_kj` times the mean product of the neurons of both heads."""
        return together * (MEAN**2 + (MEAN_SQUARE - MEAN**2) * together)

    concentration = mean_square_sum(num_keys, top_k)
    return heads * of_two_heads(concentration) + heads * (heads - 1) * of_two_heads(1 / num_keys)
