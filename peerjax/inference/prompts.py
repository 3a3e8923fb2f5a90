"""Reads, checks and continues prompts, and shows the text while it is generated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peerjax.data.documents import read_text
from peerjax.errors import ConfigError, DataError
from peerjax.inference.sampling import Sampling, generate
from peerjax.inference.trained import Run


class Continued(NamedTuple):
    """The text generated for a batch of prompts.

    Attributes:
        texts: continuation of every prompt, without the prompt.
        tokens: number of sampled tokens, including end-of-text tokens.
        tokens_per_second: speed over the batch, after the first token; 0 if there was no second.
    """

    texts: list[str]
    tokens: int
    tokens_per_second: float


def read_prompts(path: str) -> list[str]:
    """Reads prompts from a file: one per line, or the field "prompt" of each JSON line.

    Raises:
        DataError: if the file is missing, empty or not UTF-8, or a line is not JSON.
    """
    if not Path(path).is_file():
        raise DataError(f"the file of prompts {path!r} does not exist")
    # `splitlines` would also end lines at form feeds and at some characters of JSON strings.
    lines = read_text(Path(path)).replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise DataError(f"the file of prompts {path!r} is empty")
    if not path.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path}, line {number}, is not JSON with a field "prompt"') from None
    return prompts


def check(sampling: Sampling, count: int) -> None:
    """Checks the settings for sampling tokens.

    Raises:
        ConfigError: if a setting is out of range. The message names it.
    """
    if count < 1:
        raise ConfigError(f"tokens={count} is not positive")
    if sampling.temperature < 0:
        raise ConfigError(f"temperature={sampling.temperature} is negative; the minimum is 0")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p={sampling.top_p} is not in (0, 1]")


def encode(run: Run, prompts: Sequence[str]) -> list[list[int]]:
    """Returns prompts as token ids. An empty prompt is the beginning of a document.

    Raises:
        DataError: if a prompt is not UTF-8 text, or is so long that no token can follow it.
    """
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the prompt is not UTF-8 text (character {error.start} cannot be read)"
            ) from None
    encoded = [
        [token for tokens in run.tokenizer.encode([[prompt]]) for token in tokens.tolist()]
        for prompt in prompts
    ]
    longest = run.config.model.max_length
    for number, row in enumerate(encoded, 1):
        if len(row) >= longest:
            raise DataError(
                f"prompt {number} has {len(row)} tokens, and model.max_length={longest} allows no "
                "further token; shorten the prompt"
            )
    return encoded


def continue_prompts(
    run: Run,
    variables: dict[str, Any],
    prompts: Sequence[str],
    count: int,
    sampling: Sampling,
    first_prompt: int = 0,
    show: Callable[[str], None] | None = None,
) -> Continued:
    """Continues prompts in one batch, each until its document ends or has the model's length.

    Args:
        run: the run of the model.
        variables: the variables of the model.
        prompts: the texts to continue; see `encode`.
        count: maximum number of tokens for each prompt; fewer if the model's length is reached.
        sampling: settings for sampling tokens.
        first_prompt: number of the first prompt; the next prompts have the next numbers. Random
            draws depend on them.
        show: called with the continuation of the first prompt, piece by piece.
    """
    encoded = encode(run, prompts)
    limits = [min(count, run.config.model.max_length - len(each)) for each in encoded]
    ends = run.tokenizer.ends
    drawn: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    stream = run.tokenizer.stream()
    shown, start, steps = "", time.perf_counter(), 0
    for tokens in generate(run.model, variables, encoded, max(limits), sampling, first_prompt):
        if not steps:
            start = time.perf_counter()  # do not time compilation
        steps += 1
        for row, token in enumerate(tokens.tolist()):
            if not ended[row]:
                drawn[row].append(token)
                ended[row] = token in ends or len(drawn[row]) == limits[row]
        if show is not None and not ended[0]:
            piece = stream(drawn[0][-1])
            shown += piece
            show(piece)
        if all(ended):
            break
    seconds = time.perf_counter() - start
    texts = [run.tokenizer.decode(each) for each in drawn]
    if show is not None:
        show(texts[0][len(shown) :])  # bytes that do not form a whole character
    speed = (steps - 1) * len(prompts) / seconds if steps > 1 else 0.0
    return Continued(texts, sum(map(len, drawn)), speed)
