"""Compiles the native kernels while the project is built, if there is a compiler."""

import importlib.util
import pathlib
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = pathlib.Path("pallas_kernels/native_cpu/build.py")


class NativeKernels(BuildHookInterface):
    """Puts the libraries into wheels for this platform, or into the source tree of an editable one.

    Without a compiler, the wheel is for any platform, and XLA computes everything.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the libraries before a wheel is made."""
        if self.target_name != "wheel":
            return
        # Importing the package would need JAX.
        spec = importlib.util.spec_from_file_location("build", pathlib.Path(self.root) / BUILD)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            libraries = build.build()
        except (build.BuildError, OSError) as error:
            self.app.display_warning(f"native kernels are not compiled: {error}")
            return
        build_data["artifacts"] += [str(BUILD.with_name(each.name)) for each in libraries]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{build.platform_of(libraries)}"
