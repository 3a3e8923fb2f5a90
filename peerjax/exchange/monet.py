"""Reads and writes Monet models in the layout of the published checkpoints on Hugging Face.

A folder has `config.json`, and `model.safetensors` or the shards that
`model.safetensors.index.json` names. Attention and norms have Llama's names. Each layer adds
`moe`, and the first of each group of `moe_groups` layers adds a `router`. In this module a model is

    {"params": {"embed", "layer_0", .., "final_norm", "head"}, "stats": {"layer_0", ..}}

A layer has "attention_norm", "attention", "feed_forward_norm" and "monet". Each holds the
parameters of its module: `nn.RMSNorm`, `Attention`, and `MonetHD` or `MonetVD`. Some of the latter
have a "router", `MonetRouter`. "stats" has each router's moments. The published layout is that of
dmis-lab/Monet, `modeling_monet.py`.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import unflatten_dict

from peerjax.atomic import make_folder, write_atomically
from peerjax.errors import UserError
from peerjax.exchange.files import named_leaves, write_tensors
from peerjax.routing.running import STATS, Moments

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Default values of the fields of `config.json`.
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "moe_dim": 8,
    "moe_heads": 8,
    "moe_experts": 512,
    "moe_topk": 32,
    "moe_groups": 4,
}
VERTICAL, HORIZONTAL = "vertical", "horizontal"
OTHERS = {"moe_decompose": VERTICAL, "rope_theta": 10_000.0}
# The values that peerjax's layers compute with. Any other value is an error.
FIXED = {
    "model_type": "monet",
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
FLOATS = ("F32", "BF16", "F16", "F64")
# Tensors that do not affect what a model computes.
IGNORED = ("num_batches_tracked", "rotary_emb.inv_freq")


class Place(NamedTuple):
    """The place of a checkpoint's tensor in the tree.

    Attributes:
        shape: shape in the file.
        name: path in the tree, joined by dots.
        own_shape: shape in the tree.
        transposed: whether the file has [out, in] where the tree has [in, out].
    """

    shape: tuple[int, ...]
    name: str
    own_shape: tuple[int, ...]
    transposed: bool = False

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Converts a tensor from the file's form to the tree's, in float32."""
        tensor = tensor.astype(np.float32)
        return (tensor.T if self.transposed else tensor).reshape(self.own_shape)

    def written(self, leaf: Any) -> np.ndarray:
        """Converts a leaf from the tree's form to the file's."""
        flat = np.asarray(leaf).reshape(self.shape[::-1] if self.transposed else self.shape)
        return flat.T if self.transposed else flat


