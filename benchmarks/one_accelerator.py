"""Shows how many expert parameters train on one accelerator, by the whole compiled step.

The accelerator need not be present. Nothing is executed.
"""

from benchmarks.recipes import config_of
from benchmarks.result import Figure, Result
from peerjax.planning.programs import program_for
from peerjax.planning.targets import GIB

# Target, recipe, wanted expert parameters, allowed memory.
CHOICES = (
    ("h100", "peer_60b_one_gpu", 60e9, 75 * GIB),
    ("v5e", "peer_12b_one_v5e", 12e9, 15 * GIB),
)
ADAMW_BYTES = 16  # float32 weight, gradient and two moments


def run(quick: bool) -> Result:
    """Compiles both recipes; `quick` compiles the smaller one."""
    rows, figures, details = [], [], {}
    for target, recipe, wanted, allowed in CHOICES[-1:] if quick else CHOICES:
        program = program_for(target, config_of(recipe))
        details[recipe] = program._asdict()
        adamw = program.pools / ADAMW_BYTES
        parameters = program.expert_parameters
        rows.append(
            [
                recipe,
                target,
                f"{parameters / 1e9:.1f}",
                f"{program.total / GIB:.1f}",
                f"{program.pools / GIB:.1f}",
                f"{adamw / 1e9:.1f}",
            ]
        )
        figures += [
            Figure.at_least(f"{recipe}: expert parameters", parameters, wanted),
            Figure.at_most(f"{recipe}: bytes on {target}", program.total, allowed),
        ]
    columns = (
        "recipe",
        "target",
        "billion expert parameters",
        "GiB in all",
        "GiB of pools",
        "billion that float32 + AdamW could hold where pools are",
    )
    return Result(columns=columns, rows=rows, figures=figures, details=details)
