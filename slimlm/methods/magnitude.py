"""Magnitude pruning (Han et al., arXiv 1506.02626): the smallest |w| of each matrix go. It needs no data."""

from slimlm.methods.prune import pruning

MAGNITUDE = pruning(
    "set the smallest weights of each matrix to zero; needs no data",
    "https://arxiv.org/abs/1506.02626",
)
