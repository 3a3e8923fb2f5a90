"""Writes a Llama of random weights as GGUF, and samples from it by llama.cpp.

    python -m benchmarks.llama MEGABYTES TOKENS

The output is JSON. It needs the packages gguf and llama-cpp-python.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, LAYERS, HEADS, VOCABULARY = 256, 6, 4, 4096
TYPE = "Q4_0"  # 4.5 bits a weight
BITS = 4.5


def hidden_width(num_bytes: float) -> int:
    """Returns the feed-forward width at which a token reads `num_bytes` of weights."""
    weights = num_bytes * 8 / BITS
    others = LAYERS * 4 * WIDTH**2 + VOCABULARY * WIDTH  # attention, and the output matrix
    hidden = (weights - others) / (LAYERS * 3 * WIDTH)
    return max(32, round(hidden / 32) * 32)  # the format packs 32 weights together


def write(path: Path, hidden: int) -> int:
    """Writes the model, and returns the bytes of the matrices that a token reads."""
    import gguf

    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[TYPE]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"t{n}".encode() for n in range(VOCABULARY - 3))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    types = gguf.TokenType
    writer.add_token_types(
        [types.UNKNOWN, types.CONTROL, types.CONTROL, *[types.NORMAL] * (VOCABULARY - 3)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    read = 0

    def add(name: str, *shape: int, counts: bool = True) -> None:
        nonlocal read
        values = rng.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        read += packed.nbytes if counts else 0

    add("token_embd.weight", VOCABULARY, WIDTH, counts=False)  # a token reads one row
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}.weight", WIDTH, WIDTH)
        add(f"{block}.ffn_gate.weight", hidden, WIDTH)
        add(f"{block}.ffn_up.weight", hidden, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, hidden)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    add("output.weight", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def measure(num_bytes: float, count: int) -> dict[str, float]:
    """Samples `count` tokens, and returns tokens a second and the bytes that each reads."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.gguf"
        read = write(path, hidden_width(num_bytes))
        model = llama_cpp.Llama(str(path), n_ctx=1024, verbose=False, seed=0)
        model.eval([1])
        start = time.perf_counter()
        for _ in range(count):
            model.eval([model.sample(temp=0.8, top_p=0.95, top_k=0)])
        seconds = time.perf_counter() - start
    return {"tokens_per_second": count / seconds, "bytes": read}


if __name__ == "__main__":
    print(json.dumps(measure(1e6 * float(sys.argv[1]), int(sys.argv[2]))))
