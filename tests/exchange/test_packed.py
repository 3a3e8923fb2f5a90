"""Packed parameters leave and come back bit by bit, or leave as floats."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from pallas_kernels.storage import STORAGES, read_codes
from peerjax import exchange, optim
from peerjax.errors import UserError
from peerjax.exchange import files
from peerjax.exchange.files import Parts
from peerjax.pool import initialize_pool
from tests.elsewhere import python
from tests.exchange.on_devices import tree


def make_pool(storage, layers=2):
    return initialize_pool(jax.random.key(0), layers, 37, 64, storage=storage)


def make_tree():
    matrix = jax.random.normal(jax.random.key(1), (3, 5, 20))
    return {
        "pools": {storage: make_pool(storage) for storage in STORAGES},
        "layers": [
            {"w": optim.pack(matrix), "b": jnp.arange(3.0)},
            {"w": optim.pack(jnp.ones((2, 8)), "int8")},
        ],
        "step": jnp.int32(7),
    }


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_round_trip_is_bit_equal(tmp_path):
    tree, path = make_tree(), tmp_path / "tree.safetensors"
    exchange.save(path, tree)
    assert_same(exchange.restore(path, tree), tree)
    found = exchange.load(path)
    assert_same(found["pools.int4"], tree["pools"]["int4"])
    assert_same(found["layers.0.w"], tree["layers"][0]["w"])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


NUMBERS = [
    np.array([1 / 3, 1e300]),
    np.array(2**40 + 5),
    np.array([2**64 - 1], np.uint64),
    np.array([[1, -2.5, 3e-39]], jnp.bfloat16),
    np.array([1 / 3], np.float16),
    np.zeros((0, 3), np.float32),
    np.array([True, False]),
    np.arange(6, dtype=">i4").reshape(2, 3).T,
    3,
    2**40 + 5,
    1 / 3,
    True,
]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_of_any_width_come_back_bit_by_bit(tmp_path, number):
    tree, path = {"a": number, "w": optim.pack(jnp.ones((2, 8)))}, tmp_path / "a.safetensors"
    expected = np.asarray(number).astype(np.asarray(number).dtype.newbyteorder("="))
    exchange.save(path, tree)
    exchange.save_floats(tmp_path / "floats.safetensors", tree)
    for found in (
        exchange.restore(path, tree)["a"],
        exchange.load(path)["a"],
        exchange.load(tmp_path / "floats.safetensors")["a"],
    ):
        assert isinstance(found, np.ndarray if expected.dtype.name.endswith("64") else jax.Array)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.asarray(found).tobytes() == expected.tobytes()


def test_types_that_do_not_come_back_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for leaf, name in [
        (jax.random.key(0), "key<fry>"),
        ("text", "str"),
        (1j, "complex128"),
        (2**70, "object"),
        (jnp.ones(2, jnp.float8_e4m3fn), "float8_e4m3fn"),
        (jnp.ones(2, jnp.int4), "int4"),
    ]:
        for write in (exchange.save, exchange.save_floats):
            with pytest.raises(UserError, match=f"'a' is of type {name}.*, which cannot be read"):
                write(path, {"a": leaf})
    assert not any(tmp_path.iterdir())
    safetensors.numpy.save_file({"a": np.ones(2, jnp.float8_e5m2)}, path)
    with pytest.raises(UserError, match="cannot read .*: 'a' is of type F8_E5M2, which NumPy"):
        exchange.load(path)


def test_another_tool_can_read_codes_by_what_the_file_says(tmp_path):
    pool, path = make_pool("int4"), tmp_path / "pool.safetensors"
    exchange.save(path, {"p": pool})
    words = safetensors.numpy.load_file(path)["p.codes"].view(np.uint32)
    with safetensors.safe_open(path, framework="numpy") as file:
        fields = json.loads(file.metadata()["peerjax"])["p"]
        assert "from bit b (c div W) upwards" in file.metadata()["layout"]
    width = fields["width"]
    per_vector = width * 4 // 32
    experts = words.reshape(2, -1, 2, per_vector)[:, : fields["num_experts"]]
    column = np.arange(width)
    raw = (experts[..., column % per_vector] >> (4 * (column // per_vector)).astype(np.uint32)) & 15
    codes = np.where(raw > 7, raw.astype(int) - 16, raw.astype(int))
    expected = [read_codes(pool.weights, jnp.int32(i), jnp.arange(37), 64, "int4") for i in (0, 1)]
    np.testing.assert_array_equal(codes, expected)


def test_floats_are_codes_times_scales(tmp_path):
    tree, path = make_tree(), tmp_path / "floats.safetensors"
    exchange.save_floats(path, tree, experts_at_once=10)
    found = safetensors.numpy.load_file(path)
    pool = tree["pools"]["int8"]
    codes = np.stack(
        [read_codes(pool.weights, jnp.int32(i), jnp.arange(37), 64, "int8") for i in (0, 1)]
    )
    expected = codes * np.asarray(pool.scales).transpose(0, 2, 1)[..., None]
    np.testing.assert_array_equal(found["pools.int8"], expected.astype(np.float32))
    np.testing.assert_array_equal(found["pools.float32"], tree["pools"]["float32"].weights)
    np.testing.assert_array_equal(found["layers.0.w"], tree["layers"][0]["w"].floats())
    exchange.save_floats(path, {"p": make_pool("int4", layers=1)}, dtype=jnp.bfloat16)
    assert exchange.load(path)["p"].dtype == jnp.bfloat16
    exchange.save_floats(path, {"w": tree["layers"][0]["w"]}, dtype=np.float64)
    assert exchange.load(path)["w"].dtype == np.float64


def test_what_does_not_fit_is_named(tmp_path):
    tree, path = {"w": optim.pack(jnp.ones((2, 8))), "b": jnp.ones(3)}, tmp_path / "a.safetensors"
    exchange.save(path, tree)
    with pytest.raises(
        UserError, match=r"'w' is a PackedMatrix of width=8, storage='int4' .* storage='int8'"
    ):
        exchange.restore(path, {**tree, "w": optim.pack(jnp.ones((2, 8)), "int8")})
    with pytest.raises(UserError, match=r"'b' is float32\[3\] in .* but float32\[4\]"):
        exchange.restore(path, {**tree, "b": jnp.ones(4)})
    with pytest.raises(UserError, match=r"a.safetensors has no 'c'"):
        exchange.restore(path, {**tree, "c": jnp.ones(4)})
    with pytest.raises(UserError, match="the tree has no 'b'"):
        exchange.restore(path, {"w": tree["w"]})
    with pytest.raises(UserError, match="two leaves of the tree have the name 'a.b'"):
        exchange.save(path, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    matrix = optim.pack(jnp.ones((2, 8)))
    for tree in ({"w": matrix, "w.codes": jnp.zeros(1)}, {"w.scales": 1.0, "w": matrix}):
        first, second = sorted(tree)
        both = rf"'{first}' and '{second}' of the tree would both be tensor '{second}'"
        with pytest.raises(UserError, match=both):
            exchange.save(path, tree)
    with pytest.raises(UserError, match="'p' and 'p.weights' of the tree would both be tensor"):
        exchange.save(path, {"p": make_pool("float32"), "p.weights": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*a.safetensors as safetensors"):
        exchange.load(path)
    with pytest.raises(UserError, match="cannot read"):
        exchange.load(tmp_path / "missing.safetensors")
    tensors = {"w.scales": np.ones(2, np.float32)}
    kinds = json.dumps({"w": {"kind": "matrix", "width": 8, "bits": 4}})
    safetensors.numpy.save_file(tensors, path, {"peerjax": kinds})
    with pytest.raises(UserError, match="has no tensor 'w.codes', which its metadata names"):
        exchange.load(path)


MATRIX = {"kind": "matrix", "width": 20, "storage": "int4"}
POOL = {"kind": "pool", "storage": "int4", "num_experts": 37, "width": 64}
WORDS, SCALES = np.ones((2, 3), np.int32), np.ones(2, np.float32)
POOL_WORDS, POOL_SCALES = np.ones((5, 128), np.int32), np.ones((2, 37), np.float32)
WHOLE = [(MATRIX, WORDS, SCALES), (POOL, POOL_WORDS, POOL_SCALES)]


def write_by_hand(path, description, codes, scales, main="codes", **metadata):
    tensors = {f"x.{main}": np.array(codes), "x.scales": np.array(scales, order="C")}
    metadata = {"peerjax": json.dumps({"x": description}), **metadata}
    safetensors.numpy.save_file(tensors, path, metadata)


@pytest.mark.parametrize(("description", "codes", "scales"), WHOLE)
def test_files_that_do_not_say_their_layout_version_are_of_the_first(
    tmp_path, description, codes, scales
):
    path = tmp_path / "a.safetensors"
    write_by_hand(path, description, codes, scales)
    found = exchange.load(path)["x"]
    exchange.save(path, {"x": found})
    assert_same(exchange.load(path)["x"], found)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["layout_version"] == "1"
        assert json.loads(file.metadata()["peerjax"]) == {"x": description}
    write_by_hand(path, description, codes, scales, layout_version="2")
    with pytest.raises(UserError, match=r"a.safetensors has layout version 2, and this peerjax"):
        exchange.load(path)


@pytest.mark.parametrize("text", ["[1]", "null", "{", "[" * 100_000])
def test_metadata_that_names_nothing_is_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(1)}, path, {"peerjax": text})
    with pytest.raises(UserError, match=r"a.safetensors has metadata 'peerjax' that is no JSON"):
        exchange.load(path)


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        (1, "described as a matrix or pool"),
        ({"width": 20, "bits": 4}, "described as a matrix or pool"),
        (MATRIX | {"kind": "vector"}, "described as a matrix or pool"),
        (MATRIX | {"kind": ["matrix"]}, "described as a matrix or pool"),
        (MATRIX | {"rows": 2}, r"has the fields \['width', 'storage'\], not .*'rows'"),
        (
            {"kind": "matrix", "width": 20},
            r"has the fields \['width', 'storage'\], not \['width'\]",
        ),
        (
            {"kind": "pool", "storage": "int4"},
            r"has the fields \['storage', 'num_experts', 'width'",
        ),
        (MATRIX | {"width": "20"}, "width='20' is not of type int"),
        (MATRIX | {"width": True}, "width=True is not of type int"),
        (MATRIX | {"width": 0}, "width=0 is not positive"),
        (MATRIX | {"storage": "int5"}, "packed as int8, int4, int3, ternary, not as 'int5'"),
        (MATRIX | {"width": 4096}, r"'x.codes' is int32\[2, 3\], where int32\[2, 512\] belongs"),
        (MATRIX | {"storage": "int8"}, r"'x.codes' is int32\[2, 3\], where int32\[2, 5\] belongs"),
        (POOL | {"storage": "int2"}, "int8, int4, int3, ternary, not as int2"),
        (POOL | {"width": 60}, "a width of 60 does not pack"),
        (POOL | {"width": -64}, "width=-64 is not positive"),
        (
            POOL | {"num_experts": 300},
            r"'x.codes' is int32\[2, 3\], where int32\[38, 128\] belongs",
        ),
    ],
)
def test_descriptions_of_no_packed_leaf_are_refused(tmp_path, description, problem):
    path = tmp_path / "a.safetensors"
    write_by_hand(path, description, WORDS, SCALES)
    with pytest.raises(UserError, match=rf"cannot read 'x' of .*a.safetensors: .*{problem}"):
        exchange.load(path)


@pytest.mark.parametrize(
    ("description", "codes", "scales", "problem"),
    [
        (MATRIX, WORDS.astype(np.float32), SCALES, r"'x.codes' is float32\[2, 3\], where int32"),
        (MATRIX, WORDS.astype(np.int64), SCALES, r"'x.codes' is int64\[2, 3\], where int32"),
        (MATRIX, WORDS, np.ones(5, np.float32), r"'x.scales' is float32\[5\], where float32\[2\]"),
        (MATRIX, WORDS, np.ones(2), r"'x.scales' is float64\[2\], where float32\[2\]"),
        (MATRIX, WORDS[0, 0], SCALES, r"'x.codes' is int32\[\], where int32\[3\]"),
        (POOL, POOL_WORDS[:4], POOL_SCALES, r"'x.codes' is int32\[4, 128\], where int32\[5, 128\]"),
        (POOL, POOL_WORDS[None], POOL_SCALES, r"'x.scales' is .*, where float32\[1, 2, 37\]"),
        (POOL, POOL_WORDS, POOL_SCALES.T, r"'x.scales' is .*, where float32\[2, 37\] belongs"),
    ],
)
def test_tensors_that_are_not_what_is_described_are_refused(
    tmp_path, description, codes, scales, problem
):
    path = tmp_path / "a.safetensors"
    write_by_hand(path, description, codes, scales)
    with pytest.raises(UserError, match=rf"cannot read 'x' of .*a.safetensors: {problem}"):
        exchange.load(path)


def test_float_pools_and_what_is_there_twice(tmp_path):
    path, floats = tmp_path / "a.safetensors", np.ones((37, 2, 64), np.float32)
    write_by_hand(path, POOL | {"storage": "bfloat16"}, floats, SCALES, main="weights")
    with pytest.raises(UserError, match=r"'x.weights' is float32.*, where bfloat16\[37, 2, 64\]"):
        exchange.load(path)
    tensors = {"x.codes": WORDS, "x.scales": SCALES, "x": SCALES}
    safetensors.numpy.save_file(tensors, path, {"peerjax": json.dumps({"x": MATRIX})})
    with pytest.raises(UserError, match=r"a.safetensors has 'x' twice"):
        exchange.load(path)


def test_what_load_would_refuse_is_not_saved(tmp_path):
    pool, matrix = make_pool("int4"), optim.pack(jnp.ones((2, 20)))
    for leaf, problem in [
        (dataclasses.replace(pool, scales=None), r"'x.scales' is object\[\], where float32\[2, 2"),
        (dataclasses.replace(pool, num_experts=300), r"where int32\[2, 38, 128\] belongs"),
        (dataclasses.replace(matrix, scales=matrix.scales[:1]), r"where float32\[2\] belongs"),
    ]:
        with pytest.raises(UserError, match=f"cannot save 'x': .*{problem}"):
            exchange.save(tmp_path / "a.safetensors", {"x": leaf})
    assert not any(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    tree, path = {"b": jnp.ones(3)}, tmp_path / "a.safetensors"
    exchange.save(path, tree)

    def full_disk(file, *rest):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "_write_part", full_disk)
    for write in (exchange.save, exchange.save_floats):
        with pytest.raises(UserError, match=r"cannot write .*a.safetensors .* no space left"):
            write(path, {"b": jnp.zeros(3)})
        assert_same(exchange.restore(path, tree), tree)
        assert [each.name for each in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot write .*no_such_folder/a.safetensors"):
        exchange.save(tmp_path / "no_such_folder" / "a.safetensors", tree)


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", b"\xff" * 64, b"\x08" + bytes(7) + b"{" * 8]
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*a.safetensors as safetensors: [^\n]*$"):
        exchange.load(path)


def test_a_pool_on_several_devices_becomes_the_same_file(tmp_path):
    (tmp_path / "many").mkdir()
    found = python("-m", "tests.exchange.on_devices", str(tmp_path / "many"), devices=4)
    assert not found.returncode, found.stderr
    exchange.save(tmp_path / "packed.safetensors", tree())
    exchange.save_floats(tmp_path / "floats.safetensors", tree())
    for name in ("packed.safetensors", "floats.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    ((_, part), *more) = Parts.of(tree()["pools"].weights).parts()
    assert (part.shape[0], len(more)) == (1, 1)  # a layer at a time
