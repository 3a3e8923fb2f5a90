"""Trains both examples with three seeds; prints accuracies and bytes as JSON."""

import json

from examples import digits, digits_nnx

if __name__ == "__main__":
    of_nnx = [digits_nnx.train(seed) for seed in range(3)]
    print(json.dumps({**digits.compare(seeds=3), "nnx": of_nnx}))
