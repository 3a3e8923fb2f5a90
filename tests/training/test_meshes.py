"""The same training on every mesh of devices."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from peerjax.sharding.rules import complete_sizes
from tests.elsewhere import python
from tests.training.on_meshes import KINDS
from tests.training.test_processes import free_port
from tests.training.tiny import write_recipe

MESHES = {"peer": ("8x1x1", "1x2x4", "1x1x8")}


def assert_same_training(result):
    """Compares each mesh with one device: losses of 20 steps, and single steps from equal states.

    Float sums differ in their last digits between meshes, so that a rounding or a top-k can differ.
    """
    expected = result.pop("losses")
    result.pop("devices")
    for mesh, found in result.items():
        for step, loss in enumerate(found["losses"]):
            assert abs(loss - expected[step]) < 1e-3 * expected[step], (mesh, step)
        for step, differences in found["differences"].items():
            assert any("pools" in name for name in differences)
            for name, (kind, difference) in differences.items():
                if kind in "iu":
                    bound = {"weights": 1e-5, "accumulators": 1e-4}.get(name.split(".")[-1], 0)
                else:
                    bound = 1e-4
                assert difference <= bound, (mesh, step, name, difference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_same_on_every_mesh(kind):
    meshes = MESHES.get(kind, ("2x1x4",))
    found = python("-m", "tests.training.on_meshes", kind, *meshes, devices=8)
    assert not found.returncode, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["devices"] == 8
    assert result.keys() == {"devices", "losses", *meshes}
    assert_same_training(result)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_steps_are_the_same_in_several_processes(processes, devices):
    port, script = free_port(), ("-m", "tests.training.on_meshes", "peer", "1x2x4")

    def start(process):
        place = (str(port), str(processes), str(process))
        return python(*script, *place, devices=devices)

    with ThreadPoolExecutor(processes) as threads:
        results = list(threads.map(start, range(processes)))
    for found in results:
        assert not found.returncode, found.stderr
    result = json.loads(results[0].stdout.splitlines()[-1])
    assert result["devices"] == 8
    assert_same_training(result)


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(corpus, tmp_path):
    # Some meshes split the pools with room for other numbers of experts.
    recipe = write_recipe(tmp_path / "recipe.py", corpus, **{"peer.num_experts": (40, 50)})

    def train(workdir, devices, steps=12, **mesh):
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        script = ("train.py", f"--config={recipe}", f"--workdir={tmp_path / workdir}")
        return python(*script, f"--config.steps={steps}", *flags, devices=devices)

    train("one", 1).check_returncode()
    # The schedule depends on the number of steps, so that the losses differ from those of `one`.
    for devices, steps, mesh in (
        (8, 3, {"data": 1, "fsdp": 2, "expert": 4}),
        (8, 6, {"expert": 8}),
        (4, 9, {"fsdp": 4, "expert": 1}),
        (1, 12, {}),
    ):
        found = train("many", devices, steps, **mesh)
        assert not found.returncode, found.stderr
        said = "pools of 2,000 experts have room for 2,048, so that 4 devices have equal parts"
        assert (said in found.stdout) == (mesh.get("expert") == 4)
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
    # Of several, the last one takes them.
    assert complete_sizes((-1, 1, -1), 8) == (1, 1, 8)
    assert complete_sizes((-1, -1, 2), 8) == (1, 4, 2)
    for sizes in ((3, 1, 1), (0, 1, 1), (-2, 1, 1), (2, 2, 1), (-1, 3, 1)):
        with pytest.raises(ValueError, match="mesh sizes"):
            complete_sizes(sizes, 8)
