"""Retrieval by product keys: the best pairs of two sets of sub-keys, and their scores.

Expert (i, j) of N1 * N2 has number i * N2 + j and score s1_i + s2_j.
"""

from pallas_kernels.product_keys.api import pair_scores, scores_at, top_k_pairs

__all__ = ["pair_scores", "scores_at", "top_k_pairs"]
