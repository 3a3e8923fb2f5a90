"""Checkpoints of Monet come in, compute what PyTorch computes from them, and leave bit by bit."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from peerjax.errors import UserError
from peerjax.exchange.monet import layout, read_hf, write_hf
from peerjax.layers.attention import Attention, AttentionConfig
from peerjax.layers.monet import MonetHDConfig, MonetVDConfig
from peerjax.layers.spec import Context, Sizes

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "moe_dim": 4,
    "moe_heads": 3,
    "moe_experts": 6,
    "moe_topk": 2,
    "moe_groups": 2,
    "rope_theta": 500.0,
}
DECOMPOSITIONS = ("horizontal", "vertical")


def make(decomposition, seed=0):
    """A configuration, and a random tree for it."""
    config = {**SIZES, "moe_decompose": decomposition}
    rng = np.random.default_rng(seed)
    tensors = {
        name: place.read(rng.uniform(0.1, 1, place.shape)) for name, place in layout(config).items()
    }
    tree = {}
    for name, place in layout(config).items():
        node, *path = tree, *place.name.split(".")
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = tensors[name]
    return config, tree


def assert_same(one, other):
    """The same names, and bit-equal arrays; moments are a tuple or a dict."""
    flat, other = (
        {jax.tree_util.keystr(path, simple=True): leaf for path, leaf in leaves}
        for leaves in map(lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0], (one, other))
    )
    assert flat.keys() == other.keys()
    for name, leaf in flat.items():
        assert leaf.dtype == other[name].dtype
        np.testing.assert_array_equal(leaf, other[name])


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_what_is_written_is_read_bit_by_bit(tmp_path, decomposition):
    config, tree = make(decomposition)
    tree["stats"]["layer_0"]["monet"]["router"]["initial_norm_w1"] = np.ones((3, 6), np.float32)
    write_hf(tmp_path / "made", {**config, "bos_token_id": 1}, tree)
    del tree["stats"]["layer_0"]["monet"]["router"]["initial_norm_w1"]
    found_config, found = read_hf(tmp_path / "made")
    assert_same(found, tree)
    assert found_config.items() >= {**config, "bos_token_id": 1, "model_type": "monet"}.items()
    assert {each.name for each in (tmp_path / "made").iterdir()} == {
        "config.json",
        "model.safetensors",
    }

    # Once more, as bfloat16: rounded the first time, the same ever after.
    write_hf(tmp_path / "half", found_config, found, dtype="bfloat16")
    half_config, half = read_hf(tmp_path / "half")
    assert half_config["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), found)
    assert_same(half, rounded)
    write_hf(tmp_path / "again", half_config, half, dtype="bfloat16")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_shards_are_read_as_one_file(tmp_path):
    config, tree = make("vertical")
    write_hf(tmp_path, config, tree)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00003.safetensors": sorted(tensors)[i::3] for i in range(3)}
    for file, names in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(read_hf(tmp_path)[1], tree)

    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model-00001-of-00003.safetensors"):
        read_hf(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index.json is not a JSON object"):
        read_hf(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.ind"):
        read_hf(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config.json as JSON"):
        read_hf(tmp_path)


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    config, tree = make("horizontal")
    write_hf(tmp_path, config, tree)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.layers.1.moe.u.bias"], tensors["model.layers.2.router.norm2.running_var"]
    tensors["lm_head.weight"] = np.zeros((16, 29), np.float32)
    tensors["model.layers.0.moe.b"] = tensors["model.layers.0.moe.b"].astype(np.int32)
    tensors["model.layers.1.router.w1.weight"] = np.zeros((18, 16), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError) as error:
        read_hf(tmp_path)
    said = str(error.value).split(": ", 1)[1].split("; ")
    assert sorted(said) == [
        "lm_head.weight is [16, 29], not [29, 16]",
        "model.layers.0.moe.b is I32, not a float",
        "model.layers.1.moe.u.bias [24] is missing",
        "model.layers.1.router.w1.weight has no place",
        "model.layers.2.router.norm2.running_var [3] is missing",
    ]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors as safetensors"):
        read_hf(tmp_path)


def test_a_tree_or_configuration_that_does_not_fit_is_refused(tmp_path):
    config, tree = make("vertical")
    del tree["params"]["layer_2"]["monet"]["c1"]
    tree["params"]["head"]["kernel"] = np.zeros((16, 28))
    tree["params"]["mlp"] = np.zeros(1)
    with pytest.raises(UserError) as error:
        write_hf(tmp_path, config, tree)
    said = str(error.value).split(": ", 1)[1].split("; ")
    assert sorted(said) == [
        "params.head.kernel is [16, 28], not [16, 29]",
        "params.layer_2.monet.c1 [12] is missing",
        "params.mlp has no place",
    ]
    for change, sentence in (
        ({"hidden_act": "silu"}, "hidden_act='silu', where peerjax has 'relu2' only"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is not num_attention_heads=2"),
        ({"hidden_size": 18}, "hidden_size=18 is not divisible by 2 . 2 attention heads"),
        ({"moe_dim": 3}, "moe_dim=3 is odd"),
        ({"moe_topk": 7}, "moe_topk=7 is more than moe_experts"),
        ({"moe_heads": 0, "moe_topk": "2"}, "moe_heads=0 is not .*; moe_topk='2' is not"),
        ({"moe_decompose": "diagonal"}, "moe_decompose='diagonal' is not known"),
    ):
        with pytest.raises(UserError, match=sentence):
            write_hf(tmp_path, {**config, **change}, tree)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json cannot be used as an output folder"):
        write_hf(tmp_path / "config.json", *make("vertical"))
    with pytest.raises(UserError, match="model_type=None, where peerjax has 'monet' only"):
        read_hf(tmp_path)


def torch_model(torch, decomposition):
    """A decoder whose tensors have the published names, written from the paper's equations."""
    n, m, heads, width = (
        SIZES[key] for key in ("moe_experts", "moe_dim", "moe_heads", "hidden_size")
    )
    linear = torch.nn.Linear

    def zeros(*shape):
        return torch.nn.Parameter(torch.zeros(shape))

    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = (linear(width, heads * n, bias=False) for _ in range(2))
            self.norm1, self.norm2 = (torch.nn.BatchNorm1d(heads, affine=False) for _ in range(2))

        def forward(self, x):
            return [
                self.side(x, w, norm) for w, norm in ((self.w1, self.norm1), (self.w2, self.norm2))
            ]

        def side(self, x, w, norm):
            z = w(x).reshape(-1, heads, n)
            normalised = norm(z)  # channels are heads; tokens and keys are averaged over
            quantile = torch.special.ndtri(torch.tensor(1 - SIZES["moe_topk"] / n))
            least = torch.minimum(normalised.max(-1, keepdim=True).values, quantile)
            g = torch.softmax(z.masked_fill(normalised < least, -torch.inf), dim=-1)
            return g.reshape(*x.shape[:-1], heads, n)

    class Experts(torch.nn.Module):
        """Applies every expert (i, j) by itself."""

        def __init__(self):
            super().__init__()
            if decomposition == "horizontal":
                self.u, self.v = linear(width, n * m), linear(n * m, width, bias=False)
                self.b = zeros(n, width)
                return
            for side in "12":
                setattr(self, f"u{side}", linear(width, n * m // 2))
                setattr(self, f"b{side}", zeros(n, width // 2))
            for name in ("v11", "v12", "v21", "v22"):
                setattr(self, name, linear(n * m // 2, width // 2, bias=False))

        def expert(self, x, i, j):
            def half(name, k):
                size = m if decomposition == "horizontal" else m // 2
                u, rows = getattr(self, name), slice(k * size, (k + 1) * size)
                return torch.relu(x @ u.weight[rows].T + u.bias[rows]) ** 2

            def out(name, k, hidden):
                size = hidden.shape[-1]
                return hidden @ getattr(self, name).weight[:, k * size : (k + 1) * size].T

            if decomposition == "horizontal":
                return out("v", j, half("u", i)) + self.b[j]
            x1, x2 = half("u1", i), half("u2", j)
            left = out("v11", i, x1) + out("v12", i, x2) + self.b1[i]
            right = out("v21", j, x1) + out("v22", j, x2) + self.b2[j]
            return torch.cat([left, right], dim=-1)

        def forward(self, x, g1, g2):
            return sum(
                (g1[..., i] * g2[..., j]).sum(-1, keepdim=True) * self.expert(x, i, j)
                for i in range(n)
                for j in range(n)
            )

    class SelfAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in "qkvo":
                setattr(self, f"{name}_proj", linear(width, width, bias=False))

        def forward(self, x):
            batch, length, _ = x.shape
            count = SIZES["num_attention_heads"]

            def heads_of(projection):
                return projection(x).reshape(batch, length, count, -1).transpose(1, 2)

            q, k, v = map(heads_of, (self.q_proj, self.k_proj, self.v_proj))
            half = q.shape[-1] // 2
            turns = torch.arange(length)[:, None] * SIZES["rope_theta"] ** (
                -torch.arange(half) / half
            )

            def turned(each):
                # Feature i and feature i + half are one complex number.
                pairs = torch.complex(each[..., :half], each[..., half:])
                pairs = pairs * torch.polar(torch.ones_like(turns), turns)
                return torch.cat([pairs.real, pairs.imag], dim=-1)

            mixed = torch.nn.functional.scaled_dot_product_attention(
                turned(q), turned(k), v, is_causal=True
            )
            return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))

    class Layer(torch.nn.Module):
        def __init__(self, index):
            super().__init__()
            self.self_attn, self.moe = SelfAttention(), Experts()
            self.input_layernorm = torch.nn.RMSNorm(width, eps=1e-6)
            self.post_attention_layernorm = torch.nn.RMSNorm(width, eps=1e-6)
            if index % SIZES["moe_groups"] == 0:
                self.router = Router()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.embed_tokens = torch.nn.Embedding(SIZES["vocab_size"], width)
            self.model.layers = torch.nn.ModuleList(map(Layer, range(SIZES["num_hidden_layers"])))
            self.model.norm = torch.nn.RMSNorm(width, eps=1e-6)
            self.lm_head = linear(width, SIZES["vocab_size"], bias=False)

        def forward(self, tokens):
            x = self.model.embed_tokens(tokens)
            for layer in self.model.layers:
                x = x + layer.self_attn(layer.input_layernorm(x))
                normed = layer.post_attention_layernorm(x)
                if hasattr(layer, "router"):
                    gates = layer.router(normed)
                x = x + layer.moe(normed, *gates)
            return self.lm_head(self.model.norm(x))

    return Model().eval()


def logits_of(config, tree, tokens):
    """What our own modules compute from a tree that was read."""
    params, routed = tree["params"], None
    float32 = jnp.dtype("float32")
    batch, length = tokens.shape
    positions = jnp.tile(jnp.arange(length), (batch, 1))
    experts = config["moe_experts"] ** 2
    heads, top_k = config["moe_heads"], config["moe_topk"]
    of_attention = config["num_attention_heads"]
    attention = Attention(
        AttentionConfig(of_attention, of_attention, config["rope_theta"]), 1.0, float32
    )
    layer_type = MonetHDConfig if config["moe_decompose"] == "horizontal" else MonetVDConfig
    monet = layer_type(experts, config["moe_dim"], heads, top_k).module(
        Sizes(config["hidden_size"])
    )
    context = Context(positions=positions, segments=jnp.zeros_like(positions))

    def norm(name, layer, x):
        return nn.RMSNorm().apply({"params": layer[name]}, x)

    x = jnp.asarray(params["embed"]["embedding"])[tokens]
    for index in range(config["num_hidden_layers"]):
        layer = params[f"layer_{index}"]
        normed = norm("attention_norm", layer, x)
        x += attention.apply({"params": layer["attention"]}, normed, context)[0]
        normed = norm("feed_forward_norm", layer, x)
        stats = tree["stats"].get(f"layer_{index}", {"monet": {}})["monet"]
        routed = None if stats else routed
        variables = {"params": layer["monet"], "stats": stats}
        y, routed = monet.apply(variables, normed, context, routed)
        x += y
    return norm("final_norm", params, x) @ params["head"]["kernel"]


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_checkpoint_from_pytorch_gives_the_same_logits(tmp_path, reference, decomposition):
    torch = reference("torch")
    save_file = reference("safetensors.torch").save_file
    torch.manual_seed(0)
    model = torch_model(torch, decomposition)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                uniform = torch.rand(tensor.shape)
                # Variances and scales of norms are positive.
                positive = "running_var" in name or "norm.weight" in name
                tensor.copy_(0.5 + uniform if positive else uniform - 0.5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {**SIZES, "moe_decompose": decomposition, "model_type": "monet"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(SIZES["vocab_size"], (2, 9))
    with torch.no_grad():
        expected = model(tokens).numpy()
    config, tree = read_hf(tmp_path)
    found = jax.jit(lambda tree, tokens: logits_of(config, tree, tokens))(tree, tokens.numpy())
    assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))

    write_hf(tmp_path / "back", config, tree)
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.numpy())
