"""Continues prompts: python sample.py --workdir=runs/quickstart --prompt='To be, or'."""

import json
import sys
from functools import partial

import jax
from absl import flags

from peerjax import script
from peerjax.inference.prompts import check, continue_prompts, encode, read_prompts
from peerjax.inference.sampling import Sampling
from peerjax.inference.trained import open_run, restore
from peerjax.sharding import make_mesh

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of train.py.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the newest by default.")
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty begins a document.")
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'A file of prompts, one a line, or .jsonl with "prompt"; answers as JSON lines.',
)
BATCH = flags.DEFINE_integer("batch", 16, "How many prompts of the file go together.", 1)
TOKENS = flags.DEFINE_integer("tokens", 200, "At most so many tokens for each prompt.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.")
TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the likeliest tokens of this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> None:
    """Shows the continuation of a prompt as it grows, or writes those of a file."""
    sampling = Sampling(TEMPERATURE.value, TOP_P.value, SEED.value)
    check(sampling, TOKENS.value)
    prompts = [PROMPT.value] if PROMPTS.value is None else read_prompts(PROMPTS.value)
    run = open_run(WORKDIR.value, STEP.value)
    encode(run, prompts)  # what is wrong with any prompt is told before the model is read
    variables = restore(run, make_mesh(jax.local_devices()[:1]))
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
