"""Loss per domain and expert usage on the validation text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from peerjax.analysis.codes import code_statistics
from peerjax.analysis.usage import Usage, expert_usage
from peerjax.data.packing import PackedRows
from peerjax.data.tokenizer import Tokenizer
from peerjax.sharding import BATCH, sharding_of

_code_statistics = jax.jit(code_statistics)


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """Summed loss over some text."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy of the next token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The same loss per byte of text, comparable between tokenizers."""
        return self.nats / (self.num_bytes * math.log(2))

    def __add__(self, other: TextLoss) -> TextLoss:
        return TextLoss(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        losses: loss by domain.
        gate_sums: by layer name, the sum of every expert's gates over the evaluation tokens.
        code_figures: by layer name, figures of the codes of packed pools.
    """

    losses: dict[str, TextLoss]
    gate_sums: dict[str, Float[np.ndarray, " N"]]
    code_figures: dict[str, dict[str, float]]

    @property
    def overall(self) -> TextLoss:
        """The loss over all domains together, token by token."""
        return sum(self.losses.values(), TextLoss(0.0, 0, 0))

    @property
    def usage(self) -> dict[str, Usage]:
        """Usage and unevenness by layer."""
        return {name: expert_usage(sums) for name, sums in self.gate_sums.items()}

    def metrics(self) -> dict[str, float]:
        """All figures, flat, for the metrics file."""
        figures = {}
        for domain, loss in {"all": self.overall, **self.losses}.items():
            figures[f"validation/{domain}/nats_per_token"] = loss.nats_per_token
            figures[f"validation/{domain}/bits_per_byte"] = loss.bits_per_byte
        for layer, usage in self.usage.items():
            figures[f"experts/{layer}/usage"] = usage.usage
            figures[f"experts/{layer}/unevenness"] = usage.unevenness
        for layer, of_layer in self.code_figures.items():
            for name, value in of_layer.items():
                figures[f"codes/{layer}/{name}"] = value
        return figures


def evaluate(
    eval_step: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    variables: dict[str, Any],
    texts: Mapping[str, PackedRows],
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    rows: Callable[[PackedRows], Sequence[int]],
    batch_size: int,
) -> Evaluation:
    """Evaluates on some text, by domain.

    Args:
        eval_step: see `peerjax.training.step.make_eval_step`.
        variables: of the model.
        texts: packed rows by domain.
        tokenizer: to count bytes.
        mesh: over which a batch is split.
        rows: which of a domain's to read.
        batch_size: rows at once, and as many more as let every device have the same number.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size
    losses: dict[str, TextLoss] = {}
    gate_sums: dict[str, np.ndarray] = {}
    token_bytes = tokenizer.bytes_per_token()
    for domain, text in texts.items():
        total = TextLoss(0.0, 0, 0)
        chosen = rows(text)
        for first in range(0, len(chosen), batch_size):
            batch = _padded_batch(text, chosen[first : first + batch_size], batch_size)
            targets = batch["targets"][batch["weight"] > 0]
            sums = jax.device_get(eval_step(variables, put_batch(mesh, batch)))
            total += TextLoss(float(sums["nats"]), targets.size, int(token_bytes[targets].sum()))
            for run, per_layer in sums["gate_sums"].items():
                for index, per_expert in enumerate(per_layer):
                    zeros = np.zeros(len(per_expert))
                    sums_so_far = gate_sums.setdefault(f"{run}.{index}", zeros)
                    sums_so_far += per_expert
        losses[domain] = total
    return Evaluation(losses, gate_sums, _code_figures(variables["pools"]))


def _code_figures(pools: Any) -> dict[str, dict[str, float]]:
    figures = {}
    for run, tree in pools.items():
        if tree["pool"].is_packed:
            statistics = jax.device_get(_code_statistics(tree["pool"]))
            for index, (histogram, saturated, log_scale) in enumerate(
                zip(*statistics, strict=True)
            ):
                figures[f"{run}.{index}"] = {
                    "saturated_rows": float(saturated),
                    "log_scale": float(log_scale),
                    **{f"share_{eighth}": float(share) for eighth, share in enumerate(histogram)},
                }
    return figures


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places a process's rows on the mesh as its part of the global batch."""
    sharding = sharding_of(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()
    }


def _padded_batch(rows: PackedRows, chosen: Sequence[int], size: int) -> dict[str, np.ndarray]:
    """Batches rows, with copies of weight 0 in the places that are left over."""
    padded = [*chosen, *[chosen[0]] * (size - len(chosen))]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(dict(rows[row]) for row in padded))
    weight = np.arange(size) < len(chosen)
    return {**batch, "weight": weight.astype(np.float32)}
