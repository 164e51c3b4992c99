"""`slimlm eval`: perplexity on fixed windows and lm-eval tasks, for one model or for two on identical input."""

import gc
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.manifest import read_manifest, versions
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.resolve import BUNDLED_CONTEXT, ResolvedModel, resolve_model
from slimlm.checkpoint.skeleton import BUILDING, load_config, load_tokenizer, use_only_known
from slimlm.device import check_process, machine, pick_device, placement
from slimlm.errors import UserError, one_line, out_of_memory, require_at_least
from slimlm.evaluation.harness import load_task_manager, run_tasks, task_scores
from slimlm.evaluation.perplexity import measure_perplexity
from slimlm.evaluation.tasks import DEFAULT_TASKS, TASKS_PATH
from slimlm.evaluation.text import DEFAULT_WINDOW, TestWindows, load_test_windows
from slimlm.progress import LogProgress, Progress

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


@dataclass(frozen=True)
class _Settings:
    tasks: tuple[str, ...]
    batch_size: int
    dtype: str
    device: torch.device
    device_map: str | None
    limit: float | None
    num_fewshot: int | None
    trust_remote_code: bool


@out_of_memory("lower --batch-size or --window, or spread the model with --device-map auto")
def evaluate(
    model: str,
    against: str | None = None,
    tasks: Sequence[str] = DEFAULT_TASKS,
    text: str | None = None,
    num_windows: int | None = 128,
    window: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    against_revision: str | None = None,
    progress: Progress | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
) -> Evaluation:
    """Measure `model`, and `against` on the very same windows and questions.

    text: a .txt file, or None for the Python language reference. num_windows None takes all of it. window None takes
    the length the model was compressed with, else its context up to 2048. device_map: "auto" spreads a model over
    several GPUs. token, cache_dir: for models on the hub, as `from_pretrained` takes them. Raises UserError for models,
    texts or tasks that cannot be used, before any work.
    """
    progress = progress or LogProgress()
    check_process()
    require_at_least(1, num_windows=num_windows, batch_size=batch_size)
    require_at_least(2, window=window)
    require_at_least(0, num_fewshot=num_fewshot)
    settings = _Settings(
        tuple(tasks), batch_size, dtype, pick_device(device), device_map, limit, num_fewshot, trust_remote_code
    )
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    wanted = [(model, revision), (against, against_revision)]
    access = Access(token, cache_dir)

    def accept(path: Path) -> None:
        load_config(path, trust_remote_code)

    resolved = [
        resolve_model(name, version, accept, trust_remote_code, access) for name, version in wanted if name is not None
    ]
    configs = [load_config(entry.path, trust_remote_code) for entry in resolved]
    length = window or default_window(resolved[0], configs[0])
    context = min(getattr(config, "max_position_embeddings", length) for config in configs)
    if length > context:
        raise UserError(f"--window {length} is beyond the models' context of {context} tokens")
    if limit is not None and limit <= 0:
        raise UserError(f"--limit {limit:g}: give a number of questions, or a share of them, above 0")
    for entry in resolved:
        Checkpoint(entry.path)
    windows = _shared_windows(resolved, text, num_windows, length, trust_remote_code)
    manager = load_task_manager(settings.tasks) if settings.tasks else None
    entries = [_measure(entry, windows, manager, settings, progress) for entry in resolved]
    return Evaluation(
        {
            "models": entries,
            "windows": windows.describe(),
            "tasks": {"names": list(settings.tasks), "limit": limit, "num_fewshot": num_fewshot},
            "batch_size": batch_size,
            "machine": machine(settings.device),
            "versions": versions(),
        }
    )


def default_window(resolved: ResolvedModel, config: PretrainedConfig) -> int:
    """Tokens per window when none are asked for."""
    manifest = read_manifest(resolved.path) or {}
    recipe = manifest.get("recipe") or {}
    length = {**recipe, **(recipe.get("steps") or [{}])[-1]}.get("max_seq_length")
    if isinstance(length, int):
        return length
    if resolved.origin == "bundled":
        return BUNDLED_CONTEXT
    return min(DEFAULT_WINDOW, getattr(config, "max_position_embeddings", DEFAULT_WINDOW))


def _shared_windows(
    models: list[ResolvedModel], text: str | None, count: int | None, length: int, trust_remote_code: bool
) -> TestWindows:
    """The same windows for all models. Raises UserError when their tokenizers disagree."""
    found = [load_test_windows(text, load_tokenizer(model.path, trust_remote_code), count, length) for model in models]
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
    settings: _Settings,
    progress: Progress,
) -> dict[str, Any]:
    start = time.perf_counter()
    progress.stage(f"perplexity of {resolved.name}", windows.tokens.shape[0])
    gc.collect()  # hooks that spread the model before over GPUs are in a cycle with it
    model = load_model(resolved.path, settings)
    likelihood = measure_perplexity(model, windows.tokens, settings.batch_size, progress.step)
    checkpoint = Checkpoint(resolved.path)
    use_only_known(checkpoint, model)
    entry: dict[str, Any] = {
        "name": resolved.name,
        "path": str(resolved.path),
        "revision": resolved.revision,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": checkpoint.bytes_on_disk(),
        **likelihood.describe(),
        "tasks": {},
    }
    if manager is not None:
        progress.stage(f"tasks of {resolved.name}", 1)
        tokenizer = load_tokenizer(resolved.path, settings.trust_remote_code)
        found = run_tasks(
            model, tokenizer, settings.tasks, manager, settings.batch_size, settings.limit, settings.num_fewshot
        )
        entry["tasks"] = task_scores(found["results"])
        entry["task_versions"] = found["versions"]
        entry["task_samples"] = {task: counts["effective"] for task, counts in found.get("n-samples", {}).items()}
        entry["lm_eval_command"] = lm_eval_command(resolved, settings)
        progress.step()
    entry["seconds"] = round(time.perf_counter() - start, 3)
    return entry


def load_model(path: Path, settings: _Settings) -> PreTrainedModel:
    """The whole model through stock transformers. Raises UserError unless every weight is found in the checkpoint."""
    try:
        with BUILDING:
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
                device_map=settings.device_map or placement(settings.device),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded by transformers: {one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise UserError(
                f"{path}: transformers reports {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:3]}"
            )
    return model.eval()


def lm_eval_command(resolved: ResolvedModel, settings: _Settings) -> str:
    """The lm-eval call that gives the same task scores, ready for a shell."""
    arguments = [f"pretrained={resolved.path}", f"dtype={settings.dtype}"]
    arguments += ["parallelize=True"] if settings.device_map else []
    arguments += ["trust_remote_code=True"] if settings.trust_remote_code else []
    words = ["lm_eval", "--model", "hf", "--model_args", ",".join(arguments), "--tasks", ",".join(settings.tasks)]
    words += ["--include_path", str(TASKS_PATH), "--batch_size", str(settings.batch_size)]
    words += [] if settings.device_map else ["--device", str(settings.device)]
    words += [] if settings.limit is None else ["--limit", repr(settings.limit)]
    words += [] if settings.num_fewshot is None else ["--num_fewshot", str(settings.num_fewshot)]
    return shlex.join(words)
