"""Lists the benchmarks, or runs one: python -m benchmarks [NAME] [--quick]."""

import argparse
import importlib

from benchmarks.result import publish

BENCHMARKS = {
    "memory": "bytes kept for an expert parameter while training, and the compiled step",
    "step_time": "a training step of a million experts, beside PEER-pytorch",
    "peer_1m": "peak memory and step time of configs/peer_1m_cpu.py and peer_1m.py (16 GB)",
    "lookup": "the lookup, beside gather + einsum",
    "one_accelerator": "expert parameters that train on one H100 or one v5e, by compiling for them",
    "kernels": "lookup and update on the device at hand, against the bandwidth of a copy",
    "device_step": "steps of the recipe for one accelerator, executed on the one at hand",
    "kernels_aot": "every kernel compiled for TPUs and GPUs that are not here: memory and traffic",
    "digits": "the examples: accuracy and bytes of a classifier in int4, beside float32 AdamW",
    "prepare": "a gigabyte of text through prepare.py: peak memory and speed",
    "int4_buffers": "what accumulators of every width and ECO cost in loss (a night; GPU: minutes)",
    "int4_quality": "what int4 costs in loss, beside other storages, rules and sizes (a night)",
    "isoflop": "dense layers, mixtures and pools at equal FLOPs a token, tuned (a night)",
    "domains": "losses of PEER and Monet without the experts of a domain",
    "query_norm": "experts that PEER uses with and without normalised queries, tuned (hours)",
    "monet_sizes": "the Monet paper's models compiled for a TPU pod: memory of a chip",
    "monet_time": "training steps of Monet and PEER: time, memory, share with a gradient",
    "monet": "Monet, horizontal and vertical, beside PEER at equal FLOPs a token, tuned (hours)",
}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a small version, to see it work")
    arguments = parser.parse_args()
    if arguments.name is None:
        for name, description in BENCHMARKS.items():
            print(f"{name:15} {description}")
        return
    run = importlib.import_module(f"benchmarks.{arguments.name}").run
    publish(arguments.name, run(arguments.quick), arguments.quick)


if __name__ == "__main__":
    main()
