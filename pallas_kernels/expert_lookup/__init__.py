"""The fused lookup: ids, gates and x in, the weighted sum of the chosen experts out."""

from pallas_kernels.expert_lookup.api import lookup

__all__ = ["lookup"]
