"""Shows what grows with the number of chips, from compiled steps of two layers.

Every chip has one row of 2,048 tokens. Pools are split over all chips. Either the experts of a chip
are fixed, or all experts. Nothing is executed.
"""

import math
from typing import Any

from benchmarks.recipes import config_of
from benchmarks.result import Figure, Result
from peerjax.planning.plan import plan
from peerjax.planning.targets import GIB
from peerjax.sharding.exchange import capacity_for, cheaper_exchange

VOCABULARY = 32_000
LAYERS, TOKENS = 2, 2048
TARGETS = ("v5p:2x2x2", "v5p:4x4x8", "v5p:8x16x16")
OF_A_CHIP = {8: (1024, 2048), 128: (4096, 8192), 2048: (16_384, 32_768)}  # 2^18 a chip
OF_ALL = (1024, 2048)
CHIPS_OF_HOST = 4
KINDS = ("all-gather", "reduce", "all-to-all", "permute")  # parts of their names


def run(quick: bool) -> Result:
    """Compiles 8, 128 and 2,048 chips in both settings; `quick` compiles 8 once."""
    rows, details = [], {}
    for target in TARGETS[:1] if quick else TARGETS:
        chips = math.prod(map(int, target.partition(":")[2].split("x")))
        settings = {"2^18 a chip": OF_A_CHIP[chips], "2^21 in all": OF_ALL}
        for setting, experts in list(settings.items())[: 1 if quick else 2]:
            found = _plan(target, chips, experts)
            details[f"{chips} chips, {setting}"] = found
            rows.append(
                [
                    f"{chips}",
                    setting,
                    found["exchange"],
                    f"{found['total'] / GIB:.1f}",
                    *(f"{_sent(found, kind) / GIB:.2f}" for kind in KINDS),
                    *(f"{1e3 * found['seconds'][each]:.1f}" for each in ("computing", "network")),
                ]
            )
    columns = (
        "chips",
        "experts",
        "exchange",
        "GiB of a chip",
        "GiB gathered",
        "GiB reduced",
        "GiB all-to-all",
        "GiB permuted",
        "computing (ms)",
        "network (ms)",
    )
    return Result(columns=columns, rows=rows, figures=_by_formula(), details=details)


def _sent(found: dict[str, Any], kind: str) -> int:
    """Returns the bytes that a chip sends in exchanges of some kinds."""
    return sum(each["bytes"] for each in found["collectives"] if kind in each["kind"])


def _plan(target: str, chips: int, experts: tuple[int, int]) -> dict[str, Any]:
    config = config_of("peer_10t_v5p_256")
    config.model.layers = (("peer", LAYERS),)
    config.mesh.expert = config.data.batch_size = chips
    config.peer.num_experts = experts
    found = plan(config, target, VOCABULARY)
    assert found.program is not None
    chosen = config.peer.heads * config.peer.experts_per_head
    return {
        "exchange": cheaper_exchange(TOKENS, chosen, chips),
        "total": found.program.total,
        "temp": found.program.temp,
        "collectives": [each._asdict() for each in found.program.collectives],
        "seconds": found.seconds,
        "flops": found.flops,
        "state": found.state,
    }


def _by_formula() -> list[Figure]:
    """Returns the bytes of x and y that a chip sends for a layer, by kind of exchange.

    Exchanges of two levels send a token once to each host that needs it. Its chips pass it on.
    """
    config = config_of("peer_10t_v5p_256")
    chosen = config.peer.heads * config.peer.experts_per_head
    figures = []
    for chips in (8, 32, 128, 512, 2048):
        of_token = 2 * 2 * config.model.width  # x and y, in bfloat16
        gathered = (chips - 1) * TOKENS * of_token / GIB
        dispatched = (chips - 1) * capacity_for(TOKENS, chosen, chips) * of_token / GIB
        hosts = chips // CHIPS_OF_HOST
        of_host = capacity_for(TOKENS, chosen, hosts)

        def once_to_each(tokens: int, hosts: int = hosts, of_token: int = of_token) -> float:
            return (hosts - 1) * tokens * of_token / GIB

        figures += [
            Figure(f"{chips} chips: GiB of x and y of a layer, gathered", gathered),
            Figure(f"{chips} chips: dispatched", dispatched),
            Figure(f"{chips} chips: dispatched, in int8", dispatched / 2),
            Figure(f"{chips} chips: gathered, once to each host", once_to_each(TOKENS)),
            Figure(f"{chips} chips: dispatched, once to each host", once_to_each(of_host)),
        ]
    return figures
