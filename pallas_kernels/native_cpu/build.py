"""Compiles the libraries of native kernels with the C++ compiler that is installed.

There is one for each kind of processor. `python -m pallas_kernels.native_cpu` compiles them where
they are loaded from. Building a wheel of the
project runs this file too, so it imports nothing but the standard library.
"""

import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

FOLDER = pathlib.Path(__file__).parent
# AVX2, FMA and BMI: processors since 2013 (Intel) and 2015 (AMD).
OLDER = "x86-64-v3"
# AVX-512: server processors since 2017 (Intel) and 2022 (AMD).
NEWER = "x86-64-v4"
PROCESSORS = (NEWER, OLDER)
FLAGS = (
    "-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread",
)  # fmt: skip
VERSION_OF_HEADERS = re.compile(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)")


class BuildError(Exception):
    """A reason why the library cannot be compiled, and the remedy."""


def library_for(processor: str) -> pathlib.Path:
    """Returns the path of the library for a kind of processor."""
    return FOLDER / f"{processor}.so"


def digest_of_sources() -> str:
    """Returns a digest of everything that the libraries are compiled from."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(p for p in FOLDER.iterdir() if p.suffix in (".h", ".cc")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def headers() -> pathlib.Path:
    """Returns the folder of the C++ headers that the installed jaxlib carries.

    Raises:
        BuildError: if jaxlib is not installed.
    """
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        raise BuildError("jaxlib, which has the headers, is not installed; install it")
    return pathlib.Path(found.submodule_search_locations[0]) / "include"


def version_of(headers: pathlib.Path) -> tuple[int, ...]:
    """Returns the major and minor version of XLA's interface in a folder of headers."""
    text = (headers / "xla" / "ffi" / "api" / "c_api.h").read_text()
    return tuple(map(int, VERSION_OF_HEADERS.findall(text)))


def compiler() -> list[str]:
    """Returns the command of a C++ compiler: $CXX, one that is installed, or ziglang's.

    Raises:
        BuildError: if there is none.
    """
    if os.environ.get("CXX"):
        return [os.environ["CXX"]]
    for name in ("clang++", "g++", "c++"):
        if shutil.which(name):
            # The library then needs only the C library of the system that loads it.
            return [name, "-static-libstdc++", "-static-libgcc"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu.2.28"]
    raise BuildError("no C++ compiler is installed; install g++ or clang++, or the package ziglang")


def check_platform() -> None:
    """Checks that the kernels can be compiled for this machine.

    Raises:
        BuildError: if it is not Linux on x86-64.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise BuildError(
            f"they are for Linux on x86-64, not for {sys.platform} on {platform.machine()}"
        )


def platform_of(libraries: Iterable[pathlib.Path]) -> str:
    """Returns the platform of a wheel with libraries: that of the newest C library they need."""
    versions = [
        int(version)
        for library in libraries
        for version in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
    ]
    return f"manylinux_2_{max(17, *versions)}_x86_64"


def build() -> list[pathlib.Path]:
    """Compiles the libraries, except those that were compiled from the same sources.

    A finished library replaces the old one at once. A process that has loaded the old one keeps it.

    Returns:
        The paths of the libraries.

    Raises:
        BuildError: if the platform is not supported, there is no compiler, or it fails.
    """
    check_platform()
    import fcntl  # which only POSIX systems have

    # Environments that are made at the same time share the folder. The first one compiles.
    with open(FOLDER / "handlers.cc") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(_compile, PROCESSORS))


def _compile(processor: str) -> pathlib.Path:
    digest, library = digest_of_sources(), library_for(processor)
    if library.exists() and digest.encode() in library.read_bytes():
        return library
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        result = pathlib.Path(folder) / library.name
        command = [
            *compiler(), *FLAGS, f"-march={processor}", "-isystem", str(headers()),
            f'-DPEER_SOURCES="{digest}"', str(FOLDER / "handlers.cc"), "-o", str(result),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{command[0]} failed: {done.stderr[-2000:]}")
        os.replace(result, library)
    return library
