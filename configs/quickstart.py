"""About five minutes on two CPU cores: a small decoder with two PEER layers, on real text."""

from peerjax.config import default_config


def get_config():
    config = default_config()
    config.steps = 500
    config.model.layers = (("dense", 1), ("peer", 2), ("dense", 1))
    # Retrieval follows the stream, which is all one direction while unigrams are learnt: a slow
    # start and batch normalisation keep the experts in use.
    config.peer.query_norm = "batchnorm"
    config.optimizer.warmup_steps = 150
    # `python -m benchmarks int4_quality` tunes them.
    config.optimizer.learning_rate = 1e-2
    config.pool.learning_rate = 3e-2
    config.eval.every = 125
    return config
