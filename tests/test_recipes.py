"""Recipes: all are valid; those of a paper have its sizes."""

import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.recipes import config_of
from peerjax.config import model_config, validate, with_fields_of
from peerjax.distillation.student import weights_of
from peerjax.evaluation.codes import code_statistics
from peerjax.evaluation.usage import GateSums
from peerjax.model import Decoder
from peerjax.objectives import language_model
from tests.conftest import REPOSITORY

RECIPES = sorted(path.stem for path in Path(REPOSITORY, "configs").glob("*.py"))
STUDENTS = sorted(path.stem for path in Path(REPOSITORY, "configs", "distill").glob("*.py"))
# Park et al., arXiv:2412.04139, table 6.
MONETS = {"monet_850m": 853_501_440, "monet_1_4b": 1_465_157_632, "monet_4_1b": 4_173_401_088}


@pytest.mark.parametrize("recipe", RECIPES)
def test_is_valid(recipe):
    validate(config_of(recipe))


@pytest.mark.parametrize("recipe", STUDENTS)
def test_a_student_of_the_quickstart_is_valid(recipe):
    student = importlib.import_module(f"configs.distill.{recipe}").get_config()
    config = with_fields_of(config_of("quickstart"), student)
    config.distill.teacher = "runs/quickstart"
    validate(config)
    weights_of(config).check(*[model_config(config, vocab_size=4096)] * 2)


@pytest.mark.parametrize("kind", ["monet_hd", "monet_vd"])
@pytest.mark.parametrize("recipe", MONETS)
def test_monet_has_as_many_parameters_as_in_the_paper(recipe, kind):
    config = config_of(recipe)
    config.model.layers = ((kind, config.model.layers[0][1]),)
    validate(config)
    model = Decoder(model_config(config, vocab_size=32_000))
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == MONETS[recipe]
    assert f"{MONETS[recipe]:,}" in importlib.import_module(f"configs.{recipe}").__doc__


def test_the_largest_can_be_evaluated():
    # Its pool has more codes than an int32 counts.
    config = config_of("peer_60b_one_gpu")
    task = language_model(config, vocab_size=4096)
    pools = jax.eval_shape(task.init, jax.random.key(0))["pools"]
    ((pool,),) = (of_stack.values() for of_stack in pools.values())
    (sums,) = jax.eval_shape(lambda: GateSums().zeros(task.model)).values()
    assert sums.shape == (12, pool.num_experts)
    assert jax.eval_shape(code_statistics, pool).histogram.shape == (12, 8)
