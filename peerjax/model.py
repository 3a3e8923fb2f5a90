"""The decoder: stacks of equal blocks, each with attention and a feed-forward layer of any kind."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.layers.attention import Attention, AttentionConfig, KVCache
from peerjax.layers.look_up import TAPS
from peerjax.layers.shared import NAME as SHARED
from peerjax.layers.shared import SharedPath, apply_shared
from peerjax.layers.spec import Context, FeedForward, Sizes
from peerjax.layers.vocabulary import Embedding, Head
from peerjax.pool import ExpertPool, initialize_pool, places_for
from peerjax.routing.auxiliary import (
    DECODE,
    EXPERT_IDS,
    LOSSES,
    OUTPUTS,
    REMOVED,
    ROUTING,
    SINKS,
    by_module,
    sow_last,
)
from peerjax.routing.running import FIRST, MOMENTS, STATS
from peerjax.routing.running_norm import RUNNING
from peerjax.sharding import weights
from peerjax.sharding.batches import over_batch
from peerjax.sharding.over_mesh import size_of_mesh
from peerjax.stacks import BLOCK, GROUP, stack_index, stack_key

# Key of the attention cache, beside the collection "decode" in the cache of `decode`.
ATTENTION = "attention"
HEAD = "head"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings that a decoder is built from; `peerjax.config` documents the fields."""

    vocab_size: int
    width: int
    layers: tuple[tuple[FeedForward, int], ...]
    attention: AttentionConfig
    dtype: str
    remat: bool
    pool_storage: str
    shared_mlp: int = 0  # hidden neurons of the shared path; 0 for no such path
    shared_tied: bool = True  # whether all layers have one set of weights of the shared path
    routing_statistics: str = RUNNING  # statistics of routers with batch normalisation
    implementation: str | None = None  # implementation of lookups and mixtures
    exchange: str | None = None  # how devices that share a pool exchange tokens
    pool_parts: int = 1  # equal parts into which a mesh splits pools, which are padded for it

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(count for _, count in self.layers)

    @property
    def residual_scale(self) -> float:
        """Initial scale of a sub-layer's output.

        It keeps the variance of the residual stream at O(1) over all sub-layers.
        """
        return (2 * self.depth) ** -0.5

    def sizes(self, spec: FeedForward) -> Sizes:
        """Returns the settings that layers of a kind share with all other layers."""
        same = (each for each in self.layers if each[0].section == spec.section)
        return Sizes(
            width=self.width,
            residual_scale=self.residual_scale,
            dtype=self.dtype,
            statistics=self.routing_statistics,
            implementation=self.implementation,
            exchange=self.exchange,
            routers=sum(count // each.period for each, count in same),
        )

    def places(self, num_experts: int) -> int:
        """Returns for how many experts the arrays of a pool have room."""
        return places_for(num_experts, self.width, self.pool_storage, self.pool_parts)

    @property
    def expert_parameters(self) -> int:
        """Number of weights of all experts."""
        experts = sum(count * sum(spec.pools.values()) for spec, count in self.layers)
        return 2 * experts * self.width

    def stack_name(self, key: str) -> str:
        """Returns the name of a stack in metrics, from its key in trees, such as "run_1"."""
        layers = self.place((key, BLOCK)).layers
        return f"layer_{layers[0]}" if len(layers) == 1 else f"layers_{layers[0]}-{layers[-1]}"

    def pool_name(self, key: str, pool: str) -> str:
        """Returns what names of metrics add for a pool: its name, if layers have several."""
        spec, _ = self.layers[self.place((key, BLOCK)).stack]
        return f".{pool}" if len(spec.pools) > 1 else ""

    def place(self, path: tuple[str, ...]) -> Place:
        """Returns the location of a module from its path, such as `("run_1", "block", "peer")`."""
        stack = stack_index(path[0])
        assert stack is not None, path
        first = sum(count for _, count in self.layers[:stack])
        spec, count = self.layers[stack]
        if path[1] == BLOCK:
            return Place(stack, range(first, first + count), path[2:])
        number = int(path[2].removeprefix(f"{BLOCK}_"))
        return Place(stack, range(first + number, first + count, spec.period), path[3:])

    def in_order(self, collection: Any, name: str) -> Float[Array, "layers ..."]:
        """Returns what blocks sowed by a name, in the order of layers."""
        found: dict[int, Array] = {}
        for path, values in by_module(collection).items():
            if name in values:
                found |= dict(zip(self.place(path).layers, values[name], strict=True))
        return jnp.stack([found[layer] for layer in sorted(found)])


class Place(NamedTuple):
    """Location of a module in the model.

    Attributes:
        stack: number of the stack that contains the module.
        layers: numbers of the layers that contain it, in the order of the leading axis of its
            arrays.
        within: path of the module in its block.
    """

    stack: int
    layers: range
    within: tuple[str, ...]


class Block(nn.Module):
    """Pre-norm attention and a pre-norm feed-forward layer, each added to the residual stream.

    The shared path reads the same input as the feed-forward layer. If the collection "outputs" is
    mutable, the block sows `feed_forward` [B, L, D] into it, the sum of both. If "sinks" is, the
    block sows the `largest` magnitude of its output and the `median` [B] into it.
    """

    config: ModelConfig
    feed_forward: FeedForward

    @nn.compact
    def __call__(
        self, carry: tuple[Array, KVCache | None], context: Context, routed: Any = None
    ) -> tuple[tuple[Array, KVCache | None], Any]:
        """Maps `(x, cache)`. Also returns the routing for the other blocks of the period."""
        x_BLD, cache = carry
        config, sizes = self.config, self.config.sizes(self.feed_forward)
        attention = Attention(
            config.attention, sizes.residual_scale, jnp.dtype(config.dtype), name="attention"
        )
        normed = nn.RMSNorm(dtype=config.dtype, name="attention_norm")(x_BLD)
        mixed, cache = attention(normed, context, cache)
        x_BLD = over_batch(x_BLD + mixed)
        normed = nn.RMSNorm(dtype=config.dtype, name="feed_forward_norm")(x_BLD)
        layer = self.feed_forward.module(sizes, name=self.feed_forward.section)
        y_BLD, routed = layer(normed, context, routed)
        x_BLD = x_BLD + y_BLD
        if config.shared_mlp and self.feed_forward.is_sparse:
            shared = context.shared
            if not config.shared_tied:
                shared = _shared_path(config)(config.width)
            shared_BLD = apply_shared(shared, normed, jnp.dtype(config.dtype))
            x_BLD, y_BLD = x_BLD + shared_BLD, y_BLD + shared_BLD
        if self.is_mutable_collection(OUTPUTS):
            sow_last(self, OUTPUTS, "feed_forward", y_BLD)
        if self.is_mutable_collection(SINKS):
            magnitudes_BN = jnp.abs(x_BLD.reshape(x_BLD.shape[0], -1).astype(jnp.float32))
            sow_last(self, SINKS, "largest", jnp.max(magnitudes_BN, axis=-1))
            sow_last(self, SINKS, "median", jnp.median(magnitudes_BN, axis=-1))
        return (over_batch(x_BLD), cache), routed


class Group(nn.Module):
    """The blocks of one period, one after the other."""

    config: ModelConfig
    feed_forward: FeedForward

    @nn.compact
    def __call__(
        self, carry: tuple[Array, KVCache | None], context: Context
    ) -> tuple[tuple[Array, KVCache | None], None]:
        """Maps `(x, cache)`. `context.layer` is the number of the group in its stack."""
        routed, period = None, self.feed_forward.period
        unit = _unit(self, self.config)
        for number in range(period):
            block = unit(self.config, self.feed_forward, name=f"{BLOCK}_{number}")
            own = context._replace(layer=context.layer * period + number)
            carry, routed = block(carry, own, routed)
        return carry, None


class Stack(nn.Module):
    """Equal blocks that are scanned block by block or period by period, and their pools."""

    config: ModelConfig
    feed_forward: FeedForward
    length: int

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, cache: KVCache | None
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Returns the residual stream after the stack, and the stack's cache if there is one."""
        pools = {
            name: self.variable("pools", name, self._initialize_pool, num_experts).value
            for name, num_experts in self.feed_forward.pools.items()
        }
        grouped = self.feed_forward.period > 1
        unit = Group if grouped else _unit(self, self.config)
        length = self.length // self.feed_forward.period
        given = ("params", STATS, TAPS, REMOVED, DECODE)
        sown = (MOMENTS, FIRST, ROUTING, LOSSES, OUTPUTS, SINKS)
        units = nn.scan(
            unit,
            variable_axes=dict.fromkeys((*given, *sown), 0),
            split_rngs={"params": True},
            # Pools are closed over. As scanned inputs they would be copied layer by layer.
            in_axes=(Context(*[nn.broadcast] * len(Context._fields))._replace(layer=0),),
            length=length,
        )(self.config, self.feed_forward, name=GROUP if grouped else BLOCK)
        context = context._replace(pools=pools, layer=jnp.arange(length))
        (x_BLD, cache), _ = units((x_BLD, cache), context)
        return x_BLD, cache

    def _initialize_pool(self, num_experts: int) -> ExpertPool:
        return initialize_pool(
            self.make_rng("params"),
            self.length,
            num_experts,
            self.config.width,
            residual_scale=self.config.sizes(self.feed_forward).residual_scale,
            storage=self.config.pool_storage,
            places=self.config.places(num_experts),
        )


def head_of(config: ModelConfig, name: str | None = None) -> Head:
    """Returns the module that maps the input of the head to logits."""
    return Head(config.vocab_size, config.width, config.dtype, name=name)


def _places(cache: dict[str, KVCache]) -> Int[Array, " S"]:
    return jnp.arange(next(iter(cache.values())).key.shape[2])


def _shared_path(config: ModelConfig) -> SharedPath:
    return SharedPath(config.shared_mlp, config.residual_scale, name=SHARED)


def _unit(parent: nn.Module, config: ModelConfig) -> type[Block]:
    """Returns the class of a block in a module.

    It is recomputed in the backward pass if `config.remat` is set. On a mesh that splits weights,
    it gathers its own, and again in the backward pass.
    """
    block, policies = Block, jax.checkpoint_policies
    if weights.have_split_gradients() and not parent.is_initializing():
        block = nn.map_variables(block, "params", trans_in_fn=_with_whole_weights)
    if config.remat:
        policy = policies.save_only_these_names(EXPERT_IDS)
    elif weights.are_split():
        policy = policies.save_anything_except_these_names(weights.GATHERED)
    else:
        return block
    return nn.remat(block, policy=policy, prevent_cse=False)


def _with_whole_weights(collections: Any) -> Any:
    return {**collections, "params": weights.whole(collections["params"])}


class Decoder(nn.Module):
    """A causal language model over packed documents.

    The collection "params" has float leaves. The collection "pools" has the stacked `ExpertPool`s
    of stack i at `run_<i>/<name>`. These modules document the other collections:

    - `peerjax.routing.running`: "stats", "moments" and "first"
    - `peerjax.layers.look_up`: "taps"
    - `peerjax.routing.auxiliary`: "routing", "losses", "outputs", "sinks", "removed" and
      "decode"

    Arrays of a stack have a leading axis of its blocks or of its periods. `ModelConfig.place`
    returns their layer numbers.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        cache: dict[str, KVCache] | None = None,
        only: Int[Array, " B"] | None = None,
        budget_BL: Int[Array, "B L"] | None = None,
        seed: Int[Array, ""] | int | None = None,
        step: Int[Array, ""] | int | None = None,
        rows_B: Int[Array, " B"] | None = None,
        with_head: bool = True,
    ) -> Any:
        """Returns the logits of the next token, float32 [B, L, V].

        Args:
            tokens_BL: token ids.
            positions_BL: position of each token in its document.
            segments_BL: number of the document in its sequence that each token belongs to. By
                default, every sequence is one document.
            cache: keys and values by stack, passed by `decode`. With a cache, each sequence
                continues its document at `positions_BL`, and the result is `(logits, cache)`.
                Tokens at a position and after it see the keys and values written there, until
                these are overwritten.
            only: index of the one token in each sequence whose logits are returned. The result
                then has L = 1.
            budget_BL: number of experts of a pool that each token may use; no limit by default.
            seed: seed of the run in training, for layers that draw random numbers.
            step: number of the training step, for layers that draw random numbers.
            rows_B: number of each sequence in the training text, for layers that draw random
                numbers.
            with_head: whether to return logits. Otherwise the result is the input of `Head`.
        """
        config = self.config
        embed = Embedding(config.vocab_size, config.width, config.dtype, name="embed")
        x_BLD = over_batch(embed(tokens_BL))
        if segments_BL is None and cache is None:
            segments_BL = jnp.zeros_like(tokens_BL)
        context = Context(
            positions=positions_BL,
            segments=segments_BL,
            budget=budget_BL,
            seed=None if seed is None else jnp.asarray(seed),
            step=None if step is None else jnp.asarray(step),
            rows=rows_B,
            places=None if cache is None else _places(cache),
            shared=_shared_path(config)(config.width) if self._has_tied_path else None,
        )
        caches = {}
        for index, (feed_forward, length) in enumerate(config.layers):
            name = stack_key(index)
            stack = Stack(config, feed_forward, length, name=name)
            x_BLD, caches[name] = stack(x_BLD, context, None if cache is None else cache[name])
        if only is not None:
            x_BLD = jnp.take_along_axis(x_BLD, only[:, None, None], axis=1)
        x_BLD = nn.RMSNorm(dtype=config.dtype, name="final_norm")(x_BLD)
        if not with_head:
            return x_BLD
        logits_BLV = head_of(config, name=HEAD)(x_BLD)
        return logits_BLV if cache is None else (logits_BLV, caches)

    @property
    def _has_tied_path(self) -> bool:
        return bool(self.config.shared_mlp) and self.config.shared_tied


@functools.cache
def _kept_shapes(model: Decoder, tokens: int) -> dict[str, Any]:
    """Returns the shapes of the collections "routing" and "taps" for a number of tokens.

    Axis 1 of every array is that of tokens.
    """

    def kept() -> dict[str, Any]:
        tokens_BL = jnp.zeros((tokens, 1), jnp.int32)
        variables = model.init(jax.random.key(0), tokens_BL, tokens_BL)
        return {name: variables.get(name, {}) for name in (ROUTING, TAPS)}

    return jax.eval_shape(kept)


def kept_of(model: Decoder, collection: str, tokens: int) -> Any:
    """Returns the shapes of the collection "routing" or "taps" for a number of tokens."""
    # One token a device, so that the model is traced once, whatever the batch is.
    shapes = _kept_shapes(model, size_of_mesh())[collection]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], tokens, *leaf.shape[2:]), leaf.dtype),
        shapes,
    )


def zero_taps(model: Decoder, tokens: int) -> Any:
    """Returns the collection "taps" for a number of tokens."""
    shapes = kept_of(model, TAPS, tokens)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def empty_cache(config: ModelConfig, batch: int, size: int) -> dict[str, Any]:
    """Returns an empty cache for `decode`, for `batch` sequences of at most `size` tokens each.

    Layers add their own state to it when they first read tokens.
    """
    heads, dim = config.attention.kv_heads, config.width // config.attention.heads
    zeros = partial(KVCache.zeros, batch=batch, size=size, heads=heads, dim=dim)
    dtype = jnp.dtype(config.dtype)
    keys_and_values = {
        stack_key(index): zeros(layers=length, dtype=dtype)
        for index, (_, length) in enumerate(config.layers)
    }
    return {ATTENTION: keys_and_values, DECODE: {}}


def decode(
    model: Decoder,
    variables: dict[str, Any],
    cache: dict[str, Any],
    tokens_BL: Int[Array, "B L"],
    positions_BL: Int[Array, "B L"],
    **options: Any,
) -> tuple[Float[Array, "B _ V"], dict[str, Any]]:
    """Reads tokens of every sequence that follow the tokens in the cache.

    Args:
        model: the decoder.
        variables: collections "params", "pools" and "stats" of the decoder, with packed matrices as
            floats.
        cache: result of `empty_cache` or of an earlier call.
        tokens_BL: token ids.
        positions_BL: position of each token in its document.
        **options: further arguments of a call of `Decoder`.

    Returns:
        The logits, and the cache that includes these tokens.
    """
    given = {**variables, DECODE: cache[DECODE]}
    read, kept = model.apply(
        given, tokens_BL, positions_BL, cache=cache[ATTENTION], mutable=[DECODE], **options
    )
    logits, keys_and_values = read
    return logits, {ATTENTION: keys_and_values, DECODE: kept.get(DECODE, {})}
