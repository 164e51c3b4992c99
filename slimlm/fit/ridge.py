"""The ridge regression, for all ranks, of data that the first one has."""

import math

from torch import Tensor

from slimlm.linalg.regression import Regression, Rows
from slimlm.linalg.ridge import GUESS, Fit, chosen_strength, fitted
from slimlm.ranks import ALONE, Ranks


def ridge(
    data: Regression, prior: Tensor, metric: Tensor | None = None, guess: float = GUESS, ranks: Ranks = ALONE
) -> Fit:
    """argmin_W sum ||y - W x||^2 + lambda ||W - prior||^2 with lambda chosen on held-out tokens. prior: [out, in];
    metric: [out, out], in which their errors count.

    Hoerl & Kennard 1970, shrunk towards the prior instead of zero. lambda is searched downhill from `guess` on a random
    projection of the outputs. Where the fit does not lower the held-out error it is the prior that stays, so that error
    never grows. Once chosen, lambda serves a fit to all tokens. Where a strength leaves the system numerically singular
    it is no choice. Uses `data` up.

    Returns the weight in the prior's precision, or fp32 where that is coarser.
    """
    if ranks.first:
        data.centre(prior.T)
    else:
        data.prior = prior.T
    strength = ranks.decided(lambda: chosen_strength(data, metric, guess))
    if math.isfinite(strength) and (ranks.first or isinstance(data.held, Rows)):
        data.join()  # of wide inputs every rank looks at its tokens again
    fit = fitted(data, prior, strength) if ranks.first else None
    return Fit(ranks.once(fit.weight if fit else None), ranks.decided(lambda: fit.strength if fit else math.inf))
