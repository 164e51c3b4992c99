"""lm-eval's requests dealt out to ranks in the batches that one process would make of them: the same padding, the same
bits.

Every rank has lm-eval work on all requests, as if it were alone, so that all have all results. Only here are batches
left out, and answers that others found put in their place.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator

from slimlm.ranks import ALONE, Ranks
from slimlm.started import environment

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # its text, tokens of the context and what follows
Answer = tuple[float, bool]  # log-likelihood, and whether greedy sampling would say this
T = TypeVar("T")


class DealtCollator(Collator):
    """lm-eval's order of requests, by length, of which each rank gets every so-manieth batch."""

    def __init__(self, requests: Sequence[Request], ranks: Ranks, **how: Hashable) -> None:
        super().__init__(requests, **how)
        self.ranks = ranks
        self.mine: list[int] = []  # of the sorted requests

    def get_batched(self, n: int = 1, batch_fn: Callable[..., int] | None = None) -> Iterator[Sequence[Request]]:
        """This rank's batches, longest first, so that all have long ones and short ones."""
        start = 0
        for number, batch in enumerate(super().get_batched(n, batch_fn)):
            if number % self.ranks.size == self.ranks.rank:
                self.mine += range(start, start + len(batch))
                yield batch
            start += len(batch)

    def get_original(self, answers: list[T]) -> list[T | None]:
        """Everybody's answers, in order of the requests, from this rank's, in order of its batches."""
        order = self._reorder_indices
        if self._group_by != "contexts":  # where requests share a context it holds those answered here, else all
            order = [order[place] for place in self.mine]
        self.ranks.note("requests", len(answers))
        found: list[T | None] = [None] * len(self)
        for part in self.ranks.gather(list(zip(order, answers, strict=True))):
            for index, answer in part:
                found[index] = answer
        return found


class DealtLM(HFLM):
    """lm-eval's model where several ranks have one each; inside `dealt` they answer together.

    answer: what answers a batch of rolling windows, while there are any.
    """

    ranks: Ranks = ALONE
    answer: Callable[[Sequence[Request]], list[Answer]] | None = None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Its windows are batched in order, across requests: once to answer this rank's batches, then again with all
        answers."""
        own: list[list[Answer] | None] = []

        def compute(batch: Sequence[Request]) -> list[Answer]:
            is_mine = len(own) % self.ranks.size == self.ranks.rank
            own.append(HFLM._loglikelihood_tokens(self, batch, override_bs=len(batch)) if is_mine else None)
            return own[-1] or [(0.0, False)] * len(batch)

        try:
            self.answer = compute
            super().loglikelihood_rolling(requests, disable_tqdm)
            self.ranks.note("requests", sum(len(answers) for answers in own if answers))
            found = iter([next(filter(None, answers)) for answers in zip(*self.ranks.gather(own), strict=True)])
            self.answer = lambda batch: next(found)
            totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.answer = None
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self.answer:
            return self.answer(requests)
        answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return answers

    def collator(self, requests: Sequence[Request], **how: Hashable) -> Collator:
        """What makes batches: of a batch that is one rank's already, no more of them."""
        return Collator(requests, **how) if self.answer else DealtCollator(requests, self.ranks, **how)


@contextmanager
def dealt(model: DealtLM, ranks: Ranks) -> Iterator[None]:
    """Inside, lm-eval has this model make batches for its rank, and takes the process for the only one."""
    before, model.ranks = huggingface.Collator, ranks
    huggingface.Collator = model.collator
    try:
        with environment(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1"):
            yield
    finally:
        huggingface.Collator = before
