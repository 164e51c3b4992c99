"""lm-eval's requests dealt out to ranks in the batches that one process would make of them: the same padding, the same
bits.

Every rank has lm-eval work on all requests, as if it were alone, so that all have all results. Only here are batches
left out, and answers that others found put in their place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator

from slimlm.ranks import Ranks
from slimlm.started import environment

Answer = tuple[float, bool]


class DealtCollator(Collator):
    """lm-eval's order of requests, by length, of which this rank gets every so-manieth batch."""

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self.mine: list[int] = []  # of the sorted requests

    def get_batched(self, *args: Any, **kwargs: Any) -> Iterator[Sequence[Any]]:
        """Its batches, longest first, so that all ranks have long ones and short ones."""
        start = 0
        for number, batch in enumerate(super().get_batched(*args, **kwargs)):
            if number % self.ranks.size == self.ranks.rank:
                self.mine += range(start, start + len(batch))
                yield batch
            start += len(batch)

    def get_original(self, answers: list[Any]) -> list[Any]:
        """Everybody's answers, in order of the requests, from this rank's, in order of its batches."""
        order = self._reorder_indices
        if self._group_by != "contexts":  # where requests share a context it holds those answered here, else all
            order = [order[place] for place in self.mine]
        self.ranks.note("requests", len(answers))
        found: list[Any] = [None] * len(self)
        for part in self.ranks.gather(list(zip(order, answers, strict=True))):
            for index, answer in part:
                found[index] = answer
        return found


class DealtLM(HFLM):
    """lm-eval's model where several ranks have one each."""

    def __init__(self, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ranks = ranks
        self.answer: Callable[[Sequence[Any]], list[Answer]] | None = None  # of a batch of rolling windows

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Its windows are batched in order, across requests: once to answer this rank's batches, then again with all
        answers."""
        own: list[list[Answer] | None] = []

        def compute(batch: Sequence[Any]) -> list[Answer]:
            is_mine = len(own) % self.ranks.size == self.ranks.rank
            own.append(self._computed(batch, override_bs=len(batch)) if is_mine else None)
            return own[-1] or [(0.0, False)] * len(batch)

        try:
            self.answer = compute
            super().loglikelihood_rolling(requests, disable_tqdm)
            self.ranks.note("requests", sum(len(answers) for answers in own if answers))
            found = [next(filter(None, answers)) for answers in zip(*self.ranks.gather(own), strict=True)]
            replayed = iter(found)
            self.answer = lambda batch: next(replayed)
            totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.answer = None
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[Answer]:
        if self.answer is not None:
            return self.answer(requests)
        return self._computed(requests, **kwargs)

    def _computed(self, requests: Sequence[Any], **kwargs: Any) -> list[Answer]:
        answers: list[Answer] = super()._loglikelihood_tokens(requests=requests, **kwargs)
        return answers

    def collator(self, *args: Any, **kwargs: Any) -> Collator:
        """What makes batches: of a batch that is one rank's already, no more of them."""
        return Collator(*args, **kwargs) if self.answer else DealtCollator(self.ranks, *args, **kwargs)


@contextmanager
def dealt(model: DealtLM) -> Iterator[None]:
    """Inside, lm-eval has this model make batches for its rank, and takes the process for the only one."""
    before = huggingface.Collator
    huggingface.Collator = model.collator
    try:
        with environment(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1"):
            yield
    finally:
        huggingface.Collator = before
