"""Converts a published Monet model to a run that can be sampled from and evaluated, and back.

python -m peerjax.exchange.monet_run --read=FOLDER --workdir=runs/monet
python -m peerjax.exchange.monet_run --workdir=runs/monet --write=FOLDER
"""

from __future__ import annotations

import json
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from peerjax.atomic import make_folder, write_atomically
from peerjax.config import default_config, validate
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError
from peerjax.exchange.monet import HORIZONTAL, VERTICAL, read_hf, write_hf
from peerjax.inference.trained import Run, open_run, restore
from peerjax.optim import dequantize
from peerjax.routing.monet import keys_per_side
from peerjax.routing.running import STATS
from peerjax.sharding import make_mesh
from peerjax.stacks import BLOCK, GROUP, stack_key
from peerjax.training.checkpoint import Checkpoints
from peerjax.training.state import PARAMS
from peerjax.training.workdir import folder_of, identity_of_imported, record

KINDS = {HORIZONTAL: "monet_hd", VERTICAL: "monet_vd"}
# Files: the published tokenizer, and the fields of the published `config.json`.
TOKENIZER, PUBLISHED = "tokenizer.json", "monet.json"
# Fields of both configurations, by their published names.
FIELDS = {
    "hidden_size": "model.width",
    "num_attention_heads": "model.heads",
    "max_position_embeddings": "model.max_length",
    "rope_theta": "model.rope_base",
    "moe_dim": "monet.expert_width",
    "moe_heads": "monet.heads",
    "moe_topk": "monet.top_k",
    "moe_groups": "monet.group",
}
# Fields of parts that published models lack, with the values that leave the parts out.
NOT_PUBLISHED = {"model.kv_heads": None, "model.attention_sink": "none", "model.shared_mlp": 0}
STACK = stack_key(0)
DTYPES = ("float32", "bfloat16")


def read_run(source: str, workdir: str, tokenizer: str = "") -> None:
    """Makes a run from a published checkpoint. Its folder appears when it is complete.

    The memory needed is that of the parameters in float32, and a quarter more.

    Args:
        source: folder of the checkpoint, which `peerjax.exchange.monet.read_hf` reads.
        workdir: folder of the run; must not exist yet.
        tokenizer: path of the tokenizer's JSON; by default `tokenizer.json` in `source`. Besides
            the model's vocabulary it may have special tokens that were added later, such as one
            for padding.

    Raises:
        UserError: if the workdir exists or cannot be made, or if the checkpoint or the tokenizer
            cannot be used.
    """
    folder = folder_of(workdir)
    if folder.exists():
        raise ConfigError(f"{folder} already exists; choose another --workdir")
    make_folder(folder.parent)
    words = Tokenizer.load(tokenizer or str(Path(source) / TOKENIZER))
    published, tree = read_hf(source)
    size = published["vocab_size"]
    if words.vocab_size < size or not words.stays_below(size):
        raise ConfigError(
            f"the tokenizer has {words.vocab_size} entries, the model {size}; "
            "name the model's own tokenizer with --tokenizer"
        )
    config = config_of(published)
    validate(config)

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if unfinished.exists():
        unfinished.rmtree()
    unfinished.mkdir(parents=True)
    (unfinished / PUBLISHED).write_text(json.dumps(published, indent=1))
    record(unfinished, config, words, identity_of_imported(words, size))
    with Checkpoints(unfinished, config.checkpoint.keep) as checkpoints:
        checkpoints.save(0, stacked(tree, published["moe_groups"]), next_batch=0)
    unfinished.rename(folder)


def write_run(run: Run, target: str, dtype: str = DTYPES[0]) -> None:
    """Writes the model and tokenizer of a run in the layout of published Monet models.

    Args:
        run: the run and its checkpoint. All its layers must be of one decomposition.
        target: output folder. Files of the same names in it are replaced.
        dtype: type of the tensors, "float32" or "bfloat16".

    Raises:
        ConfigError: if not all layers are Monet layers of one decomposition, or the model has parts
            that the layout lacks.
        UserError: if the folder cannot be made or written to.
    """
    kinds = {kind: name for name, kind in KINDS.items()}
    layers = run.config.model.layers
    if len(layers) != 1 or layers[0][0] not in kinds:
        raise ConfigError(
            f"model.layers={layers}, but a published Monet has layers of one decomposition only"
        )
    for name, value in NOT_PUBLISHED.items():
        if (own := attrgetter(name)(run.config)) != value:
            raise ConfigError(
                f"{name}={own!r}, but a published Monet has no such part; only runs with "
                f"{name}={value!r} can be written"
            )
    (kind, depth), monet = layers[0], run.config.monet
    published = {
        **{name: attrgetter(field)(run.config) for name, field in FIELDS.items()},
        "vocab_size": run.model.config.vocab_size,
        "num_hidden_layers": depth,
        "moe_experts": keys_per_side(monet.num_experts),
        "moe_decompose": kinds[kind],
    }
    if (run.folder / PUBLISHED).exists():
        published = json.loads((run.folder / PUBLISHED).read_text()) | published
    make_folder(target)
    variables = dequantize(restore(run, make_mesh(jax.local_devices()[:1])))
    write_hf(target, published, unstacked(variables, monet.group), dtype)
    write_atomically(epath.Path(target) / TOKENIZER, run.tokenizer.json)


