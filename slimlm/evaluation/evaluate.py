"""`slimlm eval`: perplexity on fixed windows and lm-eval tasks, for one model or for two on identical input."""

import gc
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.manifest import read_manifest, versions
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.resolve import BUNDLED_CONTEXT, ResolvedModel, resolve_model
from slimlm.checkpoint.skeleton import BUILDING, load_config, load_tokenizer, parameter_count, use_only_known
from slimlm.device import check_precision, machine, placement
from slimlm.errors import UserError, one_line, out_of_memory, require_at_least
from slimlm.evaluation.by_block import has_no_room, measure_by_block
from slimlm.evaluation.harness import load_task_manager, run_tasks, task_scores
from slimlm.evaluation.perplexity import measure_perplexity
from slimlm.evaluation.tasks import DEFAULT_TASKS, TASKS_PATH
from slimlm.evaluation.text import DEFAULT_WINDOW, TestWindows, load_test_windows
from slimlm.meeting import start_ranks
from slimlm.progress import LogProgress, Progress
from slimlm.ranks import Ranks
from slimlm.settings import EvalSettings, by_name

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `data` is JSON-ready: windows, tasks, settings, versions, and one entry per model."""

    data: dict[str, Any]

    @property
    def models(self) -> list[dict[str, Any]]:
        """The entries of `data`, one per model."""
        models: list[dict[str, Any]] = self.data["models"]
        return models


@by_name(EvalSettings)
@out_of_memory("lower --batch-size or --window, or spread the model with --device-map auto")
def evaluate(settings: EvalSettings) -> Evaluation:
    """Measure `model`, and `against` on the very same windows and questions.

    text: a .txt file, or None for the Python language reference. num_windows None takes all of it. window None takes
    the length the model was compressed with, else its context up to 2048. tasks: () for none. device_map: "auto"
    spreads a model over several GPUs. token, cache_dir: for models on the hub, as `from_pretrained` takes them. Several
    processes share the work, and all get the result. Raises UserError for models, texts or tasks that cannot be used,
    before any work.
    """
    check_precision()
    with start_ranks(settings.device) as ranks:
        return _evaluate(settings, ranks)


def _evaluate(settings: EvalSettings, ranks: Ranks) -> Evaluation:
    progress = settings.progress or (LogProgress() if ranks.first else Progress())
    settings = _checked(settings, ranks)
    resolved = _resolved(settings)
    windows = _shared_windows(resolved, settings, _window_length(resolved, settings))
    tasks = settings.tasks or ()
    manager = load_task_manager(tasks) if tasks else None
    entries = [_measure(entry, windows, manager, settings, ranks, progress) for entry in resolved]
    return Evaluation(
        {
            "models": entries,
            "windows": windows.describe(),
            "tasks": {"names": list(tasks), "limit": settings.limit, "num_fewshot": settings.num_fewshot},
            "batch_size": settings.batch_size,
            "machine": machine(ranks.device),
            "ranks": ranks.account(),
            "versions": versions(),
        }
    )


def _checked(settings: EvalSettings, ranks: Ranks) -> EvalSettings:
    """The settings with tasks and a device by name. Raises UserError for what cannot be."""
    if settings.device_map and ranks.size > 1:
        raise UserError("--device-map is for one process, and here each has the whole model on a device of its own")
    require_at_least(1, num_windows=settings.num_windows, batch_size=settings.batch_size)
    require_at_least(2, window=settings.window)
    require_at_least(0, num_fewshot=settings.num_fewshot)
    if settings.dtype not in DTYPES:
        raise UserError(f"--dtype {settings.dtype!r} is none of {', '.join(DTYPES)}")
    if settings.limit is not None and settings.limit <= 0:
        raise UserError(f"--limit {settings.limit:g}: give a number of questions, or a share of them, above 0")
    tasks = DEFAULT_TASKS if settings.tasks is None else tuple(settings.tasks)
    if settings.stream and (tasks or settings.device_map):
        raise UserError("--stream is for perplexity on one device: add --tasks none, and leave out --device-map")
    return replace(settings, tasks=tasks, device=str(ranks.device))


def _resolved(settings: EvalSettings) -> list[ResolvedModel]:
    """The model, and the one to compare with. Raises UserError for what is no whole checkpoint."""
    wanted = [(settings.model, settings.revision), (settings.against, settings.against_revision)]
    access, trust = Access(settings.token, settings.cache_dir), settings.trust_remote_code

    def accept(path: Path) -> None:
        load_config(path, trust)

    resolved = [resolve_model(name, version, accept, trust, access) for name, version in wanted if name is not None]
    for entry in resolved:
        Checkpoint(entry.path)
    return resolved


def _window_length(resolved: list[ResolvedModel], settings: EvalSettings) -> int:
    """Raises UserError for windows beyond what the models take."""
    configs = [load_config(entry.path, settings.trust_remote_code) for entry in resolved]
    length = settings.window or default_window(resolved[0], configs[0])
    context = min(getattr(config, "max_position_embeddings", length) for config in configs)
    if length > context:
        raise UserError(f"--window {length} is beyond the models' context of {context} tokens")
    return length


def default_window(resolved: ResolvedModel, config: PretrainedConfig) -> int:
    """Tokens per window when none are asked for."""
    manifest = read_manifest(resolved.path)
    recipe = (manifest.get("recipe") if manifest else None) or {}
    length = {**recipe, **(recipe.get("steps") or [{}])[-1]}.get("max_seq_length")
    if isinstance(length, int):
        return length
    if resolved.origin == "bundled":
        return BUNDLED_CONTEXT
    return min(DEFAULT_WINDOW, getattr(config, "max_position_embeddings", DEFAULT_WINDOW))


def _shared_windows(models: list[ResolvedModel], settings: EvalSettings, length: int) -> TestWindows:
    """The same windows for all models. Raises UserError when their tokenizers disagree."""
    tokenizers = [load_tokenizer(model.path, settings.trust_remote_code) for model in models]
    found = [load_test_windows(settings.text, tokenizer, settings.num_windows, length) for tokenizer in tokenizers]
    for model, windows in zip(models[1:], found[1:], strict=True):
        if not torch.equal(windows.tokens, found[0].tokens):
            raise UserError(
                f"{models[0].name} and {model.name} tokenise the test text differently: "
                "their perplexities cannot be compared"
            )
    return found[0]


def _measure(
    resolved: ResolvedModel,
    windows: TestWindows,
    manager: "TaskManager | None",
    settings: EvalSettings,
    ranks: Ranks,
    progress: Progress,
) -> dict[str, Any]:
    start = time.perf_counter()
    gc.collect()  # hooks that spread the model before over GPUs are in a cycle with it
    is_streamed = settings.stream or has_no_room(resolved.path, settings, ranks)
    if is_streamed:
        likelihood, model = measure_by_block(resolved.path, windows.tokens, settings, ranks, progress)
    else:
        progress.stage(f"perplexity of {resolved.name}", -(-windows.tokens.shape[0] // ranks.size))
        model = load_model(resolved.path, settings)
        likelihood = measure_perplexity(model, windows.tokens, settings.batch_size, progress.step, ranks)
    checkpoint = Checkpoint(resolved.path)
    use_only_known(checkpoint, model)
    entry: dict[str, Any] = {
        "name": resolved.name,
        "path": str(resolved.path),
        "revision": resolved.revision,
        "parameters": parameter_count(model),
        "bytes": checkpoint.bytes_on_disk(),
        "streamed": is_streamed,
        **likelihood.describe(),
        "tasks": {},
    }
    if manager is not None:
        progress.stage(f"tasks of {resolved.name}", 1)
        tokenizer = load_tokenizer(resolved.path, settings.trust_remote_code)
        found = run_tasks(model, tokenizer, manager, settings, ranks)
        entry["tasks"] = task_scores(found["results"])
        entry["task_versions"] = found["versions"]
        entry["task_samples"] = {task: counts["effective"] for task, counts in found.get("n-samples", {}).items()}
        entry["lm_eval_command"] = lm_eval_command(resolved, settings)
        progress.step()
    entry["seconds"] = round(time.perf_counter() - start, 3)
    return entry


def load_model(path: Path, settings: EvalSettings) -> PreTrainedModel:
    """The whole model through stock transformers. Raises UserError unless every weight is found in the checkpoint."""
    try:
        with BUILDING:
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
                device_map=settings.device_map or placement(torch.device(settings.device)),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded by transformers: {one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise UserError(
                f"{path}: transformers reports {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:3]}"
            )
    return model.eval()


def lm_eval_command(resolved: ResolvedModel, settings: EvalSettings) -> str:
    """The lm-eval call that gives the same task scores, ready for a shell."""
    arguments = [f"pretrained={resolved.path}", f"dtype={settings.dtype}"]
    arguments += ["parallelize=True"] if settings.device_map else []
    arguments += ["trust_remote_code=True"] if settings.trust_remote_code else []
    words = ["lm_eval", "--model", "hf", "--model_args", ",".join(arguments), "--tasks", ",".join(settings.tasks or ())]
    words += ["--include_path", str(TASKS_PATH), "--batch_size", str(settings.batch_size)]
    words += [] if settings.device_map else ["--device", settings.device]
    words += [] if settings.limit is None else ["--limit", repr(settings.limit)]
    words += [] if settings.num_fewshot is None else ["--num_fewshot", str(settings.num_fewshot)]
    return shlex.join(words)
