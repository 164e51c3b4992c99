"""The tokens a run sees: calibration windows, loaded or written by the model itself, and those it is measured on."""

import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.calibration import (
    Windows,
    interleaved,
    is_of_hub,
    load_windows,
    local_files,
    require_known,
    sample_windows,
    say_if_few,
    start_token,
    written_for,
)
from slimlm.checkpoint.journal import Journal
from slimlm.errors import UserError
from slimlm.evaluation.text import TestWindows, load_test_windows
from slimlm.linalg.regression import HELD_EVERY
from slimlm.methods import method_of
from slimlm.model.streamed import StreamedModel
from slimlm.model.whole import whole
from slimlm.progress import Progress
from slimlm.recipe import OF_HUB, SELF, AnyStep, RecoverStep, Source, flag_of
from slimlm.recipe.recovering import OFTEN
from slimlm.recover.text import held_of
from slimlm.resolve import own_beside

GRAM = 16  # tokens of a run that two texts hardly share by chance
TOKENS_PER_INPUT = 10  # of a matrix that is fitted by least squares; with half as many a fit follows its own tokens


def calibration_windows(step: AnyStep, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Windows | None:
    """The windows of a resolved step: [n, time], but for those that the model is to write; None where there are no
    others.

    Raises UserError for tokens that the model does not have.
    """
    assert step.max_seq_length is not None
    length, given = step.max_seq_length, [part for part in step.parts if part[0] != SELF]
    if not given:
        return None
    _require_hub(step, [source for source, _ in given])
    loaded = [load_windows(source, tokenizer, count, length, step.seed, step.meant) for source, count in given]
    if not isinstance(step, RecoverStep):  # which goes through them again
        for own, (_, count) in zip(loaded, given, strict=True):
            say_if_few(own, count)
    windows = interleaved(loaded)
    require_known(windows.tokens, vocabulary, f"calibration data {windows.source!r}")
    return windows


def _require_hub(step: AnyStep, sources: list[str]) -> None:
    """Raises UserError where something is said of datasets on the hub, or of the split of saved ones, and there is none
    of them."""
    paths = {source: Path(source).expanduser() for source in sources}
    of_hub = any(is_of_hub(source, path) for source, path in paths.items())
    saved = any(path.is_dir() and not local_files(source, path) for source, path in paths.items())
    for name in OF_HUB:
        if getattr(step, name) is not None and not of_hub and not (saved and name == "dataset_split"):
            raise UserError(f"{flag_of(name)} is for datasets from the hub, and {', '.join(sources)} is none")


def also_calibrated(test: TestWindows, windows: Windows | None) -> int:
    """How many documents of a text to measure on the given calibration text has, too: at least half of their runs of
    GRAM tokens."""
    if windows is None or not test.documents.numel():
        return 0
    size = min(GRAM, max(1, min(test.tokens.shape[1], windows.tokens.shape[1]) // 8))  # few are cut by windows' ends
    mine, theirs = _runs(test.tokens, size), _runs(windows.tokens, size)
    known, documents = torch.isin(mine, theirs), test.documents[:, size - 1 :]
    shares = (known[documents == number].double().mean() for number in documents.unique())
    return sum(bool(share >= 0.5) for share in shares)


def _runs(tokens: Tensor, size: int) -> Tensor:
    """A number for every run of so many tokens [n, time] that no other run has but by chance: [n, time - size + 1]."""
    factors = torch.randint(-(2**62), 2**62, (size,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    count = tokens.shape[1] - size + 1
    found = torch.zeros(len(tokens), count, dtype=torch.int64)
    for place, factor in enumerate(factors):
        found += tokens[:, place : place + count] * factor
    return found


def beside_given(step: AnyStep, windows: Windows | None) -> AnyStep:
    """The step with as much text of the model's own as its share is of the windows that the given text fills, and as
    lacks for training to see it once and the given no more than often."""
    if windows is None or not step.own_windows or not step.self_share or not isinstance(step.dataset, list):
        return step
    given = len(windows.tokens)
    lacking = step.filled - step.times(given) * given if isinstance(step, RecoverStep) and not step.minutes else 0
    count = max(own_beside(given, step.self_share), lacking)
    return step.model_copy(update={"dataset": [step.dataset[0], Source(source=SELF, windows=count)]})


def evaluation_windows(step: AnyStep, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> TestWindows | None:
    """What a resolved step is measured on: [n, time]; None where it is not to be. Raises UserError for a text that
    cannot be read, and tokens that the model does not have."""
    if not step.measure:
        return None
    assert step.max_seq_length is not None
    windows = load_test_windows(step.eval_text, tokenizer, step.eval_windows, step.max_seq_length)
    require_known(windows.tokens, vocabulary, f"test text {windows.source}")
    return windows


def require_held_out(step: AnyStep, windows: Windows | None) -> None:
    """Raises UserError where there are too few windows to hold some out, and the method does."""
    counts = Counter(windows.of_each if windows else ())
    counts[SELF] += step.own_windows
    judges_each = isinstance(step, RecoverStep)
    least = min(filter(None, counts.values()), default=0) if judges_each else counts.total()
    if method_of(step).holds_out(step) and least < HELD_EVERY:
        of_what = " of a source" if judges_each else ""
        raise UserError(
            f"every {HELD_EVERY}th calibration window is held out and there are {least}{of_what}: raise "
            f"--{'tokens' if judges_each else 'num-calibration-samples'}, give more text, or add "
            f"--{'self-share 0' if judges_each else 'no-refit'}"
        )


def tokens_wanted(step: AnyStep, model: StreamedModel) -> int:
    """To fit the matrices with most inputs from; 0 where nothing is fitted."""
    if isinstance(step, RecoverStep) or not method_of(step).holds_out(step):
        return 0
    return TOKENS_PER_INPUT * model.widest


def said_of_tokens(step: AnyStep, model: StreamedModel, windows: Windows | None) -> list[str]:
    """A line where there are too few to fit from, with the number of given windows that would do."""
    given, wanted = len(windows.tokens) if windows else 0, tokens_wanted(step, model)
    assert step.max_seq_length is not None
    learnt = step.max_seq_length * (given + step.own_windows) * (HELD_EVERY - 1) // HELD_EVERY
    if learnt >= wanted:
        return []
    enough = math.ceil(step.num_calibration_samples * wanted / max(1, learnt))
    return [
        f"{learnt:,} tokens are few to fit matrices of {wanted // TOKENS_PER_INPUT:,} inputs from, and other "
        f"text may lose by it: --num-calibration-samples {enough} would do"
    ]


def said_of_passes(step: AnyStep, windows: Windows | None) -> list[str]:
    """A line where training sees its text so often that it hardly learns from it any more."""
    assert step.max_seq_length is not None
    if not isinstance(step, RecoverStep):
        return []
    kinds = (len(windows.tokens) if windows else 0, step.own_windows)
    learnt = step.max_seq_length * sum(count - held_of(count) for count in kinds)
    times = step.tokens / learnt
    return [
        f"{step.tokens:,} tokens are to be learnt from {learnt:,}, so that each is seen up to {times:.1f} times, and "
        f"more than {OFTEN} teach little: give more text, or lower --tokens"
    ] * (times > OFTEN)


def said_of_test(test: TestWindows | None, count: int) -> list[str]:
    """A line where so many documents that are measured on are calibrated on, too."""
    if not test or not count:
        return []
    number = len(test.documents.unique())
    return [
        f"{count} of the {number} documents to measure on are in the calibration text, too, so that the "
        "result will look better than it is: give another --eval-text"
    ]


def sampled_windows(
    step: AnyStep, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, journal: Journal, progress: Progress
) -> Windows:
    """Self-calibration: the one source that needs the whole model in memory at once. [n, time].

    What an earlier process sampled is in the journal.
    """
    assert step.max_seq_length is not None
    sampled = journal.recall("sampled")
    if sampled:
        return Windows(sampled[1]["tokens"].cpu(), SELF, start_token(tokenizer))
    progress.stage("sampling text", written_for(step.own_windows))
    size = step.own_windows, step.max_seq_length
    windows = sample_windows(whole(model), tokenizer, size, step.seed, progress.step, journal.ranks)
    journal.keep("sampled", {"tokens": windows.tokens})
    return windows
