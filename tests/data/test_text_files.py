import json
import re
import unittest.mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerjax.data import text_files
from peerjax.data.documents import read_files
from peerjax.data.text_files import domain_globs, find_files, read_blocks
from peerjax.errors import ConfigError, DataError


def test_a_pattern_names_domains():
    assert domain_globs("web=a/**/*.txt; code=src/*.py;b.txt;d/x=1/*.txt;") == [
        ("web", "a/**/*.txt"),
        ("code", "src/*.py"),
        ("files", "b.txt"),
        ("files", "d/x=1/*.txt"),
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (" ; ", "has no glob"),
        ("web=;a.txt", "the domain 'web' in the pattern"),
        ("all=a.txt", "cannot be called 'all'"),
    ],
)
def test_a_pattern_without_globs_is_named(pattern, message):
    with pytest.raises(ConfigError, match=message):
        domain_globs(pattern)


def test_a_file_is_of_the_first_domain_that_matches_it(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found = find_files(f"one={tmp_path}/b.*;two={tmp_path}/*;one={tmp_path}/a.txt")
    assert [(file.domain, file.path.name) for file in found] == [
        ("one", "b.txt"),
        ("two", "a.txt"),
        ("two", "c.md"),
    ]
    with pytest.raises(DataError, match=r"no file matches .*\*\.rst'"):
        find_files(f"{tmp_path}/*.txt;{tmp_path}/*.rst")


@settings(deadline=None)
@given(text=st.text(), bad=st.booleans(), block=st.integers(1, 9))
def test_blocks_join_to_the_whole_file(text, bad, block, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "file.txt"
    path.write_bytes(text.encode() + b"\xff" * bad)
    with unittest.mock.patch.object(text_files, "BLOCK_BYTES", block):
        if bad:
            place = len(text.encode())
            with pytest.raises(DataError, match=rf"\(byte {place} cannot be decoded\)"):
                list(read_blocks(path))
        else:
            assert "".join(read_blocks(path)) == path.read_text(encoding="utf-8")


def test_json_lines_are_documents(tmp_path):
    lines = ['{"body": "one\\r\\n", "id": 1}', "", '{"body": " "}', '\t{"body": "Zwei ü \\u00fc"}']
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    documents = read_files(f"notes={tmp_path}/*.jsonl", "body")
    assert [(each.domain, each.text) for each in documents] == [
        ("notes", "one\r\n"),
        ("notes", " "),
        ("notes", "Zwei ü ü"),
    ]
    assert documents[2].name.endswith("x.jsonl:4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{text", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["text"]', "is no JSON object with the field 'text'"),
        (b'{"body": "x", "id": 1}', "has no field 'text' (it has: body, id)"),
        (b'{"text": 3}', "has a field 'text' that is not text: 3"),
        (b'{"text": "\xff"}', "is not UTF-8 text"),
        (rb'{"text": "\ud800"}', "has half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps({"text": "good"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=re.escape(f"{path}, line 3, {message}")):
        read_files(str(path), "text")


def test_a_file_that_cannot_be_read_is_named():
    # Not even root reads there.
    with pytest.raises(DataError, match="/proc/self/mem cannot be read"):
        read_files("/proc/self/mem", "text")
