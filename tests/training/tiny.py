"""A run small enough for tests, and a way to have it killed.

    python -m tests.training.tiny WORKDIR CORPUS [when N]

`when` is "step N", "writing N" (soon after the writing of the checkpoint of step N has begun) or
"sealing N" (when it is in its place, but has no checksums yet). "full N" instead lets no file grow
beyond 10 kB from the save of that checkpoint on.
"""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import ml_collections
import numpy as np

from peerjax.config import default_config
from peerjax.training import pending
from peerjax.training.checkpoint import Checkpoints
from peerjax.training.loop import train

STEPS, SAVE_EVERY, EVAL_EVERY = 12, 3, 4
WORDS = "the a expert token router pool of in is small many routes learns and one two"


def write_corpus(folder: Path, documents: int = 48, seed: int = 0) -> str:
    """Writes random sentences; returns a pattern that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(documents):
        text = " ".join(rng.choice(WORDS.split(), 250))
        (folder / f"{number:02d}.txt").write_text(text)
    return str(folder / "*.txt")


def tiny_config(pattern: str) -> ml_collections.ConfigDict:
    """Two layers, 64 experts, 12 steps of 8 rows; a folder as `pattern` is one of shards."""
    config = default_config()
    config.steps = STEPS
    config.data.source = "shards" if Path(pattern).is_dir() else "files"
    config.data.pattern = pattern
    config.data.validation_fraction = 0.2
    config.data.sequence_length = 32
    config.data.batch_size = 8
    config.model.width = 16
    config.model.layers = (("dense", 1), ("peer", 1))
    config.model.heads = 2
    config.mlp.hidden = 32
    config.peer.num_experts = (8, 8)
    config.peer.heads = 2
    config.peer.experts_per_head = 4
    config.peer.key_width = 8
    config.optimizer.warmup_steps = 2
    config.eval.every = EVAL_EVERY
    config.eval.rows = 9  # not a multiple of the batch
    config.checkpoint.every = SAVE_EVERY
    return config


def write_recipe(path: Path, corpus: str, **fields: object) -> Path:
    """Writes a recipe of `tiny_config` with other values of fields, for scripts."""
    path.write_text(
        "from tests.training.tiny import tiny_config\n"
        "def get_config():\n"
        f"    config = tiny_config({corpus!r})\n"
        f"    config.update_from_flattened_dict({fields!r})\n"
        "    return config\n"
    )
    return path


def fill_disk_at(step: int) -> None:
    """Arranges for the writes of a save to fail."""
    save = Checkpoints.save

    def save_on_a_full_disk(self, saved_step, *args, **kwargs):
        self.wait()
        if saved_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(self, saved_step, *args, **kwargs)

    Checkpoints.save = save_on_a_full_disk


def kill_at(when: str, step: int) -> None:
    """Arranges for this process to be killed."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "step":
        figures = pending.Pending.figures

        def figures_or_die(self):
            if self.step == step:
                die()
            return figures(self)

        pending.Pending.figures = figures_or_die
        return

    save, seal = Checkpoints.save, Checkpoints._seal

    def save_or_die(self, saved_step, *args, **kwargs):
        if when == "writing" and saved_step == step:
            threading.Thread(target=lambda: (time.sleep(0.02), die())).start()
        save(self, saved_step, *args, **kwargs)

    def seal_or_die(self, sealed_step):
        if when == "sealing" and sealed_step == step:
            self._manager.wait_until_finished()
            die()
        seal(self, sealed_step)

    Checkpoints.save, Checkpoints._seal = save_or_die, seal_or_die


if __name__ == "__main__":
    workdir, pattern = sys.argv[1:3]
    if sys.argv[3:4] == ["full"]:
        fill_disk_at(int(sys.argv[4]))
    elif sys.argv[3:]:
        kill_at(sys.argv[3], int(sys.argv[4]))
    train(tiny_config(pattern), workdir)
