"""The commands of the README can be typed one after the other."""

import re

from tests.conftest import REPOSITORY


def test_the_environment_is_activated_before_its_python_is_called():
    text = (REPOSITORY / "README.md").read_text()
    install, _ = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    activate = text.index(". .venv/bin/activate")
    assert text.index(install) < activate < text.index("```sh\npython ")
