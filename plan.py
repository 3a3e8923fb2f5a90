"""Shows the FLOPs and memory that a configuration needs.

python plan.py --config=configs/X.py --target=v5p:4x4x4
"""

from absl import flags
from ml_collections import config_flags

from peerjax import script
from peerjax.data.pipeline import load_tokenizer
from peerjax.planning.plan import plan, print_plan

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/quickstart.py.")
TARGET = flags.DEFINE_string(
    "target",
    "cpu",
    "Device to train on: cpu, v5e, v5p, v6e, tpu7x, h100, or chips of a TPU such as v5p:4x4x4. The "
    "device need not be present.",
)
VOCABULARY = flags.DEFINE_integer(
    "vocabulary", None, "Number of entries of the tokenizer. Default: that of data.tokenizer.", 1
)
COMPILE = flags.DEFINE_bool(
    "compile", True, "Compile the step to count temporary memory. This takes seconds to minutes."
)
flags.mark_flag_as_required("config")


def main() -> None:
    """Prints FLOPs and memory, by part."""
    config = CONFIG.value
    vocabulary = VOCABULARY.value or load_tokenizer(config).vocab_size
    print_plan(plan(config, TARGET.value, vocabulary, compile=COMPILE.value))


if __name__ == "__main__":
    script.run(main, CONFIG)
