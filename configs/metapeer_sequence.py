"""`metapeer_token.py` with a choice for each chunk of a document, made from the text before it."""

from configs import metapeer_token


def get_config():
    config = metapeer_token.get_config()
    config.metapeer.choice = "sequence"
    config.metapeer.chunk = 32  # introductions of articles have about 400 characters
    return config
