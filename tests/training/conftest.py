import pytest

from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """A pattern that matches a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
