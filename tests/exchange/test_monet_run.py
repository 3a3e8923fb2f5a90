"""Published Monets as runs: made, sampled from, evaluated, and written back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from peerjax.errors import ConfigError, DataError, UserError
from peerjax.exchange.monet import read_hf, write_hf
from peerjax.exchange.monet_run import read_run, write_run
from peerjax.inference.evaluating import evaluate_run
from peerjax.inference.prompts import continue_prompts, encode
from peerjax.inference.sampling import Sampling
from peerjax.inference.trained import open_run, restore
from peerjax.optim import dequantize
from peerjax.sharding import make_mesh
from peerjax.training.loop import train
from tests.data.llama import llama_tokenizer
from tests.elsewhere import python
from tests.exchange.test_monet import SIZES, logits_of, make
from tests.training.tiny import SAVE_EVERY, WORDS, tiny_config

VOCABULARY, LAYERS = 300, 4


@pytest.fixture(scope="module")
def tokenizer():
    return llama_tokenizer([WORDS] * 5, VOCABULARY)


def publish(folder, decomposition, tokenizer, monkeypatch):
    """Makes a checkpoint as it would be downloaded."""
    vocabulary = len(json.loads(tokenizer)["model"]["vocab"])
    monkeypatch.setitem(SIZES, "num_hidden_layers", LAYERS)
    monkeypatch.setitem(SIZES, "vocab_size", vocabulary)
    config, tree = make(decomposition)
    more = {"auto_map": {"AutoModelForCausalLM": "modeling_monet.MonetForCausalLM"}}
    write_hf(folder, {**config, **more, "max_position_embeddings": 64}, tree)
    (folder / "tokenizer.json").write_text(tokenizer)


def logits(run, tokens):
    variables = dequantize(restore(run, make_mesh(jax.devices()[:1])))
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    return np.asarray(run.model.apply(variables, jnp.asarray(tokens), positions))


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("decomposition", ["horizontal", "vertical"])
def test_a_published_checkpoint_runs_and_comes_back(
    decomposition, tokenizer, tmp_path, monkeypatch
):
    publish(tmp_path / "published", decomposition, tokenizer, monkeypatch)
    config, tree = read_hf(tmp_path / "published")
    read_run(str(tmp_path / "published"), str(tmp_path / "run"))
    (tmp_path / "published").rename(tmp_path / "away")
    (tmp_path / "run").rename(tmp_path / "moved")

    run = open_run(str(tmp_path / "moved"))
    tokens = np.random.default_rng(0).integers(config["vocab_size"], size=(2, 9))
    found = logits(run, tokens)
    expected = logits_of(config, jax.tree.map(jnp.asarray, tree), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    variables = restore(run, make_mesh(jax.devices()[:1]))
    answers = continue_prompts(run, variables, ["the expert", ""], 5, Sampling(temperature=0))
    assert all(map(str.strip, answers.texts))
    (tmp_path / "text.txt").write_text(f"{WORDS} " * 20)
    found = evaluate_run(run, str(tmp_path / "text.txt"))
    assert found["all"]["experts"].keys() == {"layer_0", "layer_2"}  # a router for two layers
    with pytest.raises(DataError, match="was not trained here, .* evaluate it with --pattern"):
        evaluate_run(run)

    write_run(run, str(tmp_path / "back"))
    back, away = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "away")
    assert back.keys() == away.keys()
    for name, tensor in away.items():
        np.testing.assert_array_equal(back[name], tensor)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "away" / name).read_text()


def with_padding(tokenizer, special=True):
    """The tokenizer with a token that the model does not know."""
    parts = json.loads(tokenizer)
    added = parts["added_tokens"]
    added.append({**added[0], "id": VOCABULARY, "content": "<pad>", "special": special})
    return json.dumps(parts)


def test_a_tokenizer_may_have_special_tokens_that_the_model_has_not(
    tokenizer, tmp_path, monkeypatch
):
    publish(tmp_path / "published", "horizontal", with_padding(tokenizer), monkeypatch)
    read_run(str(tmp_path / "published"), str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    assert (run.model.config.vocab_size, run.tokenizer.vocab_size) == (VOCABULARY, VOCABULARY + 1)
    assert max(encode(run, ["<pad>"])[0]) < VOCABULARY
    write_run(run, str(tmp_path / "back"))
    for name in ("config.json", "tokenizer.json"):
        back, published = (tmp_path / folder / name for folder in ("back", "published"))
        assert back.read_text() == published.read_text()
    (tmp_path / "tok.json").write_text(with_padding(tokenizer, special=False))
    with pytest.raises(ConfigError, match="the tokenizer has 301 entries, the model 300; name"):
        read_run(str(tmp_path / "published"), str(tmp_path / "other"), str(tmp_path / "tok.json"))


@pytest.mark.slow
def test_a_run_of_ones_own_is_written_and_read_again(corpus, tmp_path):
    config = tiny_config(corpus)
    config.steps = SAVE_EVERY
    config.model.layers = (("monet_vd", 4),)
    config.monet.num_experts, config.monet.top_k, config.monet.storage = 64, 2, "int4"
    train(config, str(tmp_path / "own"))
    own = open_run(str(tmp_path / "own"))
    write_run(own, str(tmp_path / "written"))
    read_run(str(tmp_path / "written"), str(tmp_path / "again"))
    again = open_run(str(tmp_path / "again"))
    tokens = np.random.default_rng(0).integers(own.tokenizer.vocab_size, size=(2, 9))
    found, expected = (logits(run, tokens) for run in (again, own))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    own.config.model.attention_sink = "logit"
    with pytest.raises(ConfigError, match="attention_sink='logit', but a published Monet has no"):
        write_run(own, str(tmp_path / "other"))


@pytest.mark.slow
def test_what_cannot_be_converted_is_said_and_leaves_nothing(
    tokenizer, finished, tmp_path, monkeypatch
):
    publish(tmp_path / "published", "horizontal", tokenizer, monkeypatch)
    source, run = str(tmp_path / "published"), str(tmp_path / "run")
    with pytest.raises(ConfigError, match="already exists"):
        read_run(source, str(finished))
    with pytest.raises(UserError, match="config.json cannot be used as an output folder"):
        read_run(source, str(tmp_path / "published" / "config.json" / "run"))
    (tmp_path / "other.json").write_text(llama_tokenizer([WORDS], 280))
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ entries, the model \d+; name"):
        read_run(source, run, str(tmp_path / "other.json"))
    settings = json.loads((tmp_path / "published" / "config.json").read_text())
    (tmp_path / "published" / "config.json").write_text(json.dumps(settings | {"moe_dim": 6}))
    with pytest.raises(UserError, match=r"layers.0.moe.u.weight is \[24, 16\], not \[36, 16\]"):
        read_run(source, run)
    shutil.rmtree(tmp_path / "published")
    with pytest.raises(DataError, match="tokenizer.json' does not exist"):
        read_run(source, run)
    with pytest.raises(ConfigError, match="but a published Monet has layers of one decomposition"):
        write_run(open_run(str(finished)), str(tmp_path / "out"))
    assert {each.name for each in tmp_path.iterdir()} == {"other.json"}


def test_where_a_model_goes_is_tried_before_it_is_read(tokenizer, tmp_path, monkeypatch):
    publish(tmp_path / "published", "horizontal", tokenizer, monkeypatch)
    read_run(str(tmp_path / "published"), str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    shutil.rmtree(run.checkpoint)
    with pytest.raises(UserError, match="config.json cannot be used as an output folder"):
        write_run(run, str(tmp_path / "published" / "config.json"))


def test_one_command_reads_and_another_writes(tokenizer, tmp_path, monkeypatch):
    publish(tmp_path / "published", "vertical", tokenizer, monkeypatch)

    def convert(*flags):
        return python("-m", "peerjax.exchange.monet_run", *flags)

    workdir = f"--workdir={tmp_path / 'run'}"
    assert "sample.py --workdir=" in convert(workdir, f"--read={tmp_path / 'published'}").stdout
    half = convert(workdir, f"--write={tmp_path / 'half'}", "--dtype=bfloat16")
    assert half.returncode == 0, half.stderr
    for name, tensor in tensors_of(tmp_path / "published").items():
        rounded = tensors_of(tmp_path / "half")[name].astype(np.float32)
        np.testing.assert_allclose(rounded, tensor, rtol=2**-8)
    assert "give --read, a folder" in convert(workdir).stderr
