"""M-FAC (Frantar et al., arXiv 2107.03356), static: pruning by the Fisher information of per-token gradients.

Every row of every matrix is a block of the Fisher matrix. A weight's score is w^2 / (2 [F^-1]_pp), weights of the whole
model compete, and those that stay take the sum of the optimal brain surgeon's steps. The gradients are the dense
model's, at tokens drawn from its own predictions (`--fisher-labels text` for the paper's empirical Fisher).
"""

from slimlm.methods.prune import pruning

MFAC = pruning(
    "prune what the Fisher information of token gradients says costs least, over the whole model",
    "https://arxiv.org/abs/2107.03356",
)
