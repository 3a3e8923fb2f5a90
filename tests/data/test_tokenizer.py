import functools
import importlib.resources
import itertools
import json
import re
import unittest.mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from peerjax.data import tokenizer as tokenizer_module
from peerjax.data.documents import TRAIN, read_files, split_of, without_duplicates
from peerjax.data.packages import TEXT_PACKAGES, is_installed, read_packages
from peerjax.data.tokenizer import END_OF_TEXT, LONGEST_PIECE, Tokenizer, pieces, train_bpe
from peerjax.data.train_tokenizer import train_tokenizer
from peerjax.errors import ConfigError, DataError, UserError
from tests.data.llama import llama_tokenizer, newer_form

BUILTIN = importlib.resources.files("peerjax.data") / "bpe_4096.json"
texts = st.lists(st.text() | st.just(END_OF_TEXT)).map("".join)
# What cuts go by: spaces of all kinds, ends of lines, and what the pre-tokenizer tells apart.
cuttable = st.text(alphabet="  \n\t\r\x1c\x85\xa0\u2028ab'sé漢.0", max_size=60)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


from_library = functools.cache(tokenizers.Tokenizer.from_str)


def encode(tokenizer, *documents):
    return np.concatenate([*tokenizer.encode(documents)])


@settings(deadline=None)
@given(texts)
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = encode(tokenizer, [text])
    assert ids[0] == tokenizer.end_of_text
    assert tokenizer.end_of_text not in ids[1:]
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


@settings(deadline=None, max_examples=300)
@given(st.lists(cuttable, min_size=1, max_size=4), st.integers(1, 9))
def test_pieces_encode_as_the_whole_does(tokenizer, blocks, piece):
    text = "".join(blocks)
    with unittest.mock.patch.object(tokenizer_module, "PIECE", piece):
        found = [*pieces(blocks)]
        assert found == [*pieces([text])]
    assert "".join(found) == text
    whole = tokenizers.Tokenizer.from_str(tokenizer.json)
    assert [*itertools.chain(*(whole.encode(each).ids for each in found))] == whole.encode(text).ids


def pieces_by_definition(text):
    """Cuts as `pieces` does, looking for each cut as far as the text goes."""
    start = 0
    while True:
        end = start + tokenizer_module.LONGEST_PIECE
        cut = tokenizer_module.CUT.search(text, start + tokenizer_module.PIECE)
        if cut is not None and cut.start() <= end:
            end = cut.start()
        elif len(text) < end + 2:
            break
        yield text[start:end]
        start = end
    yield text[start:]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("a \n"), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 9))
def test_pieces_are_cut_where_the_text_allows(blocks, piece, more):
    sizes = {"PIECE": piece, "LONGEST_PIECE": piece + more}
    with unittest.mock.patch.multiple(tokenizer_module, **sizes):
        assert [*pieces(blocks)] == [*pieces_by_definition("".join(blocks))]


def test_text_without_a_place_to_cut_is_looked_through_once(monkeypatch):
    looked = 0

    class Counted:
        def search(self, text, first, stop=None):
            nonlocal looked
            looked += (len(text) if stop is None else min(stop, len(text))) - first
            return cut.search(text, first, len(text) if stop is None else stop)

    cut = tokenizer_module.CUT
    monkeypatch.setattr(tokenizer_module, "CUT", Counted())
    text = "x" * (9 * LONGEST_PIECE)
    assert len([*pieces([text])]) == 9
    assert looked <= len(text)


def test_a_long_document_encodes_as_if_it_were_not_cut(tokenizer):
    text = "".join(document.text for document in read_packages(["speeches"])[:40])
    assert len([*pieces([text])]) > 5
    whole = tokenizers.Tokenizer.from_str(tokenizer.json).encode(text).ids
    assert encode(tokenizer, [text]).tolist() == [tokenizer.end_of_text, *whole]


@pytest.mark.parametrize("unit", ["x", " ", "漢"])
def test_no_piece_is_longer_than_the_longest(unit):
    blocks = [unit * 700_001] * 5
    found = [*pieces(blocks)]
    assert max(map(len, found)) == LONGEST_PIECE
    assert "".join(found) == "".join(blocks)


def test_has_4096_entries(tokenizer):
    assert tokenizer.vocab_size == 4096


