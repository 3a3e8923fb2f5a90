"""Monet's layers (Park et al. 2024, arXiv:2412.04139): a router shared by consecutive blocks.

`peerjax.layers.decompositions` computes the experts. `peerjax.routing.monet` has the router.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.codes import CODES
from peerjax.layers.decompositions import (
    MEAN_SQUARE,
    horizontal,
    kept_square_sum,
    moved_square_sum,
    vertical,
)
from peerjax.layers.spec import (
    Context,
    FeedForward,
    Sizes,
    require_choice,
    require_not_negative,
    require_positive,
)
from peerjax.routing.auxiliary import keep_choice, removed_experts, sow_loss
from peerjax.routing.choice import FactoredChoice
from peerjax.routing.monet import MonetRouter, ambiguity, keys_per_side, quantile, uniformity


@dataclasses.dataclass(frozen=True)
class MonetConfig(FeedForward):
    """The section "monet", which both kinds share.

    Attributes:
        num_experts: N = n^2. Each side has n keys and n halves of experts.
        expert_width: m, hidden neurons of an expert.
        heads: H, routing heads.
        top_k: average number of keys that are on, for each side and head.
        group: number of consecutive blocks that share a router.
        uniformity_weight: weight of the loss that spreads use over keys.
        ambiguity_weight: weight of the loss that makes choices sharp.
        storage: storage of the matrices. "float32" trains them with AdamW. A format of
            `pallas_kernels.codes`, such as "int4", stores them as packed codes. They then train
            with the rule and the learning rate of pools.
    """

    section: ClassVar[str] = "monet"
    undecayed: ClassVar[tuple[str, ...]] = ("c", "b", "c1", "c2", "b1", "b2")
    packable: ClassVar[tuple[str, ...]] = ("u", "v", "u1", "u2", "v11", "v12", "v21", "v22")

    num_experts: int = 64**2
    expert_width: int = 4
    heads: int = 4
    top_k: int = 8
    group: int = 2
    uniformity_weight: float = 1e-3
    ambiguity_weight: float = 1e-3
    storage: str = "float32"

    @property
    def period(self) -> int:
        """Number of consecutive blocks that share a router."""
        return self.group

    def check(self, width: int) -> None:
        """Raises a ValueError if fields are out of range or do not fit together."""
        require_positive(self, "expert_width", "heads", "top_k", "group")
        require_not_negative(self, "uniformity_weight", "ambiguity_weight")
        require_choice(self, "storage", ("float32", *CODES))
        try:
            quantile(keys_per_side(self.num_experts), self.top_k)
        except ValueError as error:
            raise ValueError(f"monet: {error}") from None

    def flops(self, width: int) -> dict[str, float]:
        """Counts a block's share of its router, and the experts."""
        keys = keys_per_side(self.num_experts)
        hidden = keys * self.expert_width
        return {
            "router": 2 * width * 2 * self.heads * keys / self.group,
            "experts": 4 * width * hidden + 4 * self.heads * hidden + 2 * width * keys,
        }


@dataclasses.dataclass(frozen=True)
class MonetHDConfig(MonetConfig):
    """Monet's layer in horizontal decomposition."""

    def module(self, sizes: Sizes, name: str | None = None) -> "MonetHD":
        """Builds the layer."""
        return MonetHD(self, sizes, name=name)


@dataclasses.dataclass(frozen=True)
class MonetVDConfig(MonetConfig):
    """Monet's layer in vertical decomposition."""

    def check(self, width: int) -> None:
        """Raises a ValueError as `MonetConfig` does, or if a width is odd."""
        super().check(width)
        if self.expert_width % 2 or width % 2:
            raise ValueError(
                f"monet.expert_width={self.expert_width} and model.width={width} must be "
                "even for 'monet_vd', which halves them"
            )

    def module(self, sizes: Sizes, name: str | None = None) -> "MonetVD":
        """Builds the layer."""
        return MonetVD(self, sizes, name=name)


class Routed(NamedTuple):
    """Routing that the first block of a group passes to the other blocks.

    Attributes:
        choice: gates of all experts, as two factors.
        removed: whether each expert is left out, or `None`.
    """

    choice: FactoredChoice
    removed: Bool[Array, " N"] | None = None


