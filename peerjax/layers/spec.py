"""The interface of a kind of feed-forward layer.

A kind is one frozen dataclass in one file of `peerjax.layers`. Its fields are its section of the
configuration. `peerjax.layers.FEED_FORWARDS` lists the kinds by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn

from peerjax.routing.running_norm import RUNNING


class Sizes(NamedTuple):
    """Settings that all layers of a model share.

    Attributes:
        width: D, features of the residual stream.
        residual_scale: initial scale of a layer's output, which is added to the residual stream.
        dtype: name of the compute dtype; parameters are float32.
        statistics: statistics for routers with batch normalisation, a value of
            `peerjax.routing.running_norm.RunningNorm.statistics`.
        implementation: implementation of lookups, product keys and mixtures, in the form that
            `pallas_kernels.dispatch` takes.
        exchange: how devices that share a pool exchange tokens, in the form that
            `peerjax.sharding.lookups.sharded_lookup` takes.
        routers: number of routers of the model in layers of this section. A loss that is a mean
            over routers is divided by it.
    """

    width: int
    residual_scale: float = 1.0
    dtype: str = "float32"
    statistics: str = RUNNING
    implementation: str | None = None
    exchange: str | None = None
    routers: int = 1


class Context(NamedTuple):
    """Values that all blocks of a stack read in addition to the residual stream.

    The scan over blocks broadcasts every field but `layer`, so a new field needs no new argument.

    Attributes:
        pools: `ExpertPool`s of the stack by name; each of them is a stack of pools.
        layer: index of the block in its stack, an integer; `None` if pools are not stacked.
        positions: position of each token in its document, integers [B, L].
        segments: number of the document in its sequence that each token belongs to, integers
            [B, L]; `None` in decoding.
        budget: number of experts of a pool that each token may use, integers [B, L]; `None` for no
            limit. Only `LookUp` reads it, so layers without pools ignore it.
        seed: seed of the run, an integer, for random draws of layers in training. It is `None`
            outside of training.
        step: number of the training step, an integer; `None` outside of training.
        rows: number of each sequence in the training text, integers [B]; `None` if not known.
        places: the places of the cache, integers [S] from 0; `None` without a cache.
        shared: `peerjax.layers.shared.SharedWeights` if all blocks have the same; else `None`.
    """

    pools: Any = {}  # noqa: RUF012  # a mapping that is never changed
    layer: Any = None
    positions: Any = None
    segments: Any = None
    budget: Any = None
    seed: Any = None
    step: Any = None
    rows: Any = None
    places: Any = None
    shared: Any = None


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """A kind of feed-forward layer. Subclasses add fields and override methods.

    Class attributes:
        section: name of the kind's section in the configuration, and of its module in parameter
            paths.
        undecayed: leaf names of parameters without weight decay, in addition to those in
            `peerjax.layers.parameters.UNDECAYED`.
        packable: leaf names of parameters that are packed if the field `storage` names a format of
            `pallas_kernels.codes`.
        further_sections: other sections that the kind reads.
        is_sparse: whether a token uses a part of the layer, so that a shared path can be beside it.
    """

    section: ClassVar[str]
    undecayed: ClassVar[tuple[str, ...]] = ()
    packable: ClassVar[tuple[str, ...]] = ()
    further_sections: ClassVar[tuple[str, ...]] = ()
    is_sparse: ClassVar[bool] = True

    @classmethod
    def of(cls, sections: Mapping[str, Mapping[str, Any]]) -> FeedForward:
        """Builds the layer from the sections of a configuration."""
        return cls(**sections[cls.section])

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns the fields of the section with their defaults."""
        return dataclasses.asdict(cls())

    @property
    def period(self) -> int:
        """Number of consecutive blocks that share the routing of the first of them."""
        return 1

    @property
    def spread_of_pool(self) -> int:
        """`spread` of `peerjax.routing.product_keys.spread_ids`, which numbers experts."""
        return 1

    @property
    def pools(self) -> dict[str, int]:
        """Number of experts of each pool of a layer, by the pool's name."""
        return {}

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of active experts differs between tokens.

        Evaluation then reads the fields `heads` and `experts_per_head` of the kind.
        """
        return False

    @property
    def packed_storage(self) -> str:
        """Storage of the `packable` parameters."""
        return getattr(self, "storage", "float32")

    def check(self, width: int) -> None:
        """Checks the fields for a model of `width` features.

        Raises:
            ValueError: if a field is invalid. The message names the first one with its section.
        """

    def check_length(self, length: int) -> None:
        """Checks the fields for sequences of `length` tokens in training.

        Raises:
            ValueError: if the layer needs longer ones. The message names the field.
        """

    def module(self, sizes: Sizes, name: str | None = None) -> nn.Module:
        """Builds the layer, with the signature `(x_BLD, context, routed) -> (y_BLD, routed)`.

        In the first block of a period, `routed` is `None`. The other blocks of the period receive
        the `routed` that the first block returns.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define module(sizes, name)")

    def flops(self, width: int) -> dict[str, float]:
        """Returns the forward FLOPs of a token by part of the layer; a multiply-add counts as 2."""
        raise NotImplementedError(f"{type(self).__name__} does not define flops(width)")


def require_positive(spec: FeedForward, *names: str) -> None:
    """Raises a ValueError for the first of the named fields that is not a positive number."""
    for name in names:
        if not getattr(spec, name) > 0:
            raise ValueError(f"{spec.section}.{name}={getattr(spec, name)} is not positive")


def require_not_negative(spec: FeedForward, *names: str) -> None:
    """Raises a ValueError for the first of the named fields that is negative or not a number."""
    for name in names:
        if not getattr(spec, name) >= 0:
            raise ValueError(f"{spec.section}.{name}={getattr(spec, name)} is negative")


def require_choice(spec: FeedForward, name: str, choices: Any) -> None:
    """Raises a ValueError if a field is not one of `choices`."""
    if getattr(spec, name) not in choices:
        raise ValueError(
            f"{spec.section}.{name}={getattr(spec, name)!r} is unknown; "
            f"choose from {', '.join(choices)}"
        )
