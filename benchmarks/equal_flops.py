"""Shared code of comparisons of models at equal forward FLOPs a token."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.protocol import RECIPE
from benchmarks.recipes import config_of
from benchmarks.sweep import Run, Settings, at_once, from_seeds, tune_rates
from peerjax.config import model_config
from peerjax.data.tokenizer import Tokenizer
from peerjax.flops import forward_flops
from peerjax.model import Decoder
from peerjax.pool import count_expert_parameters
from peerjax.training.checkpoint import count_parameters

LARGEST_MISMATCH = 0.01


class Arm(NamedTuple):
    """One model of one size.

    Attributes:
        settings: the fields of its configuration that differ from the recipe.
        flops: forward FLOPs a token.
        parameters: number of all parameters.
        expert_parameters: number of the parameters in pools.
    """

    settings: Settings
    flops: float
    parameters: int
    expert_parameters: int


class Trained(NamedTuple):
    """Results of training an arm.

    Attributes:
        rates: the best learning rates.
        tuning: all pairs (value, loss) that were tried, by rate.
        runs: the runs at full length, by seed.
    """

    rates: dict[str, float]
    tuning: dict[str, list[tuple[float, float]]]
    runs: list[Run]

    @property
    def losses(self) -> list[float]:
        """Validation losses by seed."""
        return [run.nats_per_token for run in self.runs]

    def over_layers(self, what: str) -> float:
        """Returns the mean of a figure of experts over layers and seeds."""
        return float(np.mean([layer[what] for run in self.runs for layer in run.experts.values()]))


def arm_of(settings: Settings) -> Arm:
    """Returns the recipe with other settings, and its sizes."""
    model = Decoder(model_config(config_of(RECIPE, **settings), Tokenizer.load().vocab_size))
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens)
    in_pools = count_expert_parameters(variables.get("pools", {}))
    parameters = count_parameters(variables["params"]) + in_pools
    return Arm(settings, flops_of(settings), parameters, in_pools)


def flops_of(settings: Settings) -> float:
    """Returns the forward FLOPs a token of the recipe with other settings."""
    config = config_of(RECIPE, **settings)
    model = model_config(config, Tokenizer.load().vocab_size)
    return sum(forward_flops(model, config.data.sequence_length).values())


def mismatch(arms: Sequence[Arm]) -> float:
    """Returns the largest difference of FLOPs from those of the first arm, as a share."""
    return max(abs(arm.flops / arms[0].flops - 1) for arm in arms)


def with_flops(settings: Settings, field: str, wanted: float) -> Settings:
    """Chooses a whole number for a field, so that FLOPs a token are nearest to those wanted.

    Args:
        settings: fields that differ from the recipe.
        field: the field to choose. FLOPs grow linearly with it.
        wanted: the wanted FLOPs a token.

    Raises:
        ValueError: if no positive number comes within 1%.
    """
    one, two = (flops_of({**settings, field: value}) for value in (1, 2))
    found = {**settings, field: max(1, round(1 + (wanted - one) / (two - one)))}
    if abs(flops_of(found) / wanted - 1) > LARGEST_MISMATCH:
        raise ValueError(f"no {field} makes {wanted:g} FLOPs a token")
    return found


def tune_and_train(
    arms: Mapping[Any, Arm],
    starts: Mapping[Any, dict[str, float]],
    steps: int,
    seeds: Sequence[int],
) -> dict[Any, Trained]:
    """Tunes every learning rate of every arm, and trains each arm at its best rates.

    Args:
        arms: the arms, by any key.
        starts: fields of the learning rates with their start values, by the same keys.
        steps: number of steps at full length.
        seeds: the seeds to train from.
    """
    tuning = at_once(
        [partial(tune_rates, RECIPE, arm.settings, starts[key], steps) for key, arm in arms.items()]
    )
    best = dict(zip(arms, tuning, strict=True))
    runs = from_seeds(
        RECIPE,
        {key: {**arm.settings, "steps": steps, **best[key][0]} for key, arm in arms.items()},
        seeds,
    )
    return {key: Trained(*best[key], runs[key]) for key in arms}
