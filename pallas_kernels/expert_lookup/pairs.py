"""Arithmetic of each (token, expert) pair, which all implementations share."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from pallas_kernels.activations import Activation
from pallas_kernels.storage import ExpertPool, read_scales


class Pairs(NamedTuple):
    """Numbers of each pair that are known before any expert is read.

    Attributes:
        gate: mixing weight; 0 where there is no expert.
        bias: number that is added to the hidden value.
        down_scale: scale of the expert's `down`; 0 where there is no expert.
        up_scale: scale of the expert's `up`; 0 where there is no expert.
    """

    gate: Float[Array, "*S"]
    bias: Float[Array, "*S"]
    down_scale: Float[Array, "*S"]
    up_scale: Float[Array, "*S"]

    @staticmethod
    def of(
        pool: ExpertPool,
        ids: Int[Array, "T K"],
        gates: Float[Array, "T K"],
        hidden_bias: Float[Array, "T K"],
    ) -> "Pairs":
        """Returns the pairs of a lookup."""
        return Pairs(gates, hidden_bias, *read_scales(pool, ids))

    def mixing(self, code_x: Float[Array, "*S"], act: Activation) -> Float[Array, "*S"]:
        """Returns the factors of the codes of `up`, given the product of `down`'s codes with x."""
        return self.gate * act(code_x * self.down_scale + self.bias) * self.up_scale

    def gradients(
        self,
        code_x: Float[Array, "*S"],
        code_dy: Float[Array, "*S"],
        act: Activation,
    ) -> "PairGradients":
        """Returns all gradients of the pairs, given the products of codes with x and with dy."""
        hidden = code_x * self.down_scale + self.bias
        active = act.value(hidden)
        up_dy = code_dy * self.up_scale
        c_down = act.slope(hidden) * (self.gate * up_dy)
        c_up = self.gate * active
        return PairGradients(
            gates=active * up_dy,
            c_down=c_down,
            c_up=c_up,
            down_scale=c_down * code_x,
            up_scale=c_up * code_dy,
        )


class PairGradients(NamedTuple):
    """Gradients of each pair. The gradients of scales must be added up by expert."""

    gates: Float[Array, "*S"]
    c_down: Float[Array, "*S"]
    c_up: Float[Array, "*S"]
    down_scale: Float[Array, "*S"]
    up_scale: Float[Array, "*S"]
