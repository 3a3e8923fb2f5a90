"""Shows the FLOPs, the memory and the network traffic that a configuration needs.

python plan.py --config=configs/X.py --target=v5p:4x4x4
"""

from absl import flags
from ml_collections import config_flags

from peerjax import script
from peerjax.data.pipeline import load_tokenizer
from peerjax.planning.plan import plan, print_plan, write_plan

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/quickstart.py.")
TARGET = flags.DEFINE_string(
    "target",
    "cpu",
    "Device to train on: cpu, v5e, v5p, v6e, tpu7x, h100, chips of a TPU such as v5p:4x4x4, or "
    "GPUs such as h100:64. The device need not be present.",
)
VOCABULARY = flags.DEFINE_integer(
    "vocabulary", None, "Number of entries of the tokenizer. Default: that of data.tokenizer.", 1
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write plan.json and a plot of the largest pools to."
)
COMPILE = flags.DEFINE_bool(
    "compile",
    True,
    "Compile the step to count temporary memory and traffic. This takes seconds to minutes.",
)
flags.mark_flag_as_required("config")


def main() -> None:
    """Prints FLOPs and memory, by part."""
    config = CONFIG.value
    vocabulary = VOCABULARY.value or load_tokenizer(config).vocab_size
    found = plan(config, TARGET.value, vocabulary, compile=COMPILE.value)
    print_plan(found)
    if OUTPUT.value:
        write_plan(found, OUTPUT.value)


if __name__ == "__main__":
    script.run(main, CONFIG)
