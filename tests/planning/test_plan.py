"""What `plan.py` shows, beside the arrays that training has."""

import json

import jax
import pytest

from peerjax.errors import ConfigError, UserError
from peerjax.objectives import language_model
from peerjax.planning.plan import plan, print_plan, write_plan
from peerjax.planning.programs import program_for, step_of
from peerjax.planning.targets import check_target, network_rate
from peerjax.training.optimizer import make_optimizer
from peerjax.training.state import create_state
from tests.elsewhere import python
from tests.training.tiny import tiny_config

VOCABULARY = 61


def test_the_parts_add_up_to_the_state_that_training_keeps(capsys):
    config = tiny_config("unused")
    found = plan(config, "cpu", VOCABULARY, compile=False)
    task, optimizer = language_model(config, VOCABULARY), make_optimizer(config)
    state = jax.jit(lambda: create_state(config, task, optimizer))()
    live = sum(
        leaf.nbytes for leaf in jax.tree.leaves((state.params, state.pools, state.opt_state))
    )
    kept = sum(size for part, size in found.state.items() if "gradient" not in part)
    assert kept == live
    assert found.program is None
    print_plan(found)
    assert "optimizer state of parameters" in capsys.readouterr().out


def test_the_step_is_compiled_in_a_process_of_its_own_and_holds_the_state():
    config = tiny_config("unused")
    found = plan(config, "cpu", VOCABULARY)
    state = sum(size for part, size in found.state.items() if "gradient" not in part)
    assert found.program.total > state
    assert found.program.aliased >= found.program.pools
    assert (found.program.chips, found.program.rows) == (1, 8)


@pytest.mark.parametrize("target", ["v9", "h100:2x2", "v5p:4by4", "v5p:8", "cpu:2x2"])
def test_an_unknown_target_is_named(target):
    with pytest.raises(UserError, match=f"target '{target}' is unknown; choose cpu, v5e"):
        check_target(target)


def test_rings_between_hosts_use_the_links_of_all_gpus_of_a_host():
    assert network_rate("h100:8", is_ring=False) == network_rate("h100:8", is_ring=True) == 450e9
    assert network_rate("h100:64", is_ring=False) == 50e9
    assert network_rate("h100:64", is_ring=True) == 400e9
    assert network_rate("v5p:4x4x8", is_ring=True) == network_rate("v5p:4x4x8", is_ring=False)


def test_a_configuration_that_cannot_be_is_refused_before_anything_is_compiled():
    config = tiny_config("unused")
    config.peer.heads = 0
    with pytest.raises(ConfigError, match="peer.heads=0 is not positive"):
        program_for("cpu", config)


def test_a_mesh_or_batch_that_does_not_fit_the_chips_is_refused():
    config = tiny_config("unused")
    config.mesh.expert = 4
    with pytest.raises(ConfigError, match=r"expert=4 do not fit 1 device \(cpu\)"):
        plan(config, "cpu", VOCABULARY)
    with pytest.raises(ConfigError, match="data.batch_size=8 is not divisible by the 128 chips"):
        plan(config, "v5p:4x4x8", VOCABULARY)


def test_a_chip_keeps_its_part_of_the_state(tmp_path):
    config = tiny_config("unused")
    config.peer.num_experts = (32, 32)
    whole = plan(config, "cpu", VOCABULARY, compile=False)
    config.mesh.expert = 8
    found = plan(config, "v5p:2x2x2", VOCABULARY, compile=False)
    assert found.mesh == {"data": 1, "fsdp": 1, "expert": 8}
    for part in ("pools: codes", "pools: accumulators", "pools: factored gradient"):
        assert 8 * found.state[part] == whole.state[part]
    assert found.state["parameters"] == whole.state["parameters"]
    moments = "optimizer state of parameters"
    assert found.state[moments] < whole.state[moments] / 2
    write_plan(found, str(tmp_path))
    assert json.loads((tmp_path / "plan.json").read_text())["mesh"]["expert"] == 8


def test_packed_matrices_and_their_state_are_on_every_chip():
    config = tiny_config("unused")
    config.update_from_flattened_dict(
        {"model.layers": (("monet_hd", 2),), "monet.num_experts": 64, "monet.top_k": 2}
    )
    config.monet.storage = "int4"
    whole = plan(config, "cpu", VOCABULARY, compile=False)
    config.mesh.expert = 8
    found = plan(config, "v5p:2x2x2", VOCABULARY, compile=False)
    assert found.state["parameters"] == whole.state["parameters"]


def test_the_step_is_traced_with_all_fields_that_rows_of_text_have():
    config = tiny_config("unused")
    config.update_from_flattened_dict(
        {"model.layers": (("metapeer", 1),), "metapeer.open": 2, "metapeer.chunk": 8}
    )
    step, state, batch = step_of(config, VOCABULARY)
    assert jax.eval_shape(step, state, batch)[0].step.shape == ()


def test_the_script_prints_both_tables():
    command = ["plan.py", "--config=configs/peer_small.py", "--vocabulary=4096", "--nocompile"]
    found = python(*command)
    assert found.returncode == 0, found.stderr
    assert "Forward FLOPs a token" in found.stdout
    assert "pools: accumulators" in found.stdout
