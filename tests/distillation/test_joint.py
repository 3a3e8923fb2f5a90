"""Distilling, evaluating and sampling on several devices and in several processes."""

import json

import pytest

from peerjax.distillation import report
from tests.elsewhere import python
from tests.training.test_processes import finish, start
from tests.training.tiny import write_recipe

STUDENT = """
from peerjax.config import config_of_student

def get_config():
    config = config_of_student()
    config.steps, config.pool.storage, config.distill.start = 4, "int4", "rounded"
    config.eval.rows, config.checkpoint.every = 256, 4
    return config
"""


@pytest.mark.slow
def test_two_processes_distil_and_evaluate_as_one(corpus, tmp_path):
    fields = {
        "peer.num_experts": (32, 32),
        "pool.storage": "float32",
        "steps": 4,
        "eval.rows": 256,
    }
    recipe = write_recipe(tmp_path / "recipe.py", corpus, **fields)
    teacher = tmp_path / "teacher"
    found = python("train.py", f"--config={recipe}", f"--workdir={teacher}")
    assert not found.returncode, found.stderr
    student = tmp_path / "student.py"
    student.write_text(STUDENT)
    workdir = tmp_path / "two"
    flags = (f"--teacher={teacher}", f"--cache={tmp_path / 'cache'}")
    results = finish(start(student, workdir, 2, 2, *flags, script="distill.py"))
    assert [status for status, _, _ in results] == [0, 0], results
    assert "rounded" in results[0][1]
    assert "nats" not in results[1][1]  # process 0 prints
    texts = json.loads((workdir / report.FILE).read_text())["texts"]
    results = finish(start(None, workdir, 2, 2, script="evaluate.py"))
    assert [status for status, _, _ in results] == [0, 0], results
    evaluation = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    of_teacher = json.loads((teacher / "report.json").read_text())["validation"]
    for text, found in texts.items():
        # The teacher was trained and evaluated in one process on one device.
        assert abs(found["teacher"] - of_teacher[text]["nats_per_token"]["after"]) < 1e-3
        assert abs(found["student"] - evaluation["texts"][text]["loss"]["nats_per_token"]) < 1e-3
        assert 0 < found["divergence"] < 0.1

    # One prompt on four devices; the other places of the batch are copies.
    flags = (f"--workdir={tmp_path / 'two'}", "--prompt=a", "--tokens=6", "--temperature=0")
    texts = [python("sample.py", *flags, devices=devices) for devices in (1, 4)]
    assert not texts[1].returncode, texts[1].stderr
    assert texts[0].stdout == texts[1].stdout
