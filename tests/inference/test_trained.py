"""A finished run, evaluated and sampled from."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from peerjax.data.tokenizer import Tokenizer, train_bpe
from peerjax.errors import CheckpointError, ConfigError, DataError
from peerjax.evaluation import figures_of, probes_for
from peerjax.inference.evaluating import Found, evaluate_run, print_evaluation, write_evaluation
from peerjax.inference.prompts import check, continue_prompts, encode, read_prompts
from peerjax.inference.sampling import Sampling, generate
from peerjax.inference.trained import open_run, restore
from peerjax.sharding import make_mesh
from peerjax.training.metrics import read_metrics
from tests.training.tiny import SAVE_EVERY

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def run(finished):
    return open_run(str(finished))


@pytest.fixture(scope="module")
def variables(run):
    return restore(run, make_mesh(jax.devices()[:1]))


def test_the_newest_checkpoint_evaluates_as_the_run_did_at_its_end(run, tmp_path, capsys):
    evaluation = evaluate_run(run, rows=run.config.eval.rows)
    last = read_metrics(run.folder)[-1]
    assert run.step == last["step"] == 2 * SAVE_EVERY
    for name, value in figures_of(probes_for(run.tokenizer), evaluation).items():
        assert value == pytest.approx(last[name], rel=1e-6), name

    write_evaluation(epath.Path(tmp_path), Found(evaluation), {"step": run.step})
    print_evaluation(epath.Path(tmp_path))
    assert f"{evaluation['all']['loss']['bits_per_byte']:.4f}" in capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    loss = record["texts"]["files"]["loss"]
    nats, per_byte = loss["nats_per_token"] * loss["tokens"], loss["bits_per_byte"] * np.log(2)
    assert nats == pytest.approx(per_byte * loss["bytes"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"losses.png", "expert_usage.png"}


def test_any_text_is_read_whole(run, corpus, tmp_path):
    text = "a router routes tokens to one expert in many " * 20
    (tmp_path / "other.txt").write_text(text)
    loss = evaluate_run(run, str(tmp_path / "*.txt"))["all"]["loss"]
    assert loss["bytes"] == pytest.approx(len(text), abs=32 * 4)  # but for the last row's rest
    assert evaluate_run(run, corpus, rows=2).keys() == {"all", "files"}
    with pytest.raises(DataError, match="no file matches"):
        evaluate_run(run, str(tmp_path / "*.md"))


def test_prompts_are_continued_and_shown_as_they_grow(run, variables):
    shown = []
    prompts = ["the expert", "", "a token of the pool"]
    found = continue_prompts(run, variables, prompts, 10, GREEDY, show=shown.append)
    assert "".join(shown) == found.texts[0]
    tokens = np.array(list(generate(run.model, variables, encode(run, prompts), 10, GREEDY))).T
    for row, text in zip(tokens.tolist(), found.texts, strict=True):
        if run.tokenizer.end_of_text in row:
            row = row[: row.index(run.tokenizer.end_of_text)]
        assert run.tokenizer.decode(row) == text
    assert found.tokens_per_second > 0


def test_a_long_prompt_goes_on_to_the_end_of_the_model_and_no_further(run, variables):
    def with_length(length):
        config = run.config.copy_and_resolve_references()
        config.model.max_length = length
        return dataclasses.replace(run, config=config)

    words = len(encode(run, ["the expert"])[0])
    found = continue_prompts(with_length(words + 4), variables, ["the expert"], 10, GREEDY)
    assert found.tokens == 4
    # Beside a shorter one, which has more room, neither is cut short by the other.
    found = continue_prompts(with_length(words + 4), variables, ["the expert", ""], 10, GREEDY)
    alone = [
        continue_prompts(with_length(words + 4), variables, [prompt], 10, GREEDY).texts[0]
        for prompt in ("the expert", "")
    ]
    assert found.texts == alone
    with pytest.raises(DataError, match=f"prompt 1 has {words} tokens, and model.max_length"):
        encode(with_length(words), ["the expert"])


def test_what_a_prompt_draws_does_not_depend_on_its_batch(run, variables):
    prompts = ["the expert"] * 5
    sampling = Sampling(temperature=1.0)
    together = continue_prompts(run, variables, prompts, 8, sampling).texts
    apart = [
        text
        for first in (0, 2, 4)
        for text in continue_prompts(
            run, variables, prompts[first : first + 2], 8, sampling, first
        ).texts
    ]
    assert together == apart
    assert len(set(together)) == len(together)


def test_what_is_no_prompt_is_named(run, tmp_path):
    with pytest.raises(DataError, match=r"not UTF-8 text \(character 1 cannot be read\)"):
        encode(run, ["a\udcff"])
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(str(tmp_path / "none.txt"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(
        DataError, match=r"lines.jsonl, line 2, is not JSON with a field \"prompt\""
    ):
        read_prompts(str(lines))
    lines.write_text('{"prompt": "one"}\n{"prompt": ""}\n')
    assert read_prompts(str(lines)) == ["one", ""]
    lines.write_text('{"prompt": "one\u2028two"}\r\n{"prompt": "three"}')
    assert read_prompts(str(lines)) == ["one\u2028two", "three"]
    (tmp_path / "lines.txt").write_text("one\ftwo\n\nthree\n")
    assert read_prompts(str(tmp_path / "lines.txt")) == ["one\ftwo", "", "three"]
    for sampling, count, told in (
        (Sampling(-1.0), 1, "temperature"),
        (Sampling(top_p=0.0), 1, "top_p"),
        (Sampling(), 0, "tokens"),
    ):
        with pytest.raises(ConfigError, match=told):
            check(sampling, count)


@pytest.mark.parametrize(
    "elsewhere",
    [{"tokenizer": "tok.json"}, {"source": "shards", "pattern": "shards"}],
    ids=["relative", "of shards"],
)
def test_a_run_brings_its_tokenizer(elsewhere, finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= elsewhere  # as seen from the folder that training was started in
    (copy / "config.json").write_text(json.dumps(config))
    run = open_run(str(copy))
    assert run.tokenizer.digest == Tokenizer.load().digest

    (copy / "tokenizer.json").write_text(train_bpe(["some other text"], 300))
    with pytest.raises(DataError, match=r"another tokenizer .* back as .*run/tokenizer.json"):
        open_run(str(copy))
    (copy / "tokenizer.json").unlink()  # as in runs of earlier versions
    with pytest.raises(DataError, match="does not exist"):
        open_run(str(copy))
    shutil.copy(finished / "config.json", copy)
    assert open_run(str(copy)).tokenizer.digest == run.tokenizer.digest


def test_kernels_are_those_of_the_present_device(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    config["kernels"]["implementation"] = "mosaic_gpu"
    (copy / "config.json").write_text(json.dumps(config))
    run = open_run(str(copy))
    assert run.model.config.implementation is None
    assert run.config.kernels.implementation == "auto"


def test_checkpoints_are_found_and_left_as_they_are(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert open_run(str(copy), SAVE_EVERY).step == SAVE_EVERY
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; it has 3, 6"):
        open_run(str(copy), 4)
    seal = copy / "checkpoints" / str(2 * SAVE_EVERY) / "checksums.json"
    seal.unlink()  # as while it is being written
    assert open_run(str(copy)).step == SAVE_EVERY
    with pytest.raises(CheckpointError, match="is intact"):
        open_run(str(copy), 2 * SAVE_EVERY)
    assert seal.parent.exists()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_run(str(copy))
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(str(tmp_path / "none"))
    (copy / "config.json").write_text('{"seed": 0, "wings": 2}')
    with pytest.raises(ConfigError, match=r"config.json cannot be read: .*wings"):
        open_run(str(copy))
