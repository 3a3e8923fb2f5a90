"""How many tokens the XLA implementations handle at a time."""

import jax


def tokens_per_chunk(num_chosen: int) -> int:
    """How many tokens, of `num_chosen` experts each, share a chunk on the default backend.

    A CPU wants the experts of a chunk to stay in its caches, and is fast with few tokens.
    An accelerator runs the chunks one after the other, and wants few large ones.
    """
    if jax.default_backend() == "cpu":
        return max(1, 256 // num_chosen)
    return max(1, 65536 // num_chosen)
