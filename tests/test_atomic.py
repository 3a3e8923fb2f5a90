import pytest

from peerjax.atomic import make_folder
from peerjax.errors import UserError


def test_a_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "deep" / "down")
        assert not list((tmp_path / "deep" / "down").iterdir())


@pytest.mark.parametrize("name", ["a file", "a file/below", "/proc", "/proc/none"])
def test_what_cannot_be_written_to_is_named(name, tmp_path):
    (tmp_path / "a file").write_text("precious")
    with pytest.raises(UserError, match=f"{name} cannot be a folder to write to .*; name another"):
        make_folder(tmp_path / name)
    assert (tmp_path / "a file").read_text() == "precious"
