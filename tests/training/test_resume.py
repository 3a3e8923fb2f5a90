import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from peerjax.data.prepare import Settings, prepare
from peerjax.errors import CheckpointError, DataError
from peerjax.training import loop
from peerjax.training.checkpoint import checksums
from peerjax.training.loop import train
from peerjax.training.state import create_state
from tests.conftest import REPOSITORY, config_of_finished
from tests.elsewhere import python
from tests.training.tiny import SAVE_EVERY, STEPS, tiny_config


def run_elsewhere(workdir, corpus, *kill, devices=1):
    """Runs the tiny configuration in another process; returns its exit status."""
    arguments = ["-m", "tests.training.tiny", str(workdir), corpus, *kill]
    return python(*arguments, devices=devices).returncode


def saved_arrays(workdir, step=STEPS):
    """Every array of a checkpoint, by path."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(Path(workdir).absolute() / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def metrics_file(workdir):
    return (Path(workdir) / "metrics.jsonl").read_text()


def assert_same_run(workdir, other):
    assert metrics_file(workdir) == metrics_file(other)
    arrays, others = saved_arrays(workdir), saved_arrays(other)
    assert arrays.keys() == others.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


def assert_resumes(config, folder, *make_task):
    """Trains in `folder / "whole"`, and again from the checkpoint before the last, bit-equally."""
    train(config, str(folder / "whole"), *make_task)
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / str(STEPS))
    train(config, str(folder / "resumed"), *make_task)
    assert_same_run(folder / "whole", folder / "resumed")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """A run finished in one go, not to be changed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_config(corpus), str(workdir))
    return workdir


@pytest.mark.slow
def test_killed_at_random_steps(corpus, undisturbed, tmp_path):
    first, second = sorted(np.random.default_rng(0).choice(np.arange(1, STEPS), 2, replace=False))
    for step in (first, second):
        assert run_elsewhere(tmp_path, corpus, "step", str(step)) == -signal.SIGKILL
    train(tiny_config(corpus), str(tmp_path))
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_during_saves(corpus, undisturbed, tmp_path):
    # While the first is sealed, and is the only one; while another is written, and has one before.
    for when, step in (("sealing", SAVE_EVERY), ("writing", 2 * SAVE_EVERY), ("sealing", STEPS)):
        assert run_elsewhere(tmp_path, corpus, when, str(step)) == -signal.SIGKILL
    train(tiny_config(corpus), str(tmp_path))
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_while_training_from_shards(corpus, tmp_path):
    shards = str(tmp_path / "shards")
    prepare(Settings(corpus, validation_fraction=0.2, shard_mb=0.01), shards)
    train(tiny_config(shards), str(tmp_path / "undisturbed"))
    assert run_elsewhere(tmp_path / "run", shards, "step", "7") == -signal.SIGKILL
    train(tiny_config(shards), str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")

    # Of another order, the same text gives other rows: the run is not continued.
    other = tmp_path / "other"
    for number, path in enumerate(sorted(Path(corpus).parent.glob("*.txt"), reverse=True)):
        other.mkdir(exist_ok=True)
        shutil.copy(path, other / f"{number:02d}.txt")
    shutil.rmtree(shards)
    prepare(Settings(f"{other}/*.txt", validation_fraction=0.2, shard_mb=0.01), shards)
    with pytest.raises(DataError, match="trained with another corpus"):
        train(tiny_config(shards), str(tmp_path / "run"))


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(corpus, undisturbed, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.tiny", str(tmp_path), corpus],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("validation after 0"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "stopped and saved after step 1; run the same command to continue" in output
    assert "warning" not in output
    train(tiny_config(corpus), str(tmp_path))
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "checksums"])
def test_damaged_checkpoint_is_named_and_passed_over(damage, corpus, undisturbed, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    newest = workdir / "checkpoints" / str(STEPS)
    files = [path for path in newest.rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[:-1])
    elif damage == "flipped":
        place = int(np.random.default_rng(int(time.time())).integers(len(content)))
        content[place] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "checksums.json").write_text("{}")

    train(tiny_config(corpus), str(workdir))

    assert f"checkpoint of step {STEPS} is damaged" in caplog.text
    assert (workdir / "damaged_checkpoints" / str(STEPS)).is_dir()
    assert_same_run(workdir, undisturbed)


