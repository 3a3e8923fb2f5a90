"""The same training on every mesh of devices."""

import json

import numpy as np
import pytest

from peerjax.sharding.rules import complete_sizes
from tests.elsewhere import python
from tests.training.on_meshes import KINDS, STEPS
from tests.training.tiny import write_recipe

MESHES = {"peer": ("8x1x1", "1x2x4", "1x1x8")}
WORDS = (("weights", 1e-5), ("accumulators", 1e-4))  # share of words that may differ


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_same_on_every_mesh(kind, tmp_path):
    meshes = MESHES.get(kind, ("2x1x4",))
    one, many = (tmp_path / name for name in ("one.npz", "many.npz"))
    script = ("-m", "tests.training.on_meshes")
    python(*script, str(one), kind, "1x1x1").check_returncode()
    python(*script, str(many), kind, *meshes, devices=8).check_returncode()
    expected, found = np.load(one), np.load(many)
    for mesh in meshes:
        for step in range(STEPS):
            loss, other = expected[f"1x1x1/loss/{step}"], found[f"{mesh}/loss/{step}"]
            assert abs(loss - other) < 1e-3 * loss, (mesh, step)
        names = [name for name in found.files if name.startswith(f"{mesh}/state")]
        assert any("pools" in name for name in names)
        for name in names:
            before = expected[name.replace(mesh, "1x1x1")]
            if before.dtype.kind in "iu":
                bounds = [bound for word, bound in WORDS if name.endswith(word)]
                share = np.mean(before != found[name])
                assert share <= (bounds[0] if bounds else 0), (name, share)
            else:
                error = np.abs(before - found[name]).max()
                assert error <= 1e-4 * np.abs(before).max() + 1e-7, (name, error)


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(corpus, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.py", corpus, **{"peer.num_experts": (32, 32)})

    def train(workdir, devices, steps=12, **mesh):
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        script = ("train.py", f"--config={recipe}", f"--workdir={tmp_path / workdir}")
        return python(*script, f"--config.steps={steps}", *flags, devices=devices)

    train("one", 1).check_returncode()
    # The schedule depends on the number of steps, so that the losses differ from those of `one`.
    for devices, steps, mesh in (
        (8, 3, {"data": 1, "fsdp": 2, "expert": 4}),
        (8, 6, {"expert": 8}),
        (4, 9, {"fsdp": 4}),
        (1, 12, {}),
    ):
        found = train("many", devices, steps, **mesh)
        assert not found.returncode, found.stderr
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "many")
    ]
    losses = [each["validation"]["all"]["nats_per_token"]["after"] for each in reports]
    assert abs(losses[0] - losses[1]) < 0.1
    found = python(
        "evaluate.py", f"--workdir={tmp_path / 'many'}", f"--output={tmp_path / 'out'}", devices=8
    )
    assert not found.returncode, found.stderr
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert abs(evaluation["texts"]["all"]["loss"]["nats_per_token"] - losses[1]) < 0.05

    refused = train("new", 8, expert=3)
    assert refused.returncode == 2
    assert "mesh sizes data=-1, fsdp=1, expert=3 do not fit 8 devices" in refused.stderr


def test_the_devices_that_are_left_go_to_one_axis():
    assert complete_sizes((-1, 1, 1), 8) == (8, 1, 1)
    assert complete_sizes((2, -1, 2), 8) == (2, 2, 2)
    assert complete_sizes((1, 2, 4), 8) == (1, 2, 4)
    for sizes in ((3, 1, 1), (-1, -1, 1), (0, 1, 1), (2, 2, 1), (-1, 3, 1)):
        with pytest.raises(ValueError, match="mesh sizes"):
            complete_sizes(sizes, 8)
