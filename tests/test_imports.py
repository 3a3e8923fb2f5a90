"""What other projects import is light."""

import re
import subprocess
import sys

from tests.conftest import REPOSITORY

HEAVY = ("orbax", "grain", "matplotlib", "tokenizers", "tensorboardX", "flax", "torch")


def test_the_imports_in_the_readme_load_nothing_that_is_not_needed():
    lines = re.findall(r"^from .*# (?:the|fresh) .*$", (REPOSITORY / "README.md").read_text(), re.M)
    assert len(lines) == 3
    program = "\n".join([*lines, "import sys", "print(*sys.modules)"])
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(found.stdout.split()) & set(HEAVY)
