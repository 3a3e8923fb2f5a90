import json
from functools import partial

import jax
import numpy as np
import pytest
from etils import epath

from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.errors import ConfigError, DataError
from peerjax.evaluation import evaluate
from peerjax.evaluation.domains import mutual_information
from peerjax.evaluation.specialisation import groups_of, shuffled
from peerjax.evaluation.usage import GateSums
from peerjax.inference.evaluating import evaluate_without, print_evaluation, write_evaluation
from peerjax.inference.trained import open_run, restore
from peerjax.routing.metarouter import switches
from peerjax.sharding import make_mesh
from peerjax.training.loop import train
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on two domains that have no word in common."""
    folder = tmp_path_factory.mktemp("specialisation")
    rng = np.random.default_rng(0)
    for domain, words in {"one": "ant bee cat dog", "two": "19 28 37 46"}.items():
        (folder / domain).mkdir()
        for number in range(40):
            text = " ".join(rng.choice(words.split(), 200))
            (folder / domain / f"{number}.txt").write_text(text)
    config = tiny_config(f"one={folder}/one/*.txt;two={folder}/two/*.txt")
    config.model.layers = (("metapeer", 2),)
    config.metapeer.choice, config.metapeer.chunk = "sequence", 8
    config.steps = 60
    config.metapeer.balance_weight = 0.1
    train(config, str(folder / "run"))
    return open_run(str(folder / "run"))


def sums_by_domain(run, rows):
    """Returns sums of gates, read in whole batches of a domain: by domain, unit and layer."""
    texts, mesh = load_corpus(run.config).validation, make_mesh()
    probes = {"experts": GateSums(), "metaexperts": GateSums("metaexperts")}
    choose = partial(validation_rows, count=rows)
    with jax.set_mesh(mesh):
        variables = restore(run, mesh)
        found = evaluate(run.model, variables, texts, probes, mesh, rows=choose, batch_size=5)
    return {name: found[name] for name in texts}


@pytest.mark.slow
def test_metaexperts_of_domains_are_told_from_a_shuffled_control(run, tmp_path, capsys):
    found = evaluate_without(run, (), rows=12, specialise=True)
    sums = sums_by_domain(run, 12)
    assert found.information.keys() == {"layer_0", "layer_1"}
    for layer, units in found.information.items():
        assert units.keys() == {"experts", "metaexperts"}
        for unit, groups in units.items():
            expected = mutual_information({name: each[unit][layer] for name, each in sums.items()})
            assert groups["all"]["domains"] == pytest.approx(expected, abs=1e-6)
        for groups in units.values():
            assert groups.keys() == {"all"}
            of_all = groups["all"]
            assert of_all["largest"] == pytest.approx(np.log(2))
            assert 0 <= of_all["shuffled"] < of_all["domains"] <= of_all["largest"]
    write_evaluation(epath.Path(tmp_path), found, {"step": run.step})
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["information"] == found.information
    assert "shares" not in record["texts"]["all"]["metaexperts"]["layer_0"]
    print_evaluation(epath.Path(tmp_path))
    assert "layer_1, metaexperts" in capsys.readouterr().out
    assert (tmp_path / "metaexperts.png").exists()


def test_shuffled_rows_are_all_rows_in_groups_of_the_same_sizes():
    texts = {"one": list(range(5)), "two": list(range(10, 19))}
    found = shuffled(texts, np.random.default_rng(0))
    assert {name: len(rows) for name, rows in found.items()} == {"one": 5, "two": 9}
    assert sorted(found["one"] + found["two"]) == [*range(5), *range(10, 19)]
    assert sorted(found["one"]) != texts["one"]


def test_domains_are_compared_within_their_groups():
    assert groups_of(["web", "notes"]) == {"all": ["web", "notes"]}
    found = groups_of(["drama", "encyclopedia", "french", "code", "go"])
    assert found.pop("all") == ["drama", "encyclopedia", "french", "code", "go"]
    assert found == {
        "topic": ["drama", "encyclopedia"],
        "natural language": ["encyclopedia", "french"],
        "programming language": ["code", "go"],
    }


def test_what_has_nothing_to_compare_is_refused(finished, corpus, tmp_path):
    with pytest.raises(DataError, match="all text is of one domain, files: specialisation is"):
        evaluate_without(open_run(str(finished)), (), rows=2, specialise=True)
    config = tiny_config(corpus)
    config.steps, config.model.layers = 1, (("dense", 1),)
    train(config, str(tmp_path / "dense"))
    with pytest.raises(ConfigError, match="no layer of this model has experts that could belong"):
        evaluate_without(open_run(str(tmp_path / "dense")), (), rows=2, specialise=True)


def test_switches_are_counted_where_chunks_begin():
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(3), (2, 14, 1)), axis=-1)[..., :2]
    positions = np.array([[*range(14)], [*range(5), *range(9)]])
    begins, changed = jax.jit(switches, static_argnums=2)(chosen, positions, 4)
    for row in range(2):
        for place in range(14):
            is_begin = positions[row, place] in (4, 8, 12)
            assert begins[row, place] == is_begin
            sets = [{*chosen[row, place - back]} for back in (0, 1)] if is_begin else [1, 1]
            assert changed[row, place] == (sets[0] != sets[1])
    assert 0 < changed.sum() < begins.sum()
