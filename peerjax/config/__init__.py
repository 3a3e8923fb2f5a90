"""The configuration of a run: its fields, their validation, and the model that they describe."""

from peerjax.config.build import (
    exchange_of,
    feed_forwards,
    implementation_of,
    model_config,
    pool_parts_of,
)
from peerjax.config.checks import DENSE_RULES, MONET, OWN, PLAIN, ROUNDED, SEARCHED, validate
from peerjax.config.fields import (
    config_of_student,
    default_config,
    differences,
    from_json,
    with_fields_of,
)

__all__ = [
    "DENSE_RULES",
    "MONET",
    "OWN",
    "PLAIN",
    "ROUNDED",
    "SEARCHED",
    "config_of_student",
    "default_config",
    "differences",
    "exchange_of",
    "feed_forwards",
    "from_json",
    "implementation_of",
    "model_config",
    "pool_parts_of",
    "validate",
    "with_fields_of",
]
