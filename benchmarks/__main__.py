"""Lists the benchmarks, or executes one: python -m benchmarks [NAME] [--quick]."""

import argparse
import importlib

from benchmarks.result import publish

BENCHMARKS = {
    "memory": "bytes of an expert parameter in training, and memory of the compiled step",
    "step_time": "time of a training step of a million experts, compared with PEER-pytorch",
    "peer_1m": "peak memory and step time of configs/peer_1m_cpu.py and peer_1m.py (16 GB)",
    "quickstart_step": "time of a step of the quickstart, compared with an earlier commit",
    "lookup": "time of the lookup, compared with gather + einsum",
    "active_experts": "time of lookup and update against the number of active experts",
    "gates": "losses of the gates of PEER at equal numbers of active experts, tuned (hours)",
    "attention_sink": "attention sinks of PEER and Monet with a shared path and without (a night)",
    "sampling": "tokens a second, compared with a Llama of equal active bytes (llama-cpp-python)",
    "reference": "configs/reference.py and its dense twin, tuned, three seeds (hours)",
    "distill_codes": "losses of students of int8, int4, int3 and ternary, tuned (a night)",
    "scales": "scales of int4, int3 and ternary pools over 10,000 steps of a small model",
    "monet_to_peer": "losses of PEER distilled from Monet, tuned (a night)",
    "one_accelerator": "expert parameters that train on one H100 or one v5e, by compiled steps",
    "plans": "memory and exchanges of steps on many chips, compiled for absent TPUs and GPUs",
    "weak_scaling": "what grows from 8 to 2,048 chips, by compiled steps of two layers",
    "mesh_time": "time of the quickstart's step on two devices and in two processes of one CPU",
    "spread_load": "load of the worst device, by peer.spread, on trained and drawn ids",
    "kernels": "time of lookup and update on this device, compared with a copy",
    "device_step": "time and memory of the recipe for one accelerator, executed on this device",
    "kernels_aot": "memory and traffic of every kernel, compiled for absent TPUs and GPUs",
    "metarouter": "losses and specialisation of metarouters and PEER on twelve domains (a night)",
    "digits": "accuracy and bytes of the examples' classifier, int4 and float32 AdamW",
    "prepare": "peak memory and speed of prepare.py on a gigabyte of text",
    "int4_buffers": "losses with accumulators of every width and with ECO (a night; GPU: minutes)",
    "int4_quality": "losses of int4 and of other storages, rules and sizes (a night)",
    "isoflop": "losses of dense layers, mixtures and pools at equal FLOPs a token, tuned (a night)",
    "domains": "losses of PEER and Monet without the experts of a domain",
    "query_norm": "experts that PEER uses with and without normalised queries, tuned (hours)",
    "monet_sizes": "memory per chip of the Monet paper's models, compiled for a TPU pod",
    "monet_time": "time, memory and gradient sparsity of training steps of Monet and PEER",
    "monet": "losses of both kinds of Monet and of PEER at equal FLOPs a token, tuned (hours)",
}


def main() -> None:
    """Lists the benchmarks, or executes the one that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, metavar="NAME")
    parser.add_argument(
        "--quick", action="store_true", help="a small version, to check that it works"
    )
    arguments = parser.parse_args()
    if arguments.name is None:
        for name, description in BENCHMARKS.items():
            print(f"{name:16} {description}")
        return
    run = importlib.import_module(f"benchmarks.{arguments.name}").run
    publish(arguments.name, run(arguments.quick), arguments.quick)


if __name__ == "__main__":
    main()