def config_of(published: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the configuration of a published model."""
    config = default_config()
    model = config.model
    config.update_from_flattened_dict({field: published[name] for name, field in FIELDS.items()})
    model.layers = ((KINDS[published["moe_decompose"]], published["num_hidden_layers"]),)
    model.dtype = "float32" if published.get("torch_dtype") in (None, "float32") else "bfloat16"
    config.monet.num_experts = published["moe_experts"] ** 2
    config.data.sequence_length = min(config.data.sequence_length, model.max_length)
    return config


def stacked(tree: dict[str, Any], group: int) -> dict[str, Any]:
    """Converts a model layer by layer to the decoder's variables, and empties the tree.

    Args:
        tree: a model as `peerjax.exchange.monet` describes it.
        group: number of layers that share a router.
    """
    count = sum(name.startswith("layer_") for name in tree[PARAMS])

    def blocks(collection: str, numbers: range) -> dict[str, Any]:
        layers, found = tree[collection], {}
        for number in numbers:
            own = [layers.pop(f"layer_{first + number}") for first in range(0, count, group)]
            found[f"block_{number}"] = jax.tree.map(lambda *leaves: np.stack(leaves), *own)
        return found

    stats = blocks(STATS, range(1))
    groups = blocks(PARAMS, range(group))
    for side in ("1", "2"):
        keys = groups["block_0"]["monet"]["router"][f"w{side}"]
        of_routers = stats["block_0"]["monet"]["router"]
        heads = of_routers[f"norm{side}"]["moments"].mean.shape[2]
        per_head = keys.reshape(len(keys), heads, -1, keys.shape[-1])
        of_routers[f"initial_norm_w{side}"] = np.linalg.norm(per_head, axis=-1)
    return {
        PARAMS: {**tree[PARAMS], STACK: _as_stack(groups, group)},
        STATS: {STACK: _as_stack(stats, group)},
    }


def unstacked(variables: dict[str, Any], group: int) -> dict[str, Any]:
    """Converts the decoder's variables to a model layer by layer: the inverse of `stacked`."""

    def layers(blocks: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, block in blocks.items():
            number = int(name.removeprefix("block_"))
            for index in range(len(jax.tree.leaves(block)[0])):
                layer = jax.tree.map(itemgetter(index), block)
                found[f"layer_{index * group + number}"] = layer
        return found

    params = dict(variables[PARAMS])
    return {
        PARAMS: layers(_blocks(params.pop(STACK))) | params,
        STATS: layers(_blocks(variables[STATS][STACK])),
    }


def _as_stack(blocks: dict[str, Any], group: int) -> dict[str, Any]:
    """Puts the blocks of a group, by name, where the decoder has them."""
    return {GROUP: blocks} if group > 1 else {BLOCK: blocks[f"{BLOCK}_0"]}


def _blocks(stack: dict[str, Any]) -> dict[str, Any]:
    """Returns the blocks of a stack by name: the inverse of `_as_stack`."""
    return stack[GROUP] if GROUP in stack else {f"{BLOCK}_0": stack[BLOCK]}


if __name__ == "__main__":
    from absl import flags

    from peerjax import script

    workdir_flag = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    read_flag = flags.DEFINE_string(
        "read", None, "Folder of a published checkpoint to make the run from."
    )
    write_flag = flags.DEFINE_string("write", None, "Folder to write the run's model to.")
    tokenizer_flag = flags.DEFINE_string(
        "tokenizer", "", "Tokenizer JSON. Default: tokenizer.json in the --read folder."
    )
    step_flag = flags.DEFINE_integer(
        "step", None, "Training step of the checkpoint to write. Default: the newest."
    )
    dtype_flag = flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "Type of the tensors to write.")

    def convert() -> None:
        """Reads or writes a published checkpoint, depending on the flags."""
        workdir = str(workdir_flag.value)
        if (read_flag.value is None) == (write_flag.value is None):
            raise ConfigError(
                "give --read, a folder to make a run from, or --write, a folder to write to"
            )
        if read_flag.value is not None:
            read_run(read_flag.value, workdir, str(tokenizer_flag.value))
            print(f"continue a text: python sample.py --workdir={workdir} --prompt=...")
        else:
            run, target = open_run(workdir, step_flag.value), str(write_flag.value)
            write_run(run, target, str(dtype_flag.value))

    script.run(convert)
