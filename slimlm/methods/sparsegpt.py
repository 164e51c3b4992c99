"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774, algorithm 1).

Columns are settled from left to right, the mask chosen for 128 at a time (for N:M patterns, a group at a time); what
a pruned weight did is passed on to the columns right of it by the inverse Gram matrix of the inputs.
"""

from slimlm.methods.prune import pruning

SPARSEGPT = pruning(
    "prune by second-order scores from left to right, the columns to come making up for those that went",
    "https://arxiv.org/abs/2301.00774",
)
