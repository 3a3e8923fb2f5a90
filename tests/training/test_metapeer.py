"""Metarouters train, packed and float, resume bit-equally and sample."""

import pytest

from peerjax.config import validate
from peerjax.errors import ConfigError
from tests.training.test_combinations import assert_trains_resumes_and_samples
from tests.training.test_combinations import config_of as of_combination
from tests.training.tiny import tiny_config, write_corpus


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "fields"),
    [
        ("int4", {"open": 2, "chunk": 8}),
        ("float32", {"choice": "sequence", "chunk": 8}),
        ("int8", {"choice": "sequence", "chunk": 8, "switch": False, "chosen": 1}),
    ],
)
def test_trains_resumes_bit_equally_and_samples(storage, fields, corpus, tmp_path):
    config = of_combination(("softmax", "metapeer", "tied", "logit", storage), corpus)
    config.peer.query_norm = "layernorm"
    config.metapeer.metaexperts = 4
    for name, value in fields.items():
        config.metapeer[name] = value
    other = write_corpus(tmp_path / "other", seed=1)
    config.data.pattern = f"one={corpus};two={other}"
    config.data.weights = (("one", 1.0), ("two", 2.0))
    assert_trains_resumes_and_samples(config, tmp_path)


def test_a_chunk_longer_than_the_sequences_is_refused():
    config = tiny_config("unused")
    config.model.layers = (("metapeer", 1),)
    config.metapeer.chunk = 32
    validate(config)  # tokens choose
    config.metapeer.choice = "sequence"
    with pytest.raises(
        ConfigError, match=r"metapeer.chunk=32 is not less than data.sequence_length"
    ):
        validate(config)
