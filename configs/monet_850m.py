"""Monet's 850M model: 853,501,440 parameters with a vocabulary of 32,000, 512^2 experts a layer.

Park et al., arXiv:2412.04139, table 6. The decomposition is horizontal. The flag
`--config.model.layers="(('monet_vd', 24),)"` makes it vertical, with the same size.
"""

from peerjax.config import default_config


def get_config():
    config = default_config()
    config.steps = 100_000
    config.data.sequence_length = 2048
    config.data.batch_size = 256
    config.model.width = 1536
    config.model.layers = (("monet_hd", 24),)
    config.model.heads = 12
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.monet.num_experts = 512**2
    config.monet.expert_width = 12
    config.monet.heads = 6
    config.monet.top_k = 32
    config.monet.group = 4
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.eval.every = 5000
    config.eval.rows = 128
    config.checkpoint.every = 1000
    return config
