"""slimlm's own pruning: second-order masks, refined by swaps, with all kept weights solved for together.

The mask starts as SparseGPT's (arXiv 2301.00774); the update is the exact minimiser on the final mask, as in OBC (arXiv
2208.11580), aimed at what the dense model computes rather than at what the layer did itself (`methods/repair.py`).
"""

from slimlm.methods.prune import pruning

SLIMLM = pruning(
    "second-order masks refined by swaps, kept weights solved jointly towards the dense model: loses least",
    "https://arxiv.org/abs/2301.00774",
)
