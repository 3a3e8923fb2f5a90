"""The fused lookup, which computes the weighted sum of chosen experts from ids, gates and x."""

from pallas_kernels.expert_lookup.api import lookup

__all__ = ["lookup"]