def test_any_flipped_byte_of_any_file_is_found(undisturbed):
    from etils import epath

    from peerjax.training.checkpoint import find_damage

    folder = Path(undisturbed) / "checkpoints" / str(STEPS)
    assert find_damage(epath.Path(folder)) is None
    rng = np.random.default_rng(3)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            content = path.read_bytes()
            flipped = bytearray(content)
            # A digit or letter of the checksums' own text, so that it stays what JSON allows.
            place = 20 if path.name == "checksums.json" else int(rng.integers(len(content)))
            flipped[place] ^= 1
            path.write_bytes(flipped)
            assert find_damage(epath.Path(folder)), path
            path.write_bytes(content)
    assert find_damage(epath.Path(folder)) is None


def test_no_intact_checkpoint_is_an_error_that_loses_nothing(corpus, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    steps = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    for step in steps:
        (workdir / "checkpoints" / step / "checksums.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no checkpoint in .* was intact"):
        train(tiny_config(corpus), str(workdir))
    assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == sorted(
        steps
    )


def test_a_state_of_another_version_is_an_error_that_loses_nothing(finished, corpus, monkeypatch):
    def create_more(*args):
        state = create_state(*args)
        return state._replace(params={**state.params, "more": state.step})

    before = checksums(epath.Path(finished))
    config = config_of_finished(corpus)
    config.steps += 1
    monkeypatch.setattr(loop, "create_state", create_more)
    with pytest.raises(CheckpointError, match="checkpoints/6 does not match the state of this ver"):
        train(config, str(finished))
    assert checksums(epath.Path(finished)) == before


def test_metrics_hold_each_step_once_and_losses_fall(undisturbed):
    steps = [json.loads(line)["step"] for line in metrics_file(undisturbed).splitlines()]
    assert steps == list(range(STEPS + 1))
    assert np.mean(losses(undisturbed)[-3:]) < np.mean(losses(undisturbed)[:3]) - 0.1


@pytest.mark.slow
def test_a_finished_run_says_so_and_more_steps_continue_it(corpus, undisturbed, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    before = metrics_file(workdir)
    train(tiny_config(corpus), str(workdir))
    assert f"has finished its {STEPS} steps" in capsys.readouterr().out
    assert metrics_file(workdir) == before

    config = tiny_config(corpus)
    config.steps = STEPS + 2
    train(config, str(workdir))
    steps = [json.loads(line)["step"] for line in metrics_file(workdir).splitlines()]
    assert steps == list(range(STEPS + 3))
    assert metrics_file(workdir).startswith(before)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_report_gets_one(corpus, undisturbed, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    report = workdir / "report.json"
    whole = json.loads(report.read_text())
    for leave in (  # no report, or that of an earlier end
        report.unlink,
        lambda: report.write_text(json.dumps({**whole, "steps": SAVE_EVERY})),
    ):
        leave()
        train(tiny_config(corpus), str(workdir))
        found = json.loads(report.read_text())
        assert found == {**whole, "tokens_per_second": None}
        assert f"{STEPS} steps of 256 tokens; " in capsys.readouterr().out
        assert_same_run(workdir, undisturbed)


def losses(workdir):
    records = map(json.loads, metrics_file(workdir).splitlines())
    return np.array([record["loss"] for record in records if "loss" in record])


@pytest.mark.slow
def test_eight_devices_agree_with_one_and_restore_each_others_checkpoints(
    corpus, undisturbed, tmp_path
):
    eight = tmp_path / "eight"
    assert run_elsewhere(eight, corpus, devices=8) == 0
    # Only the order of float32 sums differs; over 12 steps that stays below 1e-4 nats.
    np.testing.assert_allclose(losses(eight), losses(undisturbed), atol=1e-4)

    # Eight devices' checkpoint, continued by one; one device's, continued by eight.
    one_goes_on = tmp_path / "one"
    shutil.copytree(eight, one_goes_on)
    shutil.rmtree(one_goes_on / "checkpoints" / str(STEPS))
    train(tiny_config(corpus), str(one_goes_on))
    eight_go_on = tmp_path / "eight_go_on"
    shutil.copytree(undisturbed, eight_go_on)
    shutil.rmtree(eight_go_on / "checkpoints" / str(STEPS))
    assert run_elsewhere(eight_go_on, corpus, devices=8) == 0
    for workdir in (one_goes_on, eight_go_on):
        np.testing.assert_allclose(losses(workdir), losses(undisturbed), atol=1e-4)

    # A float32 sum that ends a bit higher or lower now and then moves a step over the random
    # threshold of its rounding: those codes differ, and no others.
    one, other = (
        next(
            array
            for name, array in saved_arrays(run).items()
            if "pools" in name and "weights" in name
        )
        for run in (one_goes_on, undisturbed)
    )
    codes_differ = np.bitwise_xor(one, other)[..., None] >> np.arange(0, 32, 4) & 15 != 0
    assert codes_differ.mean() < 1e-3
