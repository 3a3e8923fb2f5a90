"""Trains a model: python train.py --config=configs/quickstart.py --workdir=runs/quickstart."""

from absl import flags
from ml_collections import config_flags

from peerjax import script
from peerjax.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/quickstart.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run. If it holds a run, training continues."
)
JOINT = script.Joint.define()
flags.mark_flags_as_required(["config", "workdir"])

if __name__ == "__main__":
    script.run(lambda: train(CONFIG.value, WORKDIR.value), CONFIG, JOINT)