class MonetLayer(nn.Module):
    """The common part of `MonetHD` and `MonetVD`: the router, and initial parameters.

    The first block of a group has the router and sows its choice into the collection "routing". It
    also sows `uniformity` and `ambiguity` into "losses", as means over the routers of the model.

    Hidden weights have variance 1 / D, and biases are 0. The deviation of output weights is such
    that a fresh layer's outputs are as large as those of a fresh dense MLP with relu^2. (The
    published code draws every weight with deviation 0.02, which makes outputs several times
    smaller.)
    """

    config: MonetConfig
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, routed: Routed | None = None
    ) -> tuple[Float[Array, "B L D"], Routed]:
        """Applies the layer to every token."""
        routed = self._route(x_BLD) if routed is None else routed
        return self._experts(x_BLD.astype(jnp.dtype(self.sizes.dtype)), routed), routed

    def _route(self, x_BLD: Array) -> Routed:
        config = self.config
        router = MonetRouter(
            config.num_experts, config.heads, config.top_k, self.sizes.statistics, name="router"
        )
        choice = FactoredChoice(*router(x_BLD))
        keep_choice(self, FactoredChoice(*(g.reshape(-1, *g.shape[-2:]) for g in choice)))
        for name, weight, loss in (
            ("uniformity", config.uniformity_weight, uniformity),
            ("ambiguity", config.ambiguity_weight, ambiguity),
        ):
            sow_loss(self, name, weight / self.sizes.routers * loss(*choice))
        return Routed(choice, removed_experts(self))

    def _experts(self, x_BLD: Array, routed: Routed) -> Array:
        raise NotImplementedError

    def _parameter(self, name: str, shape: tuple[int, ...], variance: float = 0.0) -> Array:
        init = nn.initializers.normal(variance**0.5) if variance else nn.initializers.zeros
        return self.param(name, init, shape).astype(jnp.dtype(self.sizes.dtype))


class MonetHD(MonetLayer):
    """Monet's layer in horizontal decomposition; see `peerjax.layers.decompositions.horizontal`.

    Parameters: "u" [n m, D], "v" [D, n m], "c" [n m], "b" [n, D].
    """

    def _experts(self, x_BLD: Array, routed: Routed) -> Array:
        config, width = self.config, x_BLD.shape[-1]
        n = keys_per_side(config.num_experts)
        hidden = n * config.expert_width
        fan_in = config.expert_width * moved_square_sum(n, config.heads, config.top_k)
        variance = self.sizes.residual_scale**2 * MEAN_SQUARE / fan_in
        return horizontal(
            x_BLD,
            routed.choice.g1,
            routed.choice.g2,
            u=self._parameter("u", (hidden, width), 1 / width),
            v=self._parameter("v", (width, hidden), variance),
            c=self._parameter("c", (hidden,)),
            b=self._parameter("b", (n, width)),
            removed=routed.removed,
        )


class MonetVD(MonetLayer):
    """Monet's layer in vertical decomposition; see `peerjax.layers.decompositions.vertical`.

    Parameters: "u1", "u2" [n m/2, D], "v11", "v12", "v21", "v22" [D/2, n m/2], "c1", "c2" [n m/2],
    "b1", "b2" [n, D/2].
    """

    def _experts(self, x_BLD: Array, routed: Routed) -> Array:
        config, width = self.config, x_BLD.shape[-1]
        n, m = keys_per_side(config.num_experts), config.expert_width
        hidden, out = n * m // 2, width // 2
        of_neuron = kept_square_sum(n, config.heads, config.top_k) + moved_square_sum(
            n, config.heads, config.top_k
        )
        variance = self.sizes.residual_scale**2 * MEAN_SQUARE / (m // 2 * of_neuron)
        parameter = self._parameter
        return vertical(
            x_BLD,
            routed.choice.g1,
            routed.choice.g2,
            **{name: parameter(name, (hidden, width), 1 / width) for name in ("u1", "u2")},
            **{
                name: parameter(name, (out, hidden), variance)
                for name in ("v11", "v12", "v21", "v22")
            },
            **{name: parameter(name, (hidden,)) for name in ("c1", "c2")},
            **{name: parameter(name, (n, out)) for name in ("b1", "b2")},
            removed=routed.removed,
        )
