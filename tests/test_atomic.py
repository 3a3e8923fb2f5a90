import os

import pytest

from peerjax.atomic import make_folder, replace_whole
from peerjax.errors import UserError


def test_a_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "deep" / "down")
        assert not list((tmp_path / "deep" / "down").iterdir())


@pytest.mark.parametrize("name", ["a file", "a file/below", "/proc", "/proc/none"])
def test_what_cannot_be_written_to_is_named(name, tmp_path):
    (tmp_path / "a file").write_text("precious")
    with pytest.raises(
        UserError, match=f"{name} cannot be used as an output folder .*; choose another"
    ):
        make_folder(tmp_path / name)
    assert (tmp_path / "a file").read_text() == "precious"


def test_a_file_is_for_whom_new_files_are(tmp_path):
    def write(path):
        path.unlink()  # as libraries that rename a file of their own into place
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write("whole")

    (tmp_path / "new").touch()
    replace_whole(tmp_path / "own", write)
    assert (tmp_path / "own").read_text() == "whole"
    assert (tmp_path / "own").stat().st_mode == (tmp_path / "new").stat().st_mode
