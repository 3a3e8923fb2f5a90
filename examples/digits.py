"""Trains a classifier with packed int4 weight matrices, and the same one with float32 AdamW.

    pip install -e '.[examples]' && python -m examples.digits

This is plain JAX on scikit-learn's digits. It uses only the transform of peerjax. Matrices are
`PackedMatrix` leaves of the params. Biases stay floats, trained with AdamW.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from peerjax import optim

WIDTHS = (64, 256, 256, 10)
STEPS, BATCH = 1500, 128


def load(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns images in [0, 1] and labels, for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images / 16, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return x.astype(np.float32), y, x_test.astype(np.float32), y_test


def init(seed: int) -> list[dict[str, jax.Array]]:
    """Returns random matrices [in, out] and zero biases."""
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
        for key, n, m in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


def logits(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Applies the network, with float params."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def pack_matrices(params: Any) -> Any:
    """Returns the same tree with its matrices packed."""
    return jax.tree.map(lambda leaf: optim.pack(leaf) if leaf.ndim == 2 else leaf, params)


def int4_transform(params: Any, seed: int) -> optax.GradientTransformation:
    """Returns a transform: `int4_accumulation` for packed matrices, AdamW for everything else.

    The labels are a tree. A function would be called with the gradients, which are all floats.
    """
    of_matrices = optax.chain(
        optax.clip_by_global_norm(1.0),
        optim.int4_accumulation(optax.cosine_decay_schedule(3e-3, STEPS), seed=seed),
    )
    labels = jax.tree.map(
        lambda leaf: "packed" if optim.is_packed_matrix(leaf) else "float",
        params,
        is_leaf=optim.is_packed_matrix,
    )
    rules = {"packed": of_matrices, "float": float_transform()}
    return optax.partition(rules, labels)


def float_transform() -> optax.GradientTransformation:
    """Returns the transform of float params."""
    return optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS), weight_decay=1e-4)


def train(
    params: Any,
    transform: optax.GradientTransformation,
    forward: Callable[[Any, jax.Array], jax.Array],
    seed: int,
) -> tuple[float, int]:
    """Trains, and returns the test accuracy and the bytes of weights and optimizer state.

    Packed params add only the call of `optim.dequantize` to a training step. It returns other
    params unchanged.
    """
    x, y, x_test, y_test = load(seed)

    def loss(floats: Any, rows: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            forward(floats, jnp.asarray(x)[rows]), jnp.asarray(y)[rows]
        )
        return jnp.mean(losses)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(optim.dequantize(params), rows)
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        params, state = step(params, state, rng.integers(0, len(x), BATCH))
    guesses = jnp.argmax(forward(optim.dequantize(params), jnp.asarray(x_test)), axis=-1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    return float(np.mean(np.asarray(guesses) == y_test)), size


def compare(seeds: int = 3) -> dict[str, tuple[float, int]]:
    """Returns the mean accuracy and the bytes of both classifiers."""
    found: dict[str, list[tuple[float, int]]] = {"float32, AdamW": [], "int4": []}
    for seed in range(seeds):
        packed = pack_matrices(init(seed))
        found["int4"].append(train(packed, int4_transform(packed, seed), logits, seed))
        found["float32, AdamW"].append(train(init(seed), float_transform(), logits, seed))
    return {
        name: (float(np.mean([accuracy for accuracy, _ in each])), each[0][1])
        for name, each in found.items()
    }


if __name__ == "__main__":
    for name, (accuracy, size) in compare().items():
        print(f"{name:16} accuracy {accuracy:.2%}  weights and optimizer state {size:,} bytes")
