"""A cached teacher agrees with a live one, and its files are complete or absent."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.data.pipeline import load_corpus
from peerjax.distillation import cache as module
from peerjax.distillation.cache import Cache, CachedTeacher, Contents
from peerjax.distillation.distill import distill
from peerjax.distillation.student import student_config, weights_of
from peerjax.errors import ConfigError, DataError
from peerjax.inference.trained import open_run, restore
from peerjax.objectives import language_model
from peerjax.objectives.distillation import LiveTeacher, towards
from peerjax.sharding import make_mesh
from peerjax.training import loop
from peerjax.training.gradients import loss_and_gradients
from tests.distillation.test_distill import recipe_of_student

ROWS = 4  # of a shard


class Case:
    """A student of the fixture `finished`, with its text and the teacher's variables."""

    def __init__(self, folder, **changes):
        changes = {"distill.top_k": 8, **changes}
        self.run = open_run(str(folder))
        recipe = recipe_of_student(**changes)
        self.config = student_config(recipe, self.run, str(folder), cached=True)
        self.corpus = load_corpus(self.config)
        self.weights = weights_of(self.config)
        self.contents = Contents.of(self.config, self.run, self.corpus, self.weights)
        self.variables = restore(self.run, make_mesh())

    def cache(self, folder, **fields):
        contents = dataclasses.replace(self.contents, **fields)
        return Cache(folder, contents, self.config, self.corpus.train)

    def fill(self, folder):
        cache, mesh = self.cache(folder), make_mesh()
        with jax.set_mesh(mesh):
            cache.fill(self.run.model, self.variables, self.corpus.train, mesh, 8)
        return cache


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_SHARD", ROWS)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("beta", [(0.0, 0.0), (1.0, 0.1)])
def test_live_and_cached_teachers_agree(beta, finished, tmp_path, small_shards):
    case = Case(finished, **{"distill.beta": beta})
    cache = case.fill(tmp_path / "cache")
    task = language_model(case.config, case.corpus.tokenizer.vocab_size)
    variables = jax.jit(task.init)(jax.random.key(3))
    live = LiveTeacher(case.run.model, case.variables)
    found = []
    for teacher in (live, CachedTeacher(cache)):
        distilled = towards(task, teacher, case.weights, case.config.steps)
        rows = distilled.of_rows(case.corpus.train)
        chosen = [rows[row] for row in list(cache._places)[:8]]
        batch = {name: jnp.stack([row[name] for row in chosen]) for name in chosen[0]}
        step = jax.jit(functools.partial(loss_and_gradients, distilled))
        loss, gradients = step(variables, batch, frozen=teacher.frozen, step=1)
        found.append((loss, gradients.params))
    (one, of_live), (other, of_cached) = found
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for name, other in zip(*map(jax.tree.leaves, (of_live, of_cached)), strict=True):
        np.testing.assert_allclose(name, other, rtol=1e-5, atol=1e-5 * np.abs(name).max())


def test_a_killed_caching_resumes_to_the_same_bytes(finished, tmp_path, small_shards, monkeypatch):
    case = Case(finished)
    case.fill(tmp_path / "whole")
    write = module.write_records

    class Killed(Exception):
        pass

    def write_or_die(path, records):
        if path.name.endswith("3.array_record"):
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"begun")
            raise Killed
        write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_records", write_or_die)
        with pytest.raises(Killed):
            case.fill(tmp_path / "killed")
    assert case.cache(tmp_path / "killed").missing() == [3, 4, 5, 6, 7]
    case.fill(tmp_path / "killed")
    (tmp_path / "killed" / ".teacher-000003.array_record.1.tmp").unlink()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert not case.cache(tmp_path / "killed").missing()


def test_a_longer_run_adds_shards(finished, tmp_path, small_shards):
    Case(finished, steps=2).fill(tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    longer = Case(finished, steps=3)
    assert longer.cache(tmp_path / "cache").missing() == [4, 5]
    longer.fill(tmp_path / "cache")
    after = files_of(tmp_path / "cache")
    assert after | before == after
    assert len(after) == len(before) + 2


def test_damage_is_found_and_mended(finished, tmp_path, small_shards):
    case = Case(finished)
    cache = case.fill(tmp_path / "cache")
    row = next(iter(cache._places))
    path = tmp_path / "cache" / "teacher-000000.array_record"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert case.cache(tmp_path / "cache").missing() == [0]
    changed = bytearray(whole)
    changed[200] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(DataError, match="is damaged or missing"):
        case.cache(tmp_path / "cache").read(row)
    path.unlink()
    case.fill(tmp_path / "cache")
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher", "abc"),
        ("text", "abc"),
        ("top_k", 9),
        ("order", '0, weights [["a", 1.0]]'),
        ("outputs", (0, 0)),
    ],
)
def test_a_cache_of_something_else_is_refused(field, value, finished, tmp_path, small_shards):
    case = Case(finished, steps=1)
    case.fill(tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"has another {field} "):
        case.cache(tmp_path / "cache", **{field: value})


@pytest.mark.slow
def test_a_student_trains_from_a_cache_and_without_the_teacher_in_memory(
    finished, tmp_path, capsys, monkeypatch
):
    frozen = []
    make_step = loop.make_train_step

    def keep(config, task, optimizer):
        frozen.append(task.frozen)
        return make_step(config, task, optimizer)

    monkeypatch.setattr(loop, "make_train_step", keep)
    distill(recipe_of_student("int8"), str(tmp_path / "a"), str(finished), str(tmp_path / "cache"))
    assert frozen == [()]
    contents = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert contents["top_k"] == 64
    # 64 tokens of 2 + 4 bytes, four masses, and outputs of two layers of 16 features.
    assert f"{64 * 6 + 16 + 2 * 16 * 4:,} bytes a token" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    distill(recipe_of_student("int3"), str(tmp_path / "b"), str(finished), str(tmp_path / "cache"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
