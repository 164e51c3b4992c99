"""Models measured one after another, each beside the dense one where memory has room for both."""

import gc
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.checkpoint.resolve import ResolvedModel
from slimlm.checkpoint.skeleton import build_skeleton, parameter_count, use_only_known
from slimlm.evaluation.account import Samples, dense_figures
from slimlm.evaluation.by_block import has_no_room, is_streamable, measure_by_block
from slimlm.evaluation.generation import Writing, continuations
from slimlm.evaluation.harness import QUESTIONS, run_tasks
from slimlm.evaluation.loading import load_model
from slimlm.evaluation.questions import kept_of
from slimlm.evaluation.subjects import Subject
from slimlm.evaluation.tasks import TASKS_PATH
from slimlm.evaluation.text import TestWindows
from slimlm.evaluation.tokens import measure_tokens
from slimlm.progress import Progress
from slimlm.ranks import Ranks
from slimlm.settings import EvalSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BATCH = 8  # windows at a time
TASKS, WRITING = 2.0, 1.0  # times what all texts cost


@dataclass(frozen=True)
class Plan:
    """What is measured of each model: texts; tasks, where a manager knows any; and what it is to write, if anything."""

    settings: EvalSettings
    texts: Sequence[TestWindows]
    manager: "TaskManager | None"
    writing: Writing | None

    @property
    def batch_size(self) -> int:
        """Windows at a time."""
        return self.settings.batch_size if isinstance(self.settings.batch_size, int) else BATCH