def test_training_it_again_gives_the_same_bytes(tmp_path):
    train_tokenizer(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == BUILTIN.read_bytes()


def test_the_tokenizer_of_all_domains_has_8192_entries_and_every_byte():
    found = Tokenizer.load("bpe_8192")
    assert found.vocab_size == 8192
    text = "L'été, el niño\t\x00\U0001f600"
    assert found.decode(encode(found, [text]).tolist()) == text
    with pytest.raises(DataError, match="does not exist; give a path or one of bpe_4096, bpe_8192"):
        Tokenizer.load("bpe_1024")


@pytest.mark.slow
def test_training_the_tokenizer_of_all_domains_again_gives_the_same_bytes(tmp_path):
    for domain, package in TEXT_PACKAGES.items():
        if not is_installed(domain):
            pytest.skip(f"needs {package.distribution}, of the extra {package.extra}")
    again = tmp_path / "again.json"
    train_tokenizer(
        str(again), vocab_size=8192, domains=tuple(TEXT_PACKAGES), characters_per_domain=4_000_000
    )
    assert again.read_bytes() == BUILTIN.with_name("bpe_8192.json").read_bytes()


def test_training_on_own_text_sees_the_training_split_once(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(["alpha", "beta", "gamma"], 9)) for _ in range(40)]
    lines += lines[:5]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": x}) + "\n" for x in lines))
    (tmp_path / "y.txt").write_text("one more document")
    train_tokenizer(
        str(tmp_path / "tok.json"), f"{tmp_path}/x.jsonl;{tmp_path}/y.txt", 300, "body", 0.3
    )
    documents = without_duplicates(read_files(f"{tmp_path}/x.jsonl;{tmp_path}/y.txt", "body"))
    kept = [each.text for each in documents if split_of(each, 0.3) == TRAIN]
    assert (tmp_path / "tok.json").read_text() == train_bpe(kept, 300)
    assert Tokenizer.load(str(tmp_path / "tok.json")).vocab_size <= 300
    with pytest.raises(ConfigError, match="vocab_size=256 is less than 257"):
        train_tokenizer(str(tmp_path / "tok.json"), f"{tmp_path}/*.txt", 256)


def test_where_a_tokenizer_goes_is_tried_before_text_is_read(tmp_path):
    (tmp_path / "file").write_text("precious")
    for output, message in ((tmp_path, "is a folder; name"), (tmp_path / "file" / "t", "cannot")):
        with pytest.raises(UserError, match=message):
            train_tokenizer(str(output), "no such text")
    with pytest.raises(DataError, match="no file matches"):
        train_tokenizer(str(tmp_path / "deep" / "down" / "tok.json"), "no such text")
    train_tokenizer(str(tmp_path / "deep" / "tok.json"), str(tmp_path / "file"), 300, "text", 1e-9)
    assert Tokenizer.load(str(tmp_path / "deep" / "tok.json")).vocab_size <= 300


def changed(**changes):
    parts = json.loads(BUILTIN.read_text())
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = parts
        for name in outer:
            place = place[name]
        place[last] = value
    return json.dumps(parts)


