"""A small decoder with two PEER layers, on real text: about five minutes on two CPU cores."""

from peerjax.config import default_config


def get_config():
    config = default_config()
    config.steps = 500
    config.model.layers = (("dense", 1), ("peer", 2), ("dense", 1))
    # While unigrams are learnt, the residual stream has one direction, so queries are alike. A slow
    # warm-up and batch normalisation keep the experts in use.
    config.peer.query_norm = "batchnorm"
    config.optimizer.warmup_steps = 150
    # Tuned by `python -m benchmarks int4_quality`.
    config.optimizer.learning_rate = 1e-2
    config.pool.learning_rate = 3e-2
    config.eval.every = 125
    return config
