"""What a kind of feed-forward layer is: the interface between a layer's file and everything else.

A kind is one frozen dataclass in one file of `peerjax.layers`. Its fields are its section of the
configuration. `peerjax.layers.FEED_FORWARDS` lists the kinds by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn

from peerjax.routing.running_norm import RUNNING


class Sizes(NamedTuple):
    """What every layer of a model shares.

    Attributes:
        width: D, features of the residual stream.
        residual_scale: initial scale of what a layer adds to the stream.
        dtype: name of the compute dtype; parameters are float32.
        statistics: what routers with batch normalisation normalise by, as
            `peerjax.routing.running_norm.RunningNorm` takes it.
        implementation: of lookups and mixtures, as `pallas_kernels.dispatch` takes it.
        routers: how many routers the model has in layers of this section. A loss that is a mean
            over routers is divided by it.
    """

    width: int
    residual_scale: float = 1.0
    dtype: str = "float32"
    statistics: str = RUNNING
    implementation: str | None = None
    routers: int = 1


class Context(NamedTuple):
    """What all blocks of a stack read beside the residual stream.

    The scan over blocks broadcasts everything but `layer`, so a new field needs no new argument.

    Attributes:
        pools: the stack's `ExpertPool`s by name, each a stack of pools itself.
        layer: index of the block in its stack, an integer; `None` for pools that are no stacks.
        positions: position of each token in its document, integers [B, L].
        segments: which document of its sequence each token belongs to, integers [B, L]; `None`
            while decoding.
        budget: how many experts each token may use, integers [B, L]; `None` for no limit.
        seed: of the run, an integer, for draws that a layer makes in training; `None` elsewhere.
        step: number of the training step, an integer; `None` elsewhere.
        shared: arrays that all blocks share; a plain function applies them.
    """

    pools: Any = {}  # noqa: RUF012  # a mapping that is never changed
    layer: Any = None
    positions: Any = None
    segments: Any = None
    budget: Any = None
    seed: Any = None
    step: Any = None
    shared: Any = None


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """A kind of feed-forward layer; subclasses add fields and override what differs.

    Class attributes:
        section: name of its section in the configuration, and of its module in parameter paths.
        undecayed: parameters without weight decay, by leaf name; those named "scale", "bias" and
            "embedding" never have any.
        packable: parameters, by leaf name, that the field `storage` packs, if it names a format
            of `pallas_kernels.codes`.
    """

    section: ClassVar[str]
    undecayed: ClassVar[tuple[str, ...]] = ()
    packable: ClassVar[tuple[str, ...]] = ()

    @property
    def period(self) -> int:
        """How many consecutive blocks share what the first of them routes."""
        return 1

    @property
    def pools(self) -> dict[str, int]:
        """The number of experts of each pool that a layer owns, by the pool's name."""
        return {}

    @property
    def routes(self) -> bool:
        """Whether the layer chooses among experts and keeps its choice."""
        return bool(self.pools)

    @property
    def packed_storage(self) -> str:
        """How `packable` parameters are stored."""
        return getattr(self, "storage", "float32")

    def check(self, width: int) -> None:
        """Checks the fields, for a model of `width` features.

        Raises:
            ValueError: naming the first field that does not fit, with its section.
        """

    def module(self, sizes: Sizes, name: str | None = None) -> nn.Module:
        """Builds the layer, of signature `(x_BLD, context, routed) -> (y_BLD, routed)`.

        `routed` is `None` in the first block of a period. What the layer returns there, the other
        blocks of the period receive.
        """
        raise NotImplementedError

    def flops(self, width: int) -> dict[str, float]:
        """Forward FLOPs of a token by part of the layer; a multiply-add counts as 2."""
        raise NotImplementedError


def require_positive(spec: FeedForward, *names: str) -> None:
    """Raises a ValueError for the first of some fields that is not a positive number."""
    for name in names:
        if not getattr(spec, name) > 0:
            raise ValueError(f"{spec.section}.{name}={getattr(spec, name)} is not positive")


def require_not_negative(spec: FeedForward, *names: str) -> None:
    """Raises a ValueError for the first of some fields that is negative or not a number."""
    for name in names:
        if not getattr(spec, name) >= 0:
            raise ValueError(f"{spec.section}.{name}={getattr(spec, name)} is negative")


def require_choice(spec: FeedForward, name: str, choices: Any) -> None:
    """Raises a ValueError if a field is not one of some values."""
    if getattr(spec, name) not in choices:
        raise ValueError(
            f"{spec.section}.{name}={getattr(spec, name)!r} is unknown; "
            f"choose from {', '.join(choices)}"
        )
