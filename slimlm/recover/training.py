"""Training of all of a model's weights at once, towards a teacher beside it.

Masters and sums are fp32; products are bf16 where the device has instructions for it. What is zero in a matrix stays
zero. Windows that nothing learns from say how good the weights are, each kind of text counting the same; the best there
were stay, and those that came in are among them. A step's windows are dealt out in lanes (`deal.py`), so that 1, 2 and
4 ranks come to the same bits; everything a process needs to go on is kept whenever the weights are judged.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.deal import Deal, Parts, Sum
from slimlm.device import products_in, training_dtype
from slimlm.errors import RunFailure
from slimlm.linalg.likelihood import divergence
from slimlm.linalg.softmax import cosine
from slimlm.model.linears import canonical
from slimlm.progress import Progress
from slimlm.ranks import Ranks
from slimlm.recover.losses import StreamLoss, text_loss
from slimlm.recover.low_rank import adapt
from slimlm.recover.optimizers import Adam, Changed, Named, Optimizer
from slimlm.recover.teacher import Teacher, at_once
from slimlm.recover.text import Numbers, Text

WARM_UP = 0.05  # of all steps
LARGEST_NORM = 1.0  # of all gradients together
JUDGED = 8  # times that held-out windows are looked at on the way
PATIENCE = 3  # of them in a row that may each be no better than the one before
TIMED = 2  # steps that say how long one takes, after a first one


@dataclass(frozen=True)
class Schedule:
    """How to train. size: windows of a step. rate: the highest learning rate. is_kl: towards the teacher's predictions,
    or else the text's tokens. rank: of what is added to matrices, where not all of their numbers are to change.
    optimizer: of parameters by name."""

    steps: int
    size: int
    rate: float
    seed: int
    is_kl: bool = True
    rank: int = 0
    optimizer: Callable[[Changed], Optimizer] = Adam


@dataclass
class State:
    """Where a training stands. step: done so far. best_step: after which the best weights were. history: step, loss
    since the one before, and of every kind of held-out windows the divergence, each time that these were looked at.
    latest: mean of those divergences the last time. worse: how often in a row it was no better than the one before."""

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    latest: float = math.inf
    worse: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Training:
    """A student in fp32, which is changed, beside its teacher.

    stays: parameters of which some rows are not to be changed, or, where none are named, all. matrices: linears, which
    alone are changed where the schedule says by what rank. streams: what their streams count for, if anything. best:
    what is changed as it was best, by name; linears' as [out, in].
    """

    def __init__(
        self, student: PreTrainedModel, teacher: Teacher, text: Text, schedule: Schedule, ranks: Ranks,
        stays: Mapping[str, list[int]] | None = None, matrices: Collection[str] = (), streams: StreamLoss | None = None,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.text, self.schedule, self.ranks = student, teacher, text, schedule, ranks
        self.device, self.dtype = student.device, training_dtype(student.device)
        self.streams = streams
        student.requires_grad_(False)
        stays = stays or {}
        self.named = [name for name, _ in student.named_parameters() if stays.get(name) != []]
        masks = {name: one == 0 for name in self.named if (one := student.get_parameter(name)).dim() > 1}
        self.zeros = sum(int(mask.sum()) for mask in masks.values())
        for name in stays.keys() & masks.keys():
            masks[name][stays[name]] = True
        self.fixed = {name: mask for name, mask in masks.items() if mask.any()}
        if schedule.rank:
            self.named = [f"{name}.weight" for name in matrices if f"{name}.weight" in self.named]
            self.changed = adapt(
                student, [name.removesuffix(".weight") for name in self.named], schedule.rank, schedule.seed
            )
        else:
            self.changed = {name: student.get_parameter(name).requires_grad_(True) for name in self.named}
        self.optimizer = schedule.optimizer(self.changed)
        self.best: dict[str, Tensor] = {}
        self.state = State()

    def run(self, keep: Callable[[], None], progress: Progress) -> None:
        """Train to the end, or until held-out text only gets worse. keep: called when there is something to lose.

        What a large rate forgets at first comes back as it falls: a run on its way back goes on, however far from the
        best it still is.
        """
        state, steps = self.state, self.schedule.steps
        every = -(-steps // JUDGED)
        if not state.history:
            self._judge([], progress, 0.0)
        losses, start = list[float](), time.perf_counter()
        while state.step < steps and state.worse < PATIENCE:
            try:
                losses.append(self._step())
            except ValueError as error:  # of M-FAC, which cannot make a step; the best weights are there
                progress.line(f"training ends after step {state.step}: {error}")
                break
            progress.step()
            if state.step % every == 0 or state.step == steps:
                self._judge(losses, progress, time.perf_counter() - start)
                keep()
                losses, start = [], time.perf_counter()

    def seconds(self) -> tuple[float, float]:
        """Of a step, and of judging; nothing is changed."""
        self._gradients(0)  # the first of a process is slow
        start = time.perf_counter()
        for step in range(TIMED):
            self._gradients(step)
        done = time.perf_counter()
        self._divergences()
        return (done - start) / TIMED, time.perf_counter() - done

    @torch.no_grad()
    def go_on(self, state: State, weights: Named, best: Named, memory: Mapping[str, Named]) -> None:
        """From where another process was, with its weights, [...] each, and what its optimizer remembered."""
        self.state, self.best = state, dict(best)
        for name, one in self.changed.items():
            one.copy_(weights[name])
        self.optimizer.go_on(state.step, memory)

    def _step(self) -> float:
        """The loss before it."""
        state, how = self.state, self.schedule
        loss, gradients = self._gradients(state.step)
        rate = how.rate * min(1.0, (state.step + 1) / (WARM_UP * how.steps)) * cosine(state.step / how.steps)
        for (name, one), gradient in zip(self.changed.items(), gradients, strict=True):
            one.grad = gradient.masked_fill_(self.fixed[name], 0) if name in self.fixed else gradient
        nn.utils.clip_grad_norm_(self.changed.values(), LARGEST_NORM)
        self.optimizer.update(rate)
        for one in self.changed.values():
            one.grad = None
        state.step += 1
        return loss

    def _gradients(self, step: int) -> tuple[float, list[Tensor]]:
        """The loss of a token of a step's windows, and its gradients."""
        schedule, changed, length = self.schedule, [*self.changed.values()], self.text.tokens.shape[1]
        numbers = self.text.of_step(step, schedule.size, schedule.seed)
        deal, own = Deal(self.ranks, len(numbers)), list[tuple[float, int]]()
        parts = Parts(deal, partial(Sum, changed))
        self.ranks.note("windows", len(deal.mine))
        # Streams say sooner what to do than predictions, and are worth less than these in the end.
        streams = self.streams and replace(self.streams, weight=self.streams.weight * cosine(step / schedule.steps))
        for lane in deal.own_lanes:
            for start in deal.lanes[lane][:: self._few]:
                some = numbers[start : min(start + self._few, deal.lanes[lane].stop)]
                part = parts.at(start - deal.mine.start)  # which adds up lanes that are done
                with torch.enable_grad():
                    loss = self._loss(some, schedule.is_kl, streams)
                    found = torch.autograd.grad(loss / (len(numbers) * length), changed, allow_unused=True)
                part.add(found)
                own.append((float(loss.detach()), len(some) * length))
                del loss, found
        shared = parts.shared()
        assert shared is not None
        return self.ranks.mean(own), shared.tensors()

    @cached_property
    def _few(self) -> int:
        return at_once(self.student.config, self.text.tokens.shape[1])

    def _loss(self, numbers: Numbers, is_kl: bool, streams: StreamLoss | None = None) -> Tensor:
        """Of some windows, summed over tokens."""
        tokens, looks = self.text.tokens[numbers].to(self.device, torch.int64), streams is not None
        with products_in(self.device, self.dtype):
            found = self.student(input_ids=tokens, use_cache=False, output_hidden_states=looks)
            said = self.teacher(numbers, tokens, looks) if is_kl or looks else None
        loss = divergence(found.logits, said.predictions) if said and is_kl else text_loss(found.logits, tokens)
        return loss + streams(found.hidden_states or (), said.states) if said and streams else loss

    def _judge(self, losses: Sequence[float], progress: Progress, seconds: float) -> None:
        """Look at held-out windows, and take the weights if they are the best. losses, seconds: of the steps since the
        last time. Raises RunFailure where the models diverge by no finite number from the start."""
        state, found = self.state, self._divergences()
        now = sum(found.values()) / len(found)
        state.worse = 0 if now < state.latest else state.worse + 1
        state.latest = now
        if now < state.best:
            state.best, state.best_step = now, state.step
            self.best = {name: canonical(self.student, name).clone() for name in self.named}
        if not self.best:
            raise RunFailure(f"the model and its teacher diverge by {now} on held-out text: one of them is broken")
        if not math.isfinite(now):
            state.worse = PATIENCE
        facts = {f"held out {name}": value for name, value in found.items()}
        if losses:
            facts = {"loss": sum(losses) / len(losses), **facts}
        state.history.append(
            {"step": state.step, **{name: value for name, value in facts.items() if math.isfinite(value)}}
        )
        progress.done("recovering", f"step {state.step} of {self.schedule.steps}", seconds, **facts)

    @torch.no_grad()
    def _divergences(self) -> dict[str, float]:
        """From the teacher, of a token of each kind of held-out windows, in nats."""
        found = dict[str, float]()
        for name, numbers in self.text.held.items():
            batches, own = numbers.split(self._few), list[tuple[float, int]]()
            for batch in Deal(self.ranks, len(batches)).pick(batches):
                own.append((float(self._loss(batch, True)), len(batch) * self.text.tokens.shape[1]))
            found[name] = self.ranks.mean(own)
        return found
