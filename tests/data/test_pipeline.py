import jax
import numpy as np
import pytest

from peerjax.data import pipeline
from peerjax.data.documents import (
    TRAIN,
    Document,
    corpus_digest,
    read_files,
    split_of,
    without_duplicates,
)
from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import load_corpus, train_batches, validation_rows
from peerjax.data.shards import Shard, ShardedTokens, write_shard
from tests.training.tiny import tiny_config, write_corpus


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return PackedRows(rng.integers(0, 99, 2100).astype(np.int32), 32, end_of_text=0)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows_of(batches):
    return [batch["row"].tolist() for batch in batches]


def test_a_continued_iterator_goes_on_where_it_was(rows):
    config = tiny_config("unused")
    whole = take(train_batches(config, rows), 30)  # more than three epochs
    rest = take(train_batches(config, rows, next_batch=11), 19)
    assert rows_of(whole[11:]) == rows_of(rest)
    for one, other in zip(whole[11:], rest, strict=True):
        np.testing.assert_array_equal(one["inputs"], other["inputs"])


def test_every_epoch_sees_every_row_once_in_a_new_order(rows):
    batches = np.concatenate(rows_of(take(train_batches(tiny_config("unused"), rows), 40)))
    epochs = batches[: len(batches) // len(rows) * len(rows)].reshape(-1, len(rows))
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(rows)))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_order_of_rows_is_that_of_earlier_versions(rows):
    (batch,) = take(train_batches(tiny_config("unused"), rows), 1)
    assert batch["row"].tolist() == [21, 37, 31, 14, 9, 46, 28, 6]


def test_processes_share_the_rows_of_every_step(rows, monkeypatch):
    config = tiny_config("unused")
    alone = rows_of(take(train_batches(config, rows), 12))
    parts = []
    for index in range(4):
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(rows_of(take(train_batches(config, rows), 12)))
    for step, batch in enumerate(alone):
        assert list(batch) == [row for part in parts for row in part[step]]


@pytest.fixture(params=["memory", "shards"])
def stored_rows(request, rows, tmp_path):
    """Rows in memory, and the same in two files."""
    if request.param == "memory":
        return rows
    shards, tokens = [], rows.tokens
    for part in (tokens[:700], tokens[700:]):
        name = f"{len(shards)}.array_record"
        write_shard(tmp_path / name, [part], token_bytes=2)
        shards.append(Shard(name, "train", "d", 1, 0, len(part), 0))
    stored = ShardedTokens(tmp_path, shards, token_bytes=2)
    stored[0:9]  # an open file does not keep them from being sent to a worker
    return PackedRows(stored, rows.length, rows.end_of_text)


@pytest.mark.slow
def test_worker_processes_change_nothing(rows, stored_rows):
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])  # grain's workers read flags
    config = tiny_config("unused")
    expected = take(train_batches(config, rows, next_batch=3), 10)
    config.data.workers = 2
    iterator = train_batches(config, stored_rows, next_batch=3)
    for one, other in zip(take(iterator, 10), expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])
    iterator.close()


def test_validation_rows_are_spread_evenly(rows):
    assert validation_rows(rows, 1000) == list(range(len(rows)))
    chosen = validation_rows(rows, 5)
    assert len(set(chosen)) == 5
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def tokens_of(corpus):
    rows = {"train": corpus.train, **corpus.validation}
    return {name: each.tokens[0 : len(each.tokens)].tolist() for name, each in rows.items()}


def test_rows_of_files_do_not_depend_on_their_names(tmp_path):
    write_corpus(tmp_path / "web")
    (tmp_path / "log.jsonl").write_text('{"text": "a log of one router"}\n' * 2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.writelines(f'{{"text": "token {number} of the pool"}}\n' for number in range(99))
    config = tiny_config(f"web={tmp_path}/web/**/*.txt;log={tmp_path}/*.jsonl")
    before = load_corpus(config)
    for number, path in enumerate(sorted((tmp_path / "web").iterdir(), reverse=True)):
        if number % 3 == 0:
            (tmp_path / "web" / f"a copy of {path.name}").write_text(path.read_text())
        path.rename(path.with_name(f"{number:02d} renamed.txt"))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "another.jsonl").write_text("\n".join(reversed(lines)))
    (tmp_path / "log.jsonl").unlink()
    after = load_corpus(config)
    assert after.identity == before.identity
    assert list(after.validation) == ["web", "log"]
    assert tokens_of(after) == tokens_of(before)

    # Domains stand in the order of the pattern: in another one, they are another corpus.
    config.data.pattern = f"log={tmp_path}/*.jsonl;web={tmp_path}/web/**/*.txt"
    other = load_corpus(config)
    assert tokens_of(other) != tokens_of(before)
    assert other.digest != before.digest


def test_a_run_of_files_in_the_order_of_their_names_is_another(corpus):
    config = tiny_config(corpus)
    documents = without_duplicates(read_files(corpus, "text"))
    assert load_corpus(config).digest != corpus_digest(documents)


def test_packages_keep_the_order_of_their_documents(monkeypatch):
    texts = [f"document {number} of a package " * 9 for number in range(60)]
    documents = [Document("d", str(number), text) for number, text in enumerate(texts)]
    monkeypatch.setattr(pipeline, "read_packages", lambda domains: documents)
    config = tiny_config("unused")
    config.data.source = "packages"
    found = load_corpus(config)
    assert found.digest == corpus_digest(documents)
    train = [each.text for each in documents if split_of(each, 0.2) == TRAIN]
    order = np.random.default_rng(config.seed).permutation(len(train))
    expected = found.tokenizer.encode([train[index]] for index in order)
    np.testing.assert_array_equal(found.train.tokens, np.concatenate([*expected]))