def read_hf(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model.

    Args:
        folder: folder of a downloaded checkpoint, or one that `write_hf` has written.

    Returns:
        The fields of `config.json`, with defaults filled in, and the model. The module docstring
        describes its tree. The arrays are NumPy's, in float32.

    Raises:
        UserError: if a file is missing or damaged, if peerjax does not compute the model, or if
            tensors are missing, misshapen or left over. The message names all such tensors.
    """
    folder = Path(folder)
    config = _complete(_read_json(folder / CONFIG), folder / CONFIG)
    places = layout(config)
    arrays: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        problems: list[str] = []
        for path in _tensor_files(folder):
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"cannot read {path} as safetensors: {error}") from None
            where |= {name: file for name in file.keys() if not name.endswith(IGNORED)}  # noqa: SIM118
        found = {}
        for name, file in where.items():
            description = file.get_slice(name)
            found[name] = tuple(description.get_shape())
            if description.get_dtype() not in FLOATS:
                problems.append(f"{name} is {description.get_dtype()}, not a float")
        problems += _differences(found, {name: place.shape for name, place in places.items()})
        if problems:
            raise UserError(
                f"{folder} does not hold the model that its {CONFIG} describes: "
                + "; ".join(problems)
            )
        for name, place in places.items():
            arrays[place.name] = place.read(where[name].get_tensor(name))
    tree = unflatten_dict(arrays, sep=".")
    for layer in tree[STATS].values():
        for norm in layer["monet"]["router"].values():
            norm["moments"] = Moments(**norm["moments"])
    return config, tree


def write_hf(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    tree: dict[str, Any],
    dtype: str = "float32",
) -> None:
    """Writes a model: the inverse of `read_hf`.

    To load the model with `transformers`, the folder also needs the published
    `modeling_monet.py`. `config` then needs the `auto_map` that points to it.

    Args:
        folder: output folder. It is made if it does not exist, and its files are replaced.
        config: fields of `config.json`, as `read_hf` returns them. Further fields are kept.
        tree: a model as the module docstring describes it. Other leaves of "stats" are left out.
        dtype: type of the tensors, "float32" or "bfloat16".

    Raises:
        UserError: if peerjax does not compute the model of `config`, if leaves of the tree are
            missing, misshapen or left over, or if the folder cannot be made or written to. The
            message names all such leaves.
    """
    folder = Path(folder)
    config = _complete({**FIXED, **config}, "the configuration")
    places = layout(config)
    expected = {place.name: place.own_shape for place in places.values()}
    leaves = {
        name: leaf
        for name, leaf in named_leaves(tree).items()
        if name in expected or not name.startswith(f"{STATS}.")
    }
    problems = _differences({name: np.shape(leaf) for name, leaf in leaves.items()}, expected)
    if problems:
        raise UserError(
            "the tree is not the model that the configuration describes: " + "; ".join(problems)
        )
    make_folder(folder)
    tensors: dict[str, np.ndarray] = {}
    for name, place in places.items():
        tensors[name] = place.written(leaves[place.name]).astype(jnp.dtype(dtype))
        if name.endswith("running_var"):
            count = name.removesuffix("running_var") + "num_batches_tracked"
            tensors[count] = np.zeros((), np.int64)
    described = {**config, "architectures": ["MonetForCausalLM"], "torch_dtype": dtype}
    write_tensors(folder / SINGLE, tensors, {"format": "pt"})
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, text)


def layout(config: dict[str, Any]) -> dict[str, Place]:
    """Returns the places of all tensors of a checkpoint that peerjax reads, by name in the file.

    Args:
        config: all fields of `config.json`.
    """
    width, heads, vocabulary = (
        config[name] for name in ("hidden_size", "num_attention_heads", "vocab_size")
    )
    places = {
        "model.embed_tokens.weight": _same("params.embed.embedding", vocabulary, width),
        "model.norm.weight": _same("params.final_norm.scale", width),
        "lm_head.weight": Place(
            (vocabulary, width), "params.head.kernel", (width, vocabulary), transposed=True
        ),
    }
    into = (width, heads, width // heads)
    kernels = {
        "q_proj": ("query", into),
        "k_proj": ("key", into),
        "v_proj": ("value", into),
        "o_proj": ("out", (heads, width // heads, width)),
    }
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{index}", f"params.layer_{index}"
        for name, own in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "feed_forward_norm"),
        ):
            places[f"{theirs}.{name}.weight"] = _same(f"{ours}.{own}.scale", width)
        for name, (own, own_shape) in kernels.items():
            places[f"{theirs}.self_attn.{name}.weight"] = Place(
                (width, width), f"{ours}.attention.{own}.kernel", own_shape, transposed=True
            )
        for name, own, shape in _expert_tensors(config):
            places[f"{theirs}.moe.{name}"] = _same(f"{ours}.monet.{own}", *shape)
        if index % config["moe_groups"] == 0:
            places |= _router_places(config, index)
    return places


def _expert_tensors(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns the name in the file, name in the layer and shape of all expert tensors."""
    width, n = config["hidden_size"], config["moe_experts"]
    hidden, out = n * config["moe_dim"], width
    sides, values = [""], ["v"]
    if config["moe_decompose"] == VERTICAL:
        hidden, out = hidden // 2, width // 2
        sides, values = ["1", "2"], ["v11", "v12", "v21", "v22"]
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for side in sides:
        tensors.append((f"u{side}.weight", f"u{side}", (hidden, width)))
        tensors.append((f"u{side}.bias", f"c{side}", (hidden,)))
        tensors.append((f"b{side}", f"b{side}", (n, out)))
    return tensors + [(f"{value}.weight", value, (out, hidden)) for value in values]


def _router_places(config: dict[str, Any], index: int) -> dict[str, Place]:
    heads, theirs = config["moe_heads"], f"model.layers.{index}.router"
    places = {}
    for side in ("1", "2"):
        places[f"{theirs}.w{side}.weight"] = _same(
            f"params.layer_{index}.monet.router.w{side}",
            heads * config["moe_experts"],
            config["hidden_size"],
        )
        for name, own in (("running_mean", "mean"), ("running_var", "variance")):
            path = f"{STATS}.layer_{index}.monet.router.norm{side}.moments.{own}"
            places[f"{theirs}.norm{side}.{name}"] = Place((heads,), path, (1, heads, 1))
    return places


def _same(name: str, *shape: int) -> Place:
    return Place(shape, name, shape)


def _complete(config: dict[str, Any], source: Any) -> dict[str, Any]:
    """Fills in missing fields, and stops with an error if peerjax does not compute the model."""
    config = {**SIZES, **OTHERS, **FIXED, "model_type": None, **config}
    problems = [
        f"{name}={config[name]!r} is not a positive number"
        for name in SIZES
        if type(config[name]) is not int or config[name] < 1
    ]
    problems += [
        f"{name}={config[name]!r}, where peerjax has {value!r} only"
        for name, value in FIXED.items()
        if config[name] != value
    ]
    if config["moe_decompose"] not in (HORIZONTAL, VERTICAL):
        problems.append(f"moe_decompose={config['moe_decompose']!r} is not known")
    if not problems:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        if config.get("num_key_value_heads") not in (None, heads):
            problems.append(f"num_key_value_heads is not num_attention_heads={heads}")
        if width % (2 * heads):
            problems.append(f"hidden_size={width} is not divisible by 2 * {heads} attention heads")
        if config["moe_decompose"] == VERTICAL and config["moe_dim"] % 2:
            problems.append(f"moe_dim={config['moe_dim']} is odd, and cannot be halved")
        if config["moe_topk"] > config["moe_experts"]:
            problems.append(f"moe_topk={config['moe_topk']} is more than moe_experts")
    if problems:
        raise UserError(
            f"{source} does not describe a model that peerjax reads: " + "; ".join(problems)
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}")
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{folder / INDEX} has no weight_map that names files")
    return [folder / name for name in sorted(set(shards.values()))]


def _differences(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> list[str]:
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name} {list(shape)} is missing")
        elif found[name] != shape:
            problems.append(f"{name} is {list(found[name])}, not {list(shape)}")
    return problems + [f"{name} has no place" for name in found if name not in expected]
