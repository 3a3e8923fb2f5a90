import jax
import numpy as np
import pytest

from peerjax.data.mixing import MixedRows, checked_weights
from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import load_corpus, row_order, train_batches
from peerjax.data.prepare import Settings, prepare
from peerjax.errors import ConfigError
from tests.data.test_pipeline import rows_of, take
from tests.training.tiny import tiny_config, write_corpus


def mixed(lengths, weights):
    rng = np.random.default_rng(1)
    streams = [rng.integers(0, 99, 32 * length + 1).astype(np.int32) for length in lengths]
    return MixedRows([PackedRows(stream, 32, end_of_text=0) for stream in streams], weights)


def test_domains_are_read_by_weight_each_in_epochs_of_its_own(monkeypatch):
    rows, config = mixed([40, 7, 100], [5.0, 3.0, 2.0]), tiny_config("unused")
    batches = take(train_batches(config, rows), 100)
    numbers = np.concatenate(rows_of(batches))
    which = np.searchsorted([40, 47], numbers, side="right")
    assert np.bincount(which) / len(which) == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    for domain, (first, length) in enumerate([(0, 40), (40, 7), (47, 100)]):
        own = numbers[which == domain]
        for epoch in own[: len(own) // length * length].reshape(-1, length):
            assert sorted(epoch) == list(range(first, first + length))
    for batch in batches[:9]:
        for place, number in enumerate(batch["row"]):
            part, before = (0, 0) if number < 40 else (1, 40) if number < 47 else (2, 47)
            expected = rows.parts[part][number - before]
            np.testing.assert_array_equal(batch["inputs"][place], expected["inputs"])
    assert rows_of(take(train_batches(config, rows, next_batch=37), 9)) == rows_of(batches[37:46])
    parts = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(rows_of(take(train_batches(config, rows), 3)))
    assert [one + other for one, other in zip(*parts, strict=True)] == rows_of(batches[:3])


def test_rows_are_listed_in_the_order_of_training():
    rows, config = mixed([9, 30], [9.0, 1.0]), tiny_config("unused")
    numbers = np.concatenate(rows_of(take(train_batches(config, rows), 60))).tolist()
    assert row_order(config, rows, 480) == list(dict.fromkeys(numbers))
    assert row_order(config, rows, 12) == list(dict.fromkeys(numbers[:12]))
    assert sorted(row_order(config, rows.parts[0], 99)) == list(range(9))


@pytest.mark.parametrize("source", ["files", "shards"])
def test_weights_mix_the_domains_of_files_and_of_shards(source, tmp_path):
    write_corpus(tmp_path / "web")
    write_corpus(tmp_path / "notes", seed=1)
    pattern = f"web={tmp_path}/web/*.txt;notes={tmp_path}/notes/*.txt"
    config = tiny_config(pattern)
    config.data.weights = (("notes", 1.0), ("web", 3.0))
    if source == "shards":
        settings = Settings(pattern, validation_fraction=config.data.validation_fraction)
        prepare(settings, str(tmp_path / "shards"))
        config.data.source, config.data.pattern = "shards", str(tmp_path / "shards")
    found = load_corpus(config)
    assert [weight for _, weight in found.train.mix] == [3.0, 1.0]
    config.data.weights = (("web", 3.0),)
    with pytest.raises(ConfigError, match="has no weight for notes"):
        load_corpus(config)


def test_weights_are_pairs_of_all_domains_and_positive_numbers():
    domains = ["speeches", "drama"]
    assert checked_weights((("drama", 1), ("speeches", 0.5)), domains) == {
        "drama": 1.0,
        "speeches": 0.5,
    }
    one = ("speeches", 1.0)
    for weights, problem in {
        (one, ("drama", 0)): "gives 'drama' the weight 0, which is not positive",
        (one, ("drama", float("nan"))): "the weight nan, which is not positive",
        (one, ("drama", "1")): "give pairs such as",
        (one, "drama"): "give pairs such as",
        (one, one, ("drama", 1)): "names 'speeches' twice",
        (one, ("code", 1)): "names 'code', which is none of the domains of the data: speeches, dra",
        (one,): "has no weight for drama",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            checked_weights(weights, domains)
