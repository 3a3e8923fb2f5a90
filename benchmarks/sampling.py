"""Compares the speed of sample.py with that of llama.cpp, one token at a time.

The model is that of `configs/peer_1m_cpu.py`, after four steps. The Llama has random weights in
Q4_0, and its feed-forward width is chosen so that a token reads as many bytes of weights. It needs
`pip install gguf llama-cpp-python`.
"""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence

import jax

from benchmarks.recipes import config_of
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.short_run import train
from pallas_kernels.dispatch import chosen, identity
from pallas_kernels.storage import words_per_expert
from peerjax.config import model_config
from peerjax.data.tokenizer import Tokenizer
from peerjax.model import Decoder
from peerjax.objectives.task import drawn_variables

RECIPE = "peer_1m_cpu"
NEEDED = ("gguf", "llama_cpp")


def active_bytes() -> int:
    """Returns the bytes of weights that a token of the recipe reads."""
    config = config_of(RECIPE)
    model = Decoder(model_config(config, Tokenizer.load().vocab_size))
    params = jax.eval_shape(lambda: drawn_variables(model, jax.random.key(0)))["params"]
    embedding = params.pop("embed")["embedding"]  # a token reads one row
    dense = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    experts = config.peer.heads * config.peer.experts_per_head
    of_expert = words_per_expert(config.model.width, config.pool.storage) * 4 + 2 * 4  # and scales
    return dense + embedding.shape[1] * embedding.dtype.itemsize + experts * of_expert


def run(quick: bool) -> Result:
    """Samples from both models in turns.

    Raises:
        ModuleNotFoundError: if llama.cpp is not installed.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is missing: pip install gguf llama-cpp-python")
    rounds, count = (1, 20) if quick else (5, 300)
    num_bytes = active_bytes()

    def sample(workdir: str) -> tuple[list[float], list[dict[str, float]]]:
        ours, theirs = [], []
        for _ in range(rounds):
            printed = _run(
                "sample.py", f"--workdir={workdir}", "--prompt=To be", f"--tokens={count}"
            ).stderr
            ours.append(float(re.search(r"([\d,.]+) tokens/s", printed)[1].replace(",", "")))
            printed = _run("-m", "benchmarks.llama", str(num_bytes / 1e6), str(count)).stdout
            theirs.append(json.loads(printed.splitlines()[-1]))
        return ours, theirs

    ours, theirs = train(RECIPE, 4, inspect=sample)["found"]
    of_llama = [each["tokens_per_second"] for each in theirs]
    medians = statistics.median(ours), statistics.median(of_llama)
    sizes = num_bytes, theirs[0]["bytes"]
    names = f"{RECIPE}, {chosen()}", "Llama, Q4_0, llama.cpp"
    return Result(
        columns=("", "tokens/s", "MB of weights a token"),
        rows=[
            [name, f"{speed:.0f}", f"{size / 1e6:.1f}"]
            for name, speed, size in zip(names, medians, sizes, strict=True)
        ],
        figures=[Figure("tokens/s over those of llama.cpp", medians[0] / medians[1])],
        details={"kernels": identity(), "ours": ours, "llama": theirs},
    )


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