@pytest.mark.parametrize(
    ("json_text", "message"),
    [
        (changed(added_tokens=[]), "'<|endoftext|>' is not special"),
        (train_bpe(["a b"], 300).replace(END_OF_TEXT, "<pad>"), f"has no token {END_OF_TEXT!r}"),
        (changed(normalizer={"type": "NFC"}), "changes text before it encodes it (normalizer NFC)"),
        (changed(pre_tokenizer=None), "its pre_tokenizer is not byte-level"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "its pre_tokenizer is not byte-level"),
        (changed(pre_tokenizer__add_prefix_space=True), "adds or removes characters"),
        (changed(model__dropout=0.1), "it drops merges at random"),
        (changed(model__end_of_word_suffix="</w>"), "it marks parts of words"),
        (changed(model__vocab={"a": 1, "b": 2}, model__merges=[]), "lacks 254 of the 256 bytes"),
        (changed(model={"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}), "not BPE"),
        ("{}", "is not a tokenizer JSON"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(json_text, message, tmp_path):
    path = tmp_path / "tok.json"
    path.write_text(json_text)
    with pytest.raises(DataError, match=rf"tok.json .*{re.escape(message)}"):
        Tokenizer.load(str(path))


@settings(deadline=None, max_examples=20)
@given(texts)
def test_what_else_a_tokenizer_json_asks_for_is_left_out(tokenizer, text):
    # Tokenizers as they are published cut texts short, pad them and add tokens of their own.
    published = tokenizers.Tokenizer.from_str(tokenizer.json)
    published.enable_truncation(3)
    published.enable_padding(length=9)
    published.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 0)]
    )
    own = Tokenizer(published.to_str())
    np.testing.assert_array_equal(encode(own, [text]), encode(tokenizer, [text]))


@pytest.fixture(scope="module")
def llama():
    documents = [document.text[:5000] for document in read_packages(["drama"])[:20]]
    return Tokenizer(llama_tokenizer(documents, 1000))


@pytest.fixture(scope="module")
def newer(llama):
    return Tokenizer(newer_form(llama.json))


@settings(deadline=None, max_examples=100)
@given(st.lists(cuttable | texts, min_size=1, max_size=3), st.integers(1, 9))
def test_byte_fallback_encodes_in_pieces_what_the_published_tokenizer_encodes(llama, blocks, piece):
    text = "".join(blocks).replace("▁", "")
    with unittest.mock.patch.object(tokenizer_module, "PIECE", piece):
        ids = encode(llama, [text])
    published = tokenizers.Tokenizer.from_str(llama.json)
    published.encode_special_tokens = True
    assert ids.tolist() == published.encode(text).ids
    assert llama.decode(ids.tolist()) == (" " + text if text else "")
    assert llama.bytes_per_token()[ids].sum() == len(text.encode()) + bool(text)


@settings(deadline=None, max_examples=100)
@given(st.lists(cuttable | texts, min_size=1, max_size=3), st.integers(1, 9))
def test_the_newer_form_of_llamas_encodes_as_it_is_published(newer, blocks, piece):
    text = "".join(blocks)
    with unittest.mock.patch.object(tokenizer_module, "PIECE", piece):
        ids = encode(newer, [text])
    published = tokenizers.Tokenizer.from_str(newer.json)
    published.encode_special_tokens = True
    assert ids.tolist() == published.encode(text).ids
    # Unlike the older form, it adds a space only where there is none.
    spaces = text.replace("▁", " ")
    assert newer.decode(ids.tolist()) == (" " if text and spaces[0] != " " else "") + spaces


@pytest.mark.parametrize("text", ["", " ", "one", " one", "  one", "▁one", "\n one"])
def test_the_space_before_a_document_is_that_of_its_form(newer, llama, text):
    for own in (newer, llama):
        published = tokenizers.Tokenizer.from_str(own.json)
        assert encode(own, [text]).tolist() == published.encode(text).ids


def test_byte_fallback_knows_where_texts_end(llama, newer, tmp_path):
    assert llama.end_of_text == 1
    assert llama.ends == {1, 2}
    for own in (llama, newer):
        (tmp_path / "tok.json").write_text(own.json)
        assert Tokenizer.load(str(tmp_path / "tok.json")).digest == own.digest


@pytest.mark.parametrize("kind", ["tokenizer", "llama"])
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_decode_to_what_the_library_makes_of_their_bytes(request, kind, data):
    own = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, own.vocab_size - 1), max_size=30))
    text, stream = own.decode(ids), own.stream()
    # A model may stop within a character: what is shown until then is the beginning of the text.
    assert text.startswith("".join(map(stream, ids)))
    library = from_library(own.json)
    if kind == "tokenizer":
        assert text == library.decode(ids)
    else:
        tokens = [library.id_to_token(each) for each in ids]
        parts = [
            bytes.fromhex(each[3:5]) if re.fullmatch("<0x..>", each) else each.encode()
            for each in tokens
            if each not in ("<s>", "</s>", "<unk>")
        ]
        assert text == b"".join(parts).decode(errors="replace").replace("▁", " ")


@pytest.mark.parametrize("kind", ["tokenizer", "llama"])
def test_a_character_cut_off_costs_only_itself(request, kind):
    own = request.getfixturevalue(kind)
    ids = encode(own, ["the people\n漢字漢字漢"]).tolist()
    text, stream = own.decode(ids[:-1]), own.stream()
    assert text.strip() == "the people\n漢字漢字�"
    assert "".join(map(stream, ids[:-1])) == text.removesuffix("�")
    assert stream(ids[-1]) == "漢"


def of_llama(llama, **changes):
    return json.dumps(json.loads(llama.json) | changes)


def test_what_is_not_quite_llamas_is_refused(llama, tmp_path):
    parts = json.loads(llama.json)
    wide = parts["model"] | {"vocab": parts["model"]["vocab"] | {"e▁t": 1000}}
    few = {token: n for token, n in parts["model"]["vocab"].items() if token != "<0x0A>"}
    special = [{**token, "special": False} for token in parts["added_tokens"]]
    metaspace = json.loads(newer_form(llama.json))["pre_tokenizer"]
    pad = {**parts["added_tokens"][0], "id": 1000, "content": "<pad>", "special": False}
    newer = {"normalizer": None, "pre_tokenizer": metaspace}
    for changes, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it has a pre_tokenizer (Whitespace)"),
        (newer | {"pre_tokenizer": metaspace | {"split": True}}, "(Metaspace) that is not Llama's"),
        ({"pre_tokenizer": metaspace}, "its normalizer does not just write spaces"),
        ({"normalizer": None}, "its normalizer does not just write spaces"),
        (
            newer | {"added_tokens": [*parts["added_tokens"], pad]},
            "its added token '<pad>' is not special",
        ),
        ({"normalizer": {"type": "NFC"}}, "its normalizer does not just write spaces"),
        ({"model": wide}, "its token 'e▁t' crosses the end of a word"),
        ({"model": parts["model"] | {"vocab": few}}, "lacks 1 of the 256 bytes"),
        ({"added_tokens": special}, "it has no special token '<s>'"),
    ):
        (tmp_path / "tok.json").write_text(of_llama(llama, **changes))
        with pytest.raises(DataError, match=rf"tok.json .*{re.escape(message)}"):
            Tokenizer.load(str(tmp_path / "tok.json"))
