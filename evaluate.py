"""Evaluates a checkpoint: python evaluate.py --workdir=runs/quickstart [--pattern='*.txt']."""

from absl import flags

from peerjax import script
from peerjax.atomic import make_folder
from peerjax.inference.evaluating import evaluate_without, print_evaluation, write_evaluation
from peerjax.inference.trained import open_run
from peerjax.training.workdir import folder_of

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of train.py.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the newest by default.")
PATTERN = flags.DEFINE_string(
    "pattern", "", "Text to read, as data.pattern; the run's validation text by default."
)
REMOVE = flags.DEFINE_list(
    "remove_domains", [], "Then also without the experts of these domains; or 'all'."
)
ROWS = flags.DEFINE_integer("rows", None, "Of each domain, spread evenly; all by default.", 1)
OUTPUT = flags.DEFINE_string("output", None, "A folder; by default evaluation/ in the workdir.")


def main() -> None:
    """Prints loss by domain and expert usage, with all experts or without a domain's."""
    run = open_run(WORKDIR.value, STEP.value)
    folder = run.folder / "evaluation" if OUTPUT.value is None else folder_of(OUTPUT.value)
    make_folder(folder)
    evaluation, removals = evaluate_without(run, REMOVE.value, PATTERN.value, ROWS.value)
    facts = {"workdir": str(run.folder), "step": run.step, "pattern": PATTERN.value}
    write_evaluation(folder, evaluation, facts, removals)
    print_evaluation(folder)


if __name__ == "__main__":
    script.run(main)
