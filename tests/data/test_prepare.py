import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from peerjax.data import shards
from peerjax.data.documents import corpus_digest, read_files, without_duplicates
from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import load_corpus
from peerjax.data.plan import read_planned, scan
from peerjax.data.prepare import prepare
from peerjax.data.shards import ShardIndex
from peerjax.data.text_files import find_files
from peerjax.errors import ConfigError, DataError, UserError
from tests.conftest import REPOSITORY
from tests.data.own_text import FRACTION, own_settings, write_own_text
from tests.elsewhere import python
from tests.training.tiny import tiny_config

RECORD_TOKENS = 256


@pytest.fixture(autouse=True)
def short_records(monkeypatch):
    monkeypatch.setattr(shards, "RECORD_TOKENS", RECORD_TOKENS)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return write_own_text(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def prepared(pattern, tmp_path_factory):
    """The shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORD_TOKENS", RECORD_TOKENS)
        prepare(own_settings(pattern), str(folder))
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def config_for(pattern, source):
    config = tiny_config(pattern)
    config.data.source = source
    config.data.validation_fraction = FRACTION
    config.data.sequence_length = 48
    return config


def documents_of(rows):
    """The documents of rows as tuples of tokens, in order."""
    tokens = rows.tokens[0 : len(rows.tokens)]
    starts = np.flatnonzero(tokens == rows.end_of_text)
    assert starts[0] == 0
    return [tuple(part.tolist()) for part in np.split(tokens, starts[1:])]


def test_shards_and_files_hold_the_same_documents(pattern, prepared):
    from_files = load_corpus(config_for(pattern, "files"))
    from_shards = load_corpus(config_for(str(prepared), "shards"))
    assert list(from_shards.validation) == list(from_files.validation) == ["web", "log"]
    for name in ("train", "web", "log"):
        own, other = (
            corpus.train if name == "train" else corpus.validation[name]
            for corpus in (from_shards, from_files)
        )
        assert sorted(documents_of(own)) == sorted(documents_of(other))
    index = ShardIndex.load(prepared)
    documents = without_duplicates(read_files(pattern, "text"))
    assert index.corpus == corpus_digest(documents)
    assert sum(shard.documents for shard in index.shards) == len(documents)
    text_bytes = sum(len(document.text.encode()) for document in documents)
    assert sum(shard.text_bytes for shard in index.shards) == text_bytes


def test_rows_of_shards_are_those_of_the_tokens_in_memory(prepared):
    rows = load_corpus(config_for(str(prepared), "shards")).train
    in_train = [shard for shard in ShardIndex.load(prepared).shards if shard.split == "train"]
    assert len(in_train) > 3
    assert max(shard.tokens for shard in in_train) > 2 * RECORD_TOKENS
    documents = [np.array(document, np.int32) for document in documents_of(rows)]
    for length in (5, 48, 3 * RECORD_TOKENS + 7):  # the longest spans records and shards
        memory = PackedRows(np.concatenate(documents), length, rows.end_of_text)
        own = PackedRows(rows.tokens, length, rows.end_of_text)
        assert len(own) == len(memory) > 2
        for index in range(0, len(memory), 1 + len(memory) // 200):
            for name, expected in memory[index].items():
                np.testing.assert_array_equal(own[index][name], expected)
                assert own[index][name].dtype == expected.dtype


def test_worker_processes_make_the_same_bytes(pattern, tmp_path):
    # They have records of their own length.
    shards.RECORD_TOKENS = 4096
    for workers in (0, 2):
        prepare(own_settings(pattern), str(tmp_path / str(workers)), workers)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def killed(pattern, output, event):
    return python("-m", "tests.data.own_text", pattern, str(output), str(event))


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(pattern, prepared, tmp_path):
    whole = killed(pattern, tmp_path / "whole", 0)
    events = int(re.search(r"events (\d+)", whole.stdout)[1])
    assert events > 40
    assert files_of(tmp_path / "whole") == files_of(prepared)
    for number, first in enumerate([1, 2, 3, 4, *np.random.default_rng(0).integers(5, events, 3)]):
        output = tmp_path / str(number)
        assert killed(pattern, output, first).returncode == -signal.SIGKILL
        with pytest.raises(DataError, match="holds no finished shards"):
            ShardIndex.load(output)
        if number % 2:  # and once more, on its way
            assert killed(pattern, output, 7).returncode == -signal.SIGKILL
        prepare(own_settings(pattern), str(output))
        assert files_of(output) == files_of(prepared)


@pytest.mark.slow
def test_workers_die_with_the_command(pattern, tmp_path):
    output = tmp_path / "shards"
    flags = [f"--pattern={pattern}", f"--output={output}", "--shard_mb=0.002", "--workers=2"]
    command = [sys.executable, "prepare.py", *flags, f"--validation_fraction={FRACTION}"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while not list(output.glob("*.array_record")):
        time.sleep(0.01)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [child for task in tasks for child in task.read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    going_on = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "bytes of text in" in going_on.stdout
    shards.RECORD_TOKENS = 4096
    prepare(own_settings(pattern, shard_mb=0.002), str(tmp_path / "undisturbed"))
    assert files_of(output) == files_of(tmp_path / "undisturbed")
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "already complete" in again.stdout


def test_a_finished_one_says_so_and_touches_nothing(pattern, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.glob("*.array_record")}
    content = files_of(prepared)
    prepare(own_settings(pattern), str(prepared))
    assert "already complete" in capsys.readouterr().out
    assert files_of(prepared) == content
    assert before == {path: path.stat().st_mtime_ns for path in prepared.glob("*.array_record")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_mb": 0.02}, r"other settings: shard_mb \(was 0.001, is 0.02\)"),
        ({"validation_fraction": 0.5}, r"validation_fraction \(was 0.25, is 0.5\)"),
        ({"shard_mb": 0.0}, "shard_mb=0.0 is not between one byte"),
        ({"shard_mb": 5e-7}, "shard_mb=5e-07 is not between one byte"),
        ({"shard_mb": float("nan")}, "shard_mb=nan is not between one byte"),
        ({"shard_mb": float("inf")}, "shard_mb=inf is not between one byte .* and 1e"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 is not in \(0, 1\)"),
    ],
)
def test_other_settings_are_refused(changes, message, pattern, prepared):
    before = files_of(prepared)
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(own_settings(pattern, **changes), str(prepared))
    assert files_of(prepared) == before


def test_the_smallest_shards_hold_a_document_each(pattern, tmp_path):
    prepare(own_settings(pattern, shard_mb=6e-7), str(tmp_path))
    assert {shard.documents for shard in ShardIndex.load(tmp_path).shards} == {1}


def test_other_text_is_refused(tmp_path):
    pattern = write_own_text(tmp_path / "own")
    prepare(own_settings(pattern), str(tmp_path / "shards"))
    before = files_of(tmp_path / "shards")
    with (tmp_path / "own" / "x.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="has changed since the shards in .*shards were begun"):
        prepare(own_settings(pattern), str(tmp_path / "shards"))
    assert files_of(tmp_path / "shards") == before


def test_a_folder_that_is_not_ours_is_refused(pattern, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="is not empty and holds no shards"):
        prepare(own_settings(pattern), str(tmp_path))
    with pytest.raises(UserError, match="thesis.tex cannot be used as an output folder"):
        prepare(own_settings(pattern), str(tmp_path / "thesis.tex"))
    (tmp_path / "thesis.tex").unlink()
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is using"):
        prepare(own_settings(pattern), str(tmp_path))
    os.close(handle)


def test_shards_beside_the_text_are_not_text(tmp_path):
    write_own_text(tmp_path)
    settings = own_settings(f"{tmp_path}/**/*")
    for _ in range(2):
        prepare(settings, str(tmp_path / "shards"))


def test_bad_files_are_named_or_skipped(pattern, prepared, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "void.jsonl").write_text('{"text": ""}\n')
    pattern = f"{pattern};web={tmp_path}/*.*;log=/proc/self/mem"
    with pytest.raises(DataError, match=r"bad.jsonl, line 2, is not JSON .*\(and 4 more such"):
        prepare(own_settings(pattern), str(tmp_path / "shards"))
    prepare(own_settings(pattern, skip_bad_files=True), str(tmp_path / "shards"))
    output = capsys.readouterr().out
    skipped = ("latin.txt is not UTF-8", "empty.txt is empty", "void.jsonl is empty", "self/mem")
    for name in (*skipped, "bad.jsonl, line 2"):
        assert re.search(f"skipped: .*{name}", output)
    assert ShardIndex.load(tmp_path / "shards") == ShardIndex.load(prepared)
    settings = own_settings(f"{tmp_path}/*.txt", skip_bad_files=True)
    with pytest.raises(DataError, match="none of the files has text"):
        prepare(settings, str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
def test_text_that_changes_meanwhile_is_named(name, tmp_path):
    path = tmp_path / name
    path.write_text('{"text": "before"}\n')
    files = find_files(f"{tmp_path}/*")
    documents, _ = scan(list(enumerate(files)), "text", lambda size: None)
    path.write_text('{"text": "after!"}\n')
    texts = read_planned(files, documents, "text", lambda size: None)
    with pytest.raises(DataError, match=f"{name} has changed since it was scanned"):
        list(map(list, texts))


def test_a_domain_without_validation_text_is_named(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(DataError, match="none of the 1 documents of domain 'files' is in the"):
        prepare(own_settings(f"{tmp_path}/*.txt"), str(tmp_path / "shards"))


@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped"])
def test_a_damaged_shard_is_named_and_made_again(damage, pattern, prepared, tmp_path):
    for name, content in files_of(prepared).items():
        (tmp_path / name).write_bytes(content)
    victim = max(tmp_path.glob("train-*.array_record"))
    content = bytearray(victim.read_bytes())
    victim.unlink()
    if damage == "cut short":
        victim.write_bytes(content[:-1])
    elif damage == "flipped":
        content[200] ^= 1
        victim.write_bytes(content)
    message = "is damaged" if damage == "flipped" else "is missing or cut short"
    with pytest.raises(DataError, match=message):
        documents_of(load_corpus(config_for(str(tmp_path), "shards")).train)
    if damage == "flipped":
        victim.unlink()
    prepare(own_settings(pattern), str(tmp_path))
    assert files_of(tmp_path) == files_of(prepared)


def test_training_refuses_what_does_not_fit_the_shards(prepared, tmp_path):
    config = config_for(str(tmp_path), "shards")
    with pytest.raises(DataError, match="holds no finished shards; run python prepare.py"):
        load_corpus(config)
    config.data.pattern = str(prepared)
    config.data.validation_fraction = 0.1
    with pytest.raises(DataError, match="validation_fraction=0.1, but .* were split by 0.25"):
        load_corpus(config)
    for name, content in files_of(prepared).items():
        (tmp_path / name).write_bytes(content)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(DataError, match="is not the tokenizer that the shards were made with"):
        load_corpus(config_for(str(tmp_path), "shards"))


def test_identity_knows_the_order_of_documents(prepared):
    index = ShardIndex.load(prepared)
    assert dataclasses.replace(index, order="another").digest != index.digest
    assert dataclasses.replace(index, corpus="another").digest != index.digest
    assert load_corpus(config_for(str(prepared), "shards")).identity["corpus"] == index.digest
