"""Memory of a chip in a training step of the Monet paper's models, compiled for a TPU pod.

The pod need not be there; nothing is executed.
"""

from benchmarks.result import Figure, Result
from benchmarks.targets import GIB, MEMORY, run_for

KIND, CHIPS = "v5p", "4x4x4"
VOCABULARY = 32_000
RECIPES = ("monet_850m", "monet_1_4b", "monet_4_1b")


def run(quick: bool) -> Result:
    """Compiles all three; `quick` compiles the smallest."""
    rows, figures, details = [], [], {}
    for recipe in RECIPES[:1] if quick else RECIPES:
        found = run_for(KIND, "benchmarks.compiled_pod", CHIPS, recipe, str(VOCABULARY))
        details[recipe] = found
        rows.append(
            [
                recipe,
                f"{found['chips']} {KIND}",
                str(found["rows"]),
                *(f"{found[part] / GIB:.1f}" for part in ("state", "temp", "total")),
            ]
        )
        name = f"{recipe}: bytes of a chip"
        figures.append(Figure.at_most(name, found["total"], MEMORY[KIND]))
    columns = ("recipe", "chips", "rows a chip", "GiB of state", "GiB temporary", "GiB in all")
    return Result(columns=columns, rows=rows, figures=figures, details=details)
