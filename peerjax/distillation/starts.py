"""First weights of a student that starts from its teacher, and how good each stage of them is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from pallas_kernels.codes import CODES
from peerjax.config import MONET, PLAIN, SEARCHED
from peerjax.data.mixing import Rows
from peerjax.data.pipeline import row_order
from peerjax.distillation.from_monet import MOST, Pairs, converted, pair_gates
from peerjax.distillation.rounding import search_scales
from peerjax.evaluation.evaluate import whole_batches
from peerjax.layers.peer import PeerConfig
from peerjax.model import Decoder
from peerjax.objectives.language import next_token_loss
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.sharding.batches import get_whole
from peerjax.training.start import as_stored

# A stage whose pools have more float weights than this is left out.
LARGEST_POOLS = 1 << 30


class Stage(NamedTuple):
    """A stage of the conversion of a teacher.

    Attributes:
        title: what the report calls it.
        model: the model at this stage.
        variables: its variables.
        facts: facts for the report.
        is_start: whether training starts from it.
    """

    title: str
    model: Decoder
    variables: dict[str, Any]
    facts: dict[str, Any]
    is_start: bool = False


class Conversion(NamedTuple):
    """What a conversion starts from.

    Attributes:
        config: configuration of the student.
        teacher: the teacher.
        variables: its variables.
        student: the student.
        rows: its training text. The first rows that training reads are the calibration text.
        mesh: the current mesh.
    """

    config: ml_collections.ConfigDict
    teacher: Decoder
    variables: dict[str, Any]
    student: Decoder
    rows: Rows
    mesh: Mesh

    def stages(self) -> Iterator[Stage]:
        """Yields the stages that `distill.start` names, one of which is the start."""
        start = self.config.distill.start
        if start in (MONET, PLAIN):
            yield from self._from_monet()
            return
        convert = partial(as_stored, old=self.teacher, new=self.student)
        yield from self._rounded(self.variables["pools"], jax.jit(convert)(self.variables))

    def _rounded(self, pools: Any, rounded: dict[str, Any]) -> Iterator[Stage]:
        """Yields a student whose pools are rounded, with both kinds of scales.

        Args:
            pools: the pools before they were rounded.
            rounded: variables of the student with the scales of training.
        """
        start, storage = self.config.distill.start, self.student.config.pool_storage
        searches = storage in CODES and bool(pools)
        takes_searched = start == SEARCHED and searches
        title = "rounded"
        yield Stage(title, self.student, rounded, {}, is_start=not takes_searched)
        if not searches:
            return
        loss_of = calibration_loss(self)
        print("searching scales on calibration text", flush=True)
        found, multiples = search_scales(
            pools, storage, lambda pools: loss_of({**rounded, "pools": pools})
        )
        variables = {**rounded, "pools": found}
        facts = {"multiples of the scales of training": multiples}
        yield Stage("searched scales", self.student, variables, facts, takes_searched)

    def _from_monet(self) -> Iterator[Stage]:
        """Yields a PEER that equals the teacher, then pruned, cut and rounded."""
        kept, facts = self._kept_pairs()

        def stage(title: str, kept: Mapping[str, Pairs], **fields: Any) -> Stage:
            model = with_peer(self.student, "float32", **fields)
            args = (self.teacher.config, model.config, kept)
            return Stage(title, model, convert(self.variables, *args), facts)

        def convert(variables: dict[str, Any], *args: Any) -> dict[str, Any]:
            return jax.jit(lambda variables: converted(variables, *args))(variables)

        peer = self.config.peer
        every = {"experts_per_head": facts[MOST] * peer.experts_per_pair}
        floats = self.teacher.config.depth * peer.num_experts[0] * peer.num_experts[1]
        floats *= peer.experts_per_pair * 2 * self.teacher.config.width
        is_small = floats <= LARGEST_POOLS
        if not is_small:
            print(f"the stages before the cut are left out: they have {floats:,} float weights")
        if self.config.distill.start == MONET and is_small:
            yield stage("as PEER", {}, kept_pairs=0, **every)
            if kept:
                yield stage("pruned", kept, **every)
        cut = stage(f"cut to {peer.experts_per_head} a head", kept)
        yield cut
        rounded = jax.jit(partial(as_stored, old=cut.model, new=self.student))(cut.variables)
        yield from self._rounded(cut.variables["pools"], rounded)

    def _kept_pairs(self) -> tuple[dict[str, Pairs], dict[str, Any]]:
        """Returns the pairs that keep their experts by stack, and figures of the calibration."""
        count = jax.jit(pair_gates(self.teacher))
        sums: dict[str, Any] = {}
        for batch, _ in calibration_batches(self):
            for name, found in get_whole(count(self.variables, batch)).items():
                join = np.maximum if name == MOST else np.add
                sums[name] = join(sums[name], found) if name in sums else found
        facts: dict[str, Any] = {MOST: int(sums.pop(MOST))}
        kept, pairs = self.config.peer.kept_pairs, {}
        for stack, gates in sums.items():
            order = np.argsort(-gates, axis=-1, kind="stable")
            facts[f"{stack}/pairs in use"] = np.sum(gates > 0, axis=-1).tolist()
            if kept:
                pairs[stack] = np.sort(order[:, :kept], axis=-1)
                of_kept = np.take_along_axis(gates, pairs[stack], axis=-1)
                share = of_kept.sum(-1) / gates.sum(-1)
                facts[f"{stack}/gates of kept pairs"] = share.tolist()
        return pairs, facts


def with_peer(model: Decoder, storage: str, **fields: Any) -> Decoder:
    """Returns a model with other fields of its PEER layers, and another storage of pools."""
    layers = tuple(
        (dataclasses.replace(spec, **fields) if isinstance(spec, PeerConfig) else spec, count)
        for spec, count in model.config.layers
    )
    return Decoder(dataclasses.replace(model.config, layers=layers, pool_storage=storage))


def calibration_batches(given: Conversion) -> list[tuple[dict[str, Array], int]]:
    """Returns batches of calibration text, and their numbers of rows."""
    count = min(given.config.distill.calibration_rows, len(given.rows))
    chosen = row_order(given.config, given.rows, count)
    return list(whole_batches(given.rows, chosen, given.config.data.batch_size, given.mesh))


def calibration_loss(given: Conversion) -> Callable[[dict[str, Any]], float]:
    """Returns a function from the student's variables to its mean loss on calibration text."""
    batches, model = calibration_batches(given), given.student

    @jax.jit
    def total(variables: dict[str, Any], batch: dict[str, Array]) -> Array:
        logits: Any = model.apply(dequantize(variables), *inputs_of(batch))
        of_rows = jnp.mean(next_token_loss(logits, (), batch, (), 0), axis=-1)
        return jnp.sum(of_rows * batch["weight"])

    def loss_of(variables: dict[str, Any]) -> float:
        rows = sum(count for _, count in batches)
        return sum(total(variables, batch).item() for batch, _ in batches) / rows

    return loss_of
