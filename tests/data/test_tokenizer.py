import importlib.resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerjax.data.tokenizer import Tokenizer
from peerjax.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = np.concatenate([*tokenizer.encode([[text]])])
    assert ids[0] == tokenizer.end_of_text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


def test_has_4096_entries(tokenizer):
    assert tokenizer.vocab_size == 4096


def test_training_it_again_gives_the_same_bytes(tmp_path):
    train_tokenizer(str(tmp_path / "again.json"))
    committed = importlib.resources.files("peerjax.data") / "bpe_4096.json"
    assert (tmp_path / "again.json").read_bytes() == committed.read_bytes()
