"""The native kernels on threads of the standard library, watched by sanitizers."""

import subprocess
from pathlib import Path

import pytest

from pallas_kernels.native_cpu import build

DRIVER = Path(__file__).with_name("native_driver.cc")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_no_access_is_out_of_bounds_undefined_or_a_race(sanitizers, tmp_path):
    try:
        build.check_platform()
        compiler = [each for each in build.compiler() if not each.startswith("-static")]
    except build.BuildError as error:
        pytest.skip(str(error))
    program = tmp_path / "driver"
    flags = [each for each in build.FLAGS if each not in ("-O3", "-shared")]
    flags.append(f"-march={build.OLDER}")
    command = [
        *compiler, *flags, "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all",
        str(DRIVER), "-o", str(program),
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert int(done.stdout.split()[0]) > 10_000