@dataclass
class Measuring:
    """In which all models are measured in one way, told by the largest before any is loaded: each whole beside the
    dense one; or, where memory has no room for that, block by block; or each by itself, where it cannot go by block.

    earlier: what was measured of the dense model before, in its place.
    """

    plan: Plan
    models: Sequence[Subject]
    dense: Subject | None
    ranks: Ranks
    progress: Progress
    earlier: Samples | None = None
    loaded: PreTrainedModel | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        settings, dense = self.plan.settings, [] if self.dense is None else [self.dense]
        largest = max(self.models, key=lambda one: one.checkpoint.elements)
        self.fits_alone = bool(settings.device_map) or (self._has_room([largest]) and self._has_room(dense))
        self.fits_beside = bool(settings.device_map) or self._has_room([largest, *dense])
        can_stream = all(is_streamable(one, settings) for one in [*self.models, *dense])
        self.streamed = settings.stream or (not self.fits_beside and can_stream)

    def _has_room(self, subjects: Sequence[Subject]) -> bool:
        if not subjects:
            return True
        window = max((text.tokens.shape[1] for text in self.plan.texts), default=0)
        logits = self.plan.batch_size * window * max(one.vocabulary for one in subjects)
        return not has_no_room(subjects, self.ranks, logits)

    @property
    def writes(self) -> bool:
        """Whether models are to write, and can."""
        return self.plan.writing is not None and self.fits_alone

    @property
    def notes(self) -> list[str]:
        """What was asked for, or is usual, and was not done."""
        asks = self.plan.settings.generate and self.plan.settings.against is not None
        lines = ["models write nothing: they go by block"] if asks and not self.writes else []
        if self.dense is not None and self.plan.texts and not all(map(self._is_beside, self.models)):
            lines.append("no KL: models could not be had side by side, or have other vocabularies")
        if self.earlier is not None:
            name, silent = self.earlier.facts["name"], self.earlier.written is None and self.writes
            lines.append(
                f"{name} is taken from samples, which hold no logits: no KL, no same top token, and nothing of how "
                "likely it finds what others write"
            )
            lines += [f"no comparison of what models write: the samples have nothing that {name} wrote"] * silent
        return lines

    def work(self, subject: Subject) -> dict[str, float]:
        """What each stage of measuring a model costs, in windows of text; of tasks and prompts by rule of thumb."""
        windows, name = max(1.0, sum(len(text.tokens) for text in self.plan.texts)), subject.resolved.name
        is_known = subject is self.dense and any(map(self._is_beside, self.models))
        work = {} if is_known else {f"perplexity of {name}": windows * (1 + self._is_beside(subject))}
        work |= {f"tasks of {name}": TASKS * windows} if self.plan.manager is not None else {}
        return work | ({f"{name} writes": WRITING * windows} if self.writes else {})

    def measured(self, subject: Subject) -> Samples:
        """A model; beside what it makes of tokens, where both can be had at once, what the dense one does."""
        samples = self._measured(subject, self.dense if self._is_beside(subject) else None)
        gc.collect()  # hooks that spread a model over GPUs are in a cycle with it
        torch.cuda.empty_cache()
        return samples

    def of_dense(self, others: Sequence[Samples]) -> Samples | None:
        """The dense model, whose figures are put beside those of others where they do not stand there yet."""
        samples = self.earlier
        if self.dense is not None:
            known = [dense_figures(one) for one in others if one.has_dense]
            samples = self._measured(self.dense, None, known[0] if known else None)
        if samples is None:
            return None
        for other in others:
            if not other.has_dense:
                both = {name: [one, samples.figures[name]] for name, one in other.figures.items()}
                other.figures = {name: torch.cat(pair, dim=1) for name, pair in both.items()}
        return samples

    def _is_beside(self, subject: Subject) -> bool:
        """Whether the dense model goes beside it: both fit, or go by block, and know the same tokens."""
        return (
            self.dense is not None
            and subject.vocabulary == self.dense.vocabulary
            and (self.streamed or self.fits_beside)
        )

    def _measured(self, subject: Subject, beside: Subject | None, figures: dict[str, Tensor] | None = None) -> Samples:
        """figures: those of texts, where they are known."""
        start = time.perf_counter()
        samples = Samples(self._facts(subject), figures or {})
        pair = [subject, *([] if beside is None else [beside])]
        model: PreTrainedModel | None = None
        if figures is None and not self.streamed:
            model = self._model(subject)
            samples.figures = self._figures(model, beside, subject.resolved.name)
        elif figures is None:
            how = self.plan.settings, self.plan.batch_size, self.ranks, self.progress
            samples.figures = {text.name: measure_by_block(pair, text.tokens, *how) for text in self.plan.texts}
        if self.plan.manager is not None or self.writes:
            self._whole(subject, samples, model or self._model(subject), None if self.streamed else beside)
        samples.facts["seconds"] = round(time.perf_counter() - start, 3)
        return samples

    def _facts(self, subject: Subject) -> dict[str, Any]:
        checkpoint, resolved = subject.checkpoint, subject.resolved
        skeleton = build_skeleton(subject.config, subject.dtype, self.plan.settings.trust_remote_code)
        use_only_known(checkpoint, skeleton)
        return {
            "name": resolved.name,
            "path": str(resolved.path),
            "revision": resolved.revision,
            "parameters": parameter_count(skeleton),
            "bytes": checkpoint.bytes_on_disk(),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "streamed": self.streamed,
        }

    def _model(self, subject: Subject) -> PreTrainedModel:
        if subject is not self.dense or self.streamed or not self.fits_beside:
            return load_model(subject.path, self.plan.settings)
        self.loaded = self.loaded or load_model(subject.path, self.plan.settings)
        return self.loaded

    def _figures(self, model: PreTrainedModel, beside: Subject | None, name: str) -> dict[str, Tensor]:
        texts, size = self.plan.texts, self.ranks.size
        dense = None if beside is None else self._model(beside)
        self.progress.stage(f"perplexity of {name}", sum(-(-len(text.tokens) // size) for text in texts))
        how = self.plan.batch_size, self.progress.step, self.ranks
        return {text.name: measure_tokens(model, dense, text.tokens, *how) for text in texts}

    def _whole(self, subject: Subject, samples: Samples, model: PreTrainedModel, beside: Subject | None) -> None:
        """What needs a whole model in memory: tasks, and writing."""
        settings, name = self.plan.settings, subject.resolved.name
        if self.plan.manager is not None:
            self.progress.stage(f"tasks of {name}", 1)
            samples.found = kept_of(run_tasks(model, subject.tokenizer, self.plan.manager, settings, self.ranks))
            samples.facts["lm_eval_command"] = lm_eval_command(subject.resolved, settings)
            self.progress.step()
        if self.plan.writing is not None and self.writes:
            self.progress.stage(f"{name} writes", 1)
            judge = model if subject is self.dense else None if beside is None else self._model(beside)
            samples.written = continuations(model, judge, subject.tokenizer, self.plan.writing, self.ranks)
            self.progress.step()


def lm_eval_command(resolved: ResolvedModel, settings: EvalSettings) -> str:
    """The lm-eval call that gives the same task scores, ready for a shell."""
    arguments = [f"pretrained={resolved.path}", f"dtype={settings.dtype}"]
    arguments += ["parallelize=True"] if settings.device_map else []
    arguments += ["trust_remote_code=True"] if settings.trust_remote_code else []
    words = ["lm_eval", "--model", "hf", "--model_args", ",".join(arguments), "--tasks", ",".join(settings.tasks or ())]
    words += ["--include_path", str(TASKS_PATH), "--batch_size", str(settings.batch_size or QUESTIONS)]
    words += [] if settings.device_map else ["--device", settings.device]
    words += [] if settings.limit is None else ["--limit", repr(settings.limit)]
    words += [] if settings.num_fewshot is None else ["--num_fewshot", str(settings.num_fewshot)]
    words += ["--apply_chat_template"] if settings.apply_chat_template else []
    words += [] if settings.system_instruction is None else ["--system_instruction", settings.system_instruction]
    words += [] if settings.gen_kwargs is None else ["--gen_kwargs", settings.gen_kwargs]
    words += [] if settings.seed is None else ["--seed", str(settings.seed)]
    return shlex.join(words)
