"""Shows memory per chip in a training step of the Monet paper's models on a TPU pod.

The step is compiled for the pod, which need not be present. Nothing is executed.
"""

from benchmarks.recipes import config_of
from benchmarks.result import Figure, Result
from peerjax.planning.programs import program_for
from peerjax.planning.targets import GIB, MEMORY

KIND = "v5p"
VOCABULARY = 32_000
RECIPES, CHIPS = ("monet_850m", "monet_1_4b", "monet_4_1b"), "4x4x4"


def run(quick: bool) -> Result:
    """Compiles all three models; `quick` compiles the smallest."""
    rows, figures, details = [], [], {}
    for recipe in RECIPES[: 1 if quick else None]:
        found = program_for(f"{KIND}:{CHIPS}", config_of(recipe), VOCABULARY)._asdict()
        details[recipe] = found
        rows.append(
            [
                recipe,
                f"{found['chips']} {KIND}",
                str(found["rows"]),
                *(f"{found[part] / GIB:.1f}" for part in ("aliased", "temp", "total")),
            ]
        )
        name = f"{recipe}: bytes of a chip"
        figures.append(Figure.at_most(name, found["total"], MEMORY[KIND]))
    columns = ("recipe", "chips", "rows a chip", "GiB of state", "GiB temporary", "GiB in all")
    return Result(columns=columns, rows=rows, figures=figures, details=details)
