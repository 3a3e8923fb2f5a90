"""Evaluates a checkpoint: python evaluate.py --workdir=runs/quickstart [--pattern='*.txt']."""

from absl import flags

from pallas_kernels.dispatch import describe
from peerjax import script
from peerjax.atomic import make_folder
from peerjax.inference.evaluating import (
    SINK_PROBES,
    evaluate_without,
    print_evaluation,
    write_evaluation,
)
from peerjax.inference.trained import open_run
from peerjax.processes import is_first
from peerjax.training.workdir import folder_of

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of train.py.", required=True)
STEP = flags.DEFINE_integer("step", None, "Training step of the checkpoint. Default: the newest.")
PATTERN = flags.DEFINE_string(
    "pattern", "", "Globs of text files, as in data.pattern. Default: the run's validation text."
)
REMOVE = flags.DEFINE_list(
    "remove_domains",
    [],
    "Evaluate again without the experts of each of these domains. 'all' means every domain.",
)
ROWS = flags.DEFINE_integer(
    "rows", None, "Number of rows to read of each domain, spread evenly. Default: all.", 1
)
SINKS = flags.DEFINE_bool(
    "sinks", False, "Also measure attention sinks and large activations, by layer and head."
)
SPECIALISATION = flags.DEFINE_bool(
    "specialisation", False, "Also measure how far experts and metaexperts belong to domains."
)
OUTPUT = flags.DEFINE_string("output", None, "Output folder. Default: evaluation/ in the workdir.")
JOINT = script.Joint.define()


def main() -> None:
    """Prints the loss by domain and expert usage, and losses without the experts of domains."""
    run = open_run(WORKDIR.value, STEP.value)
    if is_first():
        print(describe())
    folder = run.folder / "evaluation" if OUTPUT.value is None else folder_of(OUTPUT.value)
    make_folder(folder)
    further = SINK_PROBES if SINKS.value else ()
    found = evaluate_without(
        run, REMOVE.value, PATTERN.value, ROWS.value, further, SPECIALISATION.value
    )
    if not is_first():
        return
    facts = {"workdir": str(run.folder), "step": run.step, "pattern": PATTERN.value}
    write_evaluation(folder, found, facts)
    print_evaluation(folder)


if __name__ == "__main__":
    script.run(main, joint=JOINT)
