"""Optimal Brain Compression (Frantar et al., arXiv 2208.11580, algorithms 1 and 2).

In each row the weight goes whose loss costs least, and all others move to make up for it, one weight after another with
exact downdates of the row's inverse; rows then compete for how many go. Slow for wide layers: cubic in a row's
inputs, for every row.
"""

from slimlm.methods.prune import pruning

OBC = pruning(
    "prune weight after weight, greedily and with exact second-order updates; slow",
    "https://arxiv.org/abs/2208.11580",
)
