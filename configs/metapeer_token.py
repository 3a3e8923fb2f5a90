"""The quickstart's sizes with 16 metaexperts of 4,096 experts, which every token chooses from.

Ten domains of text, which need `pip install '.[text,domains]'`, take equal parts of the training
rows.
"""

from configs import quickstart

DOMAINS = (
    "speeches",
    "drama",
    "code",
    "encyclopedia",
    "french",
    "spanish",
    "diseases",
    "cloud",
    "life_science",
    "licences",
)


def get_config():
    config = quickstart.get_config()
    config.steps = 2000  # 8.2 million tokens
    config.data.domains = DOMAINS
    config.data.weights = tuple((domain, 1.0) for domain in DOMAINS)
    config.data.tokenizer = "bpe_8192"
    config.data.sequence_length = 1024
    config.data.batch_size = 4
    config.model.layers = (("dense", 1), ("metapeer", 2), ("dense", 1))
    config.metapeer.metaexperts = 16
    # A token uses as many experts as in the quickstart: 2 metaexperts, 2 heads, 8 experts each.
    config.peer.num_experts = (64, 64)
    config.peer.heads = 2
    config.peer.query_norm = "layernorm"
    config.eval.every = 500
    return config
