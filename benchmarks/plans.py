"""Compiles the steps of pools over many chips, which need not be present. Nothing is executed."""

from benchmarks.recipes import config_of
from benchmarks.result import Figure, Result
from peerjax.planning.plan import plan, record_of
from peerjax.planning.targets import GIB, MEMORY, kind_of

VOCABULARY = 32_000
OF_64 = {
    "mesh.expert": 64,
    "peer.num_experts": (4480, 4480),
    "peer.spread": 128,
    "data.batch_size": 64,
}
OF_256 = {
    "mesh.expert": 256,
    "peer.num_experts": (9088, 9088),
    "peer.spread": 128,
    "data.batch_size": 256,
}
# Target, recipe, changes, wanted expert parameters, allowed memory of a chip.
CHOICES = (
    ("v5p:2x2x2", "peer_16m_pod", {}, 12 * 2**24 * 2048, 95 * GIB),
    ("v5p:4x4x8", "peer_10t_v5p_256", {}, 10e12, 90 * GIB),
    ("h100:64", "peer_10t_v5p_256", OF_64, None, None),
    ("h100:256", "peer_10t_v5p_256", OF_256, None, None),
)


def run(quick: bool) -> Result:
    """Compiles all; `quick` compiles the first."""
    rows, figures, details = [], [], {}
    for target, recipe, changes, wanted, allowed in CHOICES[:1] if quick else CHOICES:
        found = plan(config_of(recipe, **changes), target, VOCABULARY)
        program = found.program
        assert program is not None
        name = f"{recipe} on {target}"
        details[name] = record_of(found)
        sent = sum(each.bytes for each in program.collectives)
        rows.append(
            [
                recipe,
                target,
                f"{program.expert_parameters / 1e12:.2f}",
                f"{program.total / GIB:.1f}",
                f"{program.pools / GIB:.1f}",
                f"{program.peak / GIB:.1f}",
                f"{sent / GIB:.0f}",
                *(
                    f"{1e3 * found.seconds[each]:.0f}"
                    for each in ("computing", "memory", "network")
                ),
            ]
        )
        limit = MEMORY[kind_of(target)] if allowed is None else allowed
        figures.append(Figure.at_most(f"{name}: bytes of a chip", program.total, limit))
        if wanted is not None:
            parameters = program.expert_parameters
            figures.append(Figure.at_least(f"{name}: expert parameters", parameters, wanted))
    columns = (
        "recipe",
        "target",
        "trillion expert parameters",
        "GiB of a chip",
        "of them pools",
        "peak, by the compiler",
        "GiB sent",
        "computing (ms)",
        "memory (ms)",
        "network (ms)",
    )
    return Result(columns=columns, rows=rows, figures=figures, details=details)
