"""What differs by platform is chosen when a program is lowered, or is not traced."""

import jax

from pallas_kernels import platforms
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
