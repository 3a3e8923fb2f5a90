"""The kind of layer that docs/architecture.md shows is complete."""

import re

import jax
import numpy as np

from peerjax.config import validate
from peerjax.flops import forward_flops
from peerjax.layers import FEED_FORWARDS
from peerjax.training.step import make_train_step
from tests.conftest import REPOSITORY
from tests.training.test_step import make, make_batch


def test_the_kind_in_the_docs_trains_once_its_line_is_added(monkeypatch):
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown: dict = {"__name__": "plain"}
    exec(block, shown)
    monkeypatch.setitem(FEED_FORWARDS, "plain", shown["PlainConfig"])
    layers = {"model.layers": (("dense", 1), ("plain", 2)), "optimizer.warmup_steps": 0}
    config, task, optimizer, state = make(**layers)
    validate(config)
    step = jax.jit(make_train_step(config, task, optimizer), donate_argnums=0)
    losses = []
    for _ in range(4):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert 0 < metrics["experts_hit/layers_1-2"] < 1
    assert np.any(state.params["run_1"]["block"]["plain"]["router"]["kernel"])
    assert forward_flops(task.model.config, 32)["lookup"] == 2 * 4 * 16 * 8
