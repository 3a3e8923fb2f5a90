"""Distils a model: python distill.py --config=configs/distill/int4.py --teacher=A --workdir=B."""

from absl import flags
from ml_collections import config_flags

from peerjax import script
from peerjax.distillation.distill import distill

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe of the student, such as configs/distill/int4.py."
)
TEACHER = flags.DEFINE_string(
    "teacher", None, "Folder of the teacher's run, or of one of its checkpoints."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the student's run. If it holds a run, training continues."
)
CACHE = flags.DEFINE_string(
    "cache", None, "Folder for the teacher's predictions. Default: the teacher runs at every step."
)
JOINT = script.Joint.define()
flags.mark_flags_as_required(["config", "teacher", "workdir"])

if __name__ == "__main__":
    script.run(
        lambda: distill(CONFIG.value, WORKDIR.value, TEACHER.value, CACHE.value), CONFIG, JOINT
    )
