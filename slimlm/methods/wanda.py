"""Wanda (Sun et al., arXiv 2306.11695, eq. 1): the smallest |w_ij| ||x_j|| of each row go.

||x_j|| is the norm of input j over the calibration tokens, seen by the model as pruned so far.
"""

from slimlm.methods.prune import pruning

WANDA = pruning(
    "set the weights to zero that are smallest times the norm of their input, row by row",
    "https://arxiv.org/abs/2306.11695",
)
