"""What differs by platform is chosen when a program is lowered, or is not traced."""

from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import platforms
from pallas_kernels.dispatch import Kernel, dispatch
from pallas_kernels.platforms import by_platform


def test_the_platform_compiled_for_decides_where_compilers_are(monkeypatch):
    monkeypatch.setattr(platforms, "can_compile_for", lambda platform: True)

    def function(x):
        return by_platform(x, tpu=lambda x: -x, default=lambda x: x + 1)

    traced = jax.jit(function).trace(1.0)
    for platform, operation, other in (("tpu", "negate", "add"), ("cpu", "add", "negate")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"stablehlo.{operation}" in text
        assert f"stablehlo.{other}" not in text


def test_nothing_is_traced_for_platforms_without_a_compiler(monkeypatch):
    monkeypatch.setattr(platforms, "can_compile_for", lambda platform: platform == "cpu")

    def refuse(x):
        raise AssertionError

    assert by_platform(1.0, tpu=refuse, cuda=refuse, default=lambda x: x + 1) == 2
    assert by_platform(1.0, tpu=refuse, cpu=lambda x: x - 1, default=refuse) == 0


@pytest.mark.parametrize(
    ("capability", "is_able"), [("8.6", False), ("gfx90a", False), ("9.0", True), ("12.0", True)]
)
def test_xla_does_what_kernels_cannot_on_older_gpus(capability, is_able, monkeypatch):
    gpu = SimpleNamespace(compute_capability=capability, device_kind="a GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(platforms, "can_compile_for", lambda platform: platform == "cuda")
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *operands, default, **able: sorted(able)
    )
    kernels = {"mosaic_gpu": Kernel(lambda x, interpret: "kernel")}
    assert dispatch("add", None, lambda x: "xla", kernels, 1.0) == ["cuda"] * is_able
    if is_able:
        assert dispatch("add", "mosaic_gpu", lambda x: "xla", kernels, 1.0) == "kernel"
    else:
        with pytest.raises(ValueError, match=r"cannot add: Mosaic .* a GPU has"):
            dispatch("add", "mosaic_gpu", lambda x: "xla", kernels, 1.0)
