"""Trains the classifier of `digits.py` as a Flax NNX model with packed params.

The params are split from the model and packed. Each forward pass merges them back as floats.

pip install -e '.[examples]' && python -m examples.digits_nnx
"""

from typing import Any

import jax
from flax import nnx

from examples import digits


class Classifier(nnx.Module):
    """A plain NNX model, without any code for packing."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(
            nnx.Linear(n, m, rngs=rngs)
            for n, m in zip(digits.WIDTHS, digits.WIDTHS[1:], strict=False)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


def train(seed: int) -> tuple[float, int]:
    """Trains, and returns the test accuracy and the bytes of weights and optimizer state."""
    model, state = nnx.split(Classifier(nnx.Rngs(seed)), nnx.Param)
    params = digits.pack_matrices(nnx.to_pure_dict(state))

    def forward(floats: Any, x: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf, state)  # traced weights must not stay in `state`
        nnx.replace_by_pure_dict(own, floats)
        return nnx.merge(model, own)(x)

    return digits.train(params, digits.int4_transform(params, seed), forward, seed)


if __name__ == "__main__":
    accuracy, size = train(seed=0)
    print(f"int4, Flax NNX: accuracy {accuracy:.2%}, weights and optimizer state {size:,} bytes")
