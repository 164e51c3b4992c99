"""WoodFisher (Singh & Alistarh, arXiv 2004.14340) and oBERT (Kurtic et al., arXiv 2203.07259): as `mfac`, with the
Fisher information between 64 neighbouring weights of a row only, over the whole model.
"""

from slimlm.methods.prune import pruning

WOODFISHER = pruning(
    "as mfac, with Fisher information in blocks of neighbouring weights",
    "https://arxiv.org/abs/2004.14340",
)
