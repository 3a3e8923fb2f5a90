"""Continues prompts: python sample.py --workdir=runs/quickstart --prompt='To be, or'."""

import json
import sys
from functools import partial
from typing import Any

import jax
from absl import flags

from pallas_kernels.dispatch import describe
from peerjax import script
from peerjax.inference.prompts import check, continue_prompts, encode, read_prompts
from peerjax.inference.sampling import Sampling
from peerjax.inference.trained import Run, open_run, restore
from peerjax.sharding import mesh_of_run

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of train.py.", required=True)
STEP = flags.DEFINE_integer("step", None, "Training step of the checkpoint. Default: the newest.")
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue. An empty prompt begins a document.")
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'File of prompts: one per line, or .jsonl with the field "prompt". Results are JSON lines.',
)
BATCH = flags.DEFINE_integer("batch", 16, "Number of prompts of the file in a batch.", 1)
TOKENS = flags.DEFINE_integer("tokens", 200, "Maximum number of tokens for each prompt.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Sampling temperature. 0 takes the most likely token."
)
TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Sample from the most likely tokens with this total probability."
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed for sampling.")


def main() -> None:
    """Prints the continuation of a prompt while it is generated, or those of a file."""
    sampling = Sampling(TEMPERATURE.value, TOP_P.value, SEED.value)
    check(sampling, TOKENS.value)
    prompts = [PROMPT.value] if PROMPTS.value is None else read_prompts(PROMPTS.value)
    run = open_run(WORKDIR.value, STEP.value)
    print(describe(), file=sys.stderr)
    encode(run, prompts)  # reports a bad prompt before the model is read
    mesh = mesh_of_run(run.config)
    with jax.set_mesh(mesh):
        _continue(run, restore(run, mesh), prompts, sampling)


def _continue(run: Run, variables: Any, prompts: list[str], sampling: Sampling) -> None:
    """Continues prompts on the current mesh, and prints them."""
    if PROMPTS.value is None:
        print(prompts[0], end="", flush=True)
        show = partial(print, end="", flush=True)
        found = continue_prompts(run, variables, prompts, TOKENS.value, sampling, show=show)
        print()
        _tell(found.tokens, found.tokens_per_second)
        return
    for first in range(0, len(prompts), BATCH.value):
        batch = prompts[first : first + BATCH.value]
        found = continue_prompts(run, variables, batch, TOKENS.value, sampling, first)
        for prompt, text in zip(batch, found.texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}), flush=True)
        _tell(found.tokens, found.tokens_per_second)


def _tell(tokens: int, tokens_per_second: float) -> None:
    print(f"{tokens} tokens, {tokens_per_second:,.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    script.run(main)
