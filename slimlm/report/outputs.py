"""What every command writes with `--json`, as types: docs/schema/ is made of them, and tests hold output against it."""

from dataclasses import dataclass
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from slimlm.checkpoint.manifest import Manifest
from slimlm.evaluation.generation import Continuation, Habits
from slimlm.evaluation.harness import Score
from slimlm.evaluation.speed.figures import Bench
from slimlm.evaluation.text import TextFigures
from slimlm.inspection import Done, MatrixFigures, ModelFacts
from slimlm.report.expected import Forecasted
from slimlm.report.methods import Methods
from slimlm.report.models import Models
from slimlm.report.recipes import Recipes
from slimlm.slice.candidates import Choice


class Compressed(Manifest):
    """A result: its manifest, and where it is."""

    output_dir: str


class Perplexity(TypedDict):
    """Of one model on one text; the standard error is that over windows."""

    perplexity: float
    log_perplexity: float
    log_perplexity_stderr: float
    bits_per_byte: float | None


class Measured(TypedDict):
    """One model by itself; tasks by name and metric, generation by way of writing. lm_eval_command gives the same
    scores."""

    name: str
    path: str
    revision: str | None
    parameters: int
    bytes: int
    dtype: str
    streamed: bool
    seconds: float
    texts: dict[str, Perplexity]
    tasks: dict[str, dict[str, Score]]
    warnings: list[str]
    generation: dict[str, Habits] | None
    lm_eval_command: NotRequired[str]
    task_versions: NotRequired[dict[str, Any]]
    task_samples: NotRequired[dict[str, int]]


class Clusters(TypedDict):
    """What counts as one draw, and how many of them there are."""

    of: Literal["documents", "windows"]
    count: int


Divergence = TypedDict("Divergence", {"mean": float, "stderr": float | None, "median": float, "p99.9": float})


class TextChange(TypedDict):
    """From the dense model to this one, in nats a token, with paired standard errors. kl: KL(dense || compressed) of
    next-token distributions; same_top: how often both find the same token likeliest."""

    log_perplexity_change: float
    stderr: float | None
    perplexity_ratio: float
    clusters: Clusters
    kl: NotRequired[Divergence]
    same_top: NotRequired[Score]


class TaskChange(TypedDict):
    """Of a metric, with its paired standard error. flips: shares of questions that were lost and won."""

    change: float
    stderr: float | None
    percent_of_dense: float | None
    clusters: NotRequired[int]
    flips: NotRequired[float]
    lost: NotRequired[float]
    won: NotRequired[float]


class Writing(TypedDict):
    """Greedy text beside the dense model's: the share that is the same, the token where others part; and why this
    model's own text counts as collapsed, if it does."""

    same: float
    diverges_at: float | None
    collapsed: list[str]


class LostWindow(TypedDict):
    """change: of log-perplexity, in nats a token."""

    window: int
    document: int
    change: float


class LostQuestion(TypedDict):
    """margin_change: of the right answer's log-likelihood over the best other's, in nats."""

    document: int
    metric: str
    margin_change: float | None
    question: str
    target: str
    answer: str


class Fragile(TypedDict):
    """What was lost most, worst first."""

    texts: dict[str, list[LostWindow]]
    tasks: dict[str, list[LostQuestion]]


class Pair(TypedDict):
    """A model and the dense one."""

    model: str
    against: str
    texts: dict[str, TextChange]
    tasks: dict[str, dict[str, TaskChange]]
    generation: Writing | None
    fragile: NotRequired[Fragile]


class Written(TypedDict):
    """What a model wrote."""

    model: str
    texts: list[Continuation]


class TasksAsked(TypedDict):
    """As lm-eval was asked."""

    names: list[str]
    limit: float | None
    num_fewshot: int | None


class HowMeasured(TypedDict):
    """What decides figures beside models, texts and tasks."""

    batch_size: int | str | None
    dtype: str
    seed: int | None
    apply_chat_template: bool
    system_instruction: str | None
    gen_kwargs: str | None
    generate: int


class Evaluated(TypedDict):
    """models: the dense one last. pairs: of each other one. written: the dense one first. ranks: what each process
    did."""

    models: list[Measured]
    pairs: list[Pair]
    written: list[Written]
    texts: list[TextFigures]
    tasks: TasksAsked
    settings: HowMeasured
    notes: list[str]
    machine: str
    ranks: list[dict[str, Any]]
    versions: dict[str, str]


@dataclass(frozen=True)
class Benched(Bench):
    """And the versions of what decides a figure."""

    versions: dict[str, str]


class Inspected(TypedDict):
    """result: null where slimlm did not make the model; widths: none where it did, but for rotating it."""

    model: ModelFacts
    result: Done | None
    widths: list[Choice]
    matrices: list[MatrixFigures]


class Repacked(TypedDict):
    """Bytes of weights, and where they lie."""

    source: str
    output_dir: str
    bytes_before: int
    bytes_after: int


OUTPUTS: dict[str, Any] = {
    "compress": Compressed,
    "compress-dry-run": Forecasted,
    "rotate": Compressed,
    "recover": Compressed,
    "eval": Evaluated,
    "bench": Benched,
    "inspect": Inspected,
    "pack": Repacked,
    "unpack": Repacked,
    "models": Models,
    "methods": Methods,
    "recipes": Recipes,
}
