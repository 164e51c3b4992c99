"""Everything that can be checked before a run, checked before the run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from slimlm.calibration import SELF, Windows, load_windows
from slimlm.checkpoint.code import is_own_class
from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.manifest import MANIFEST_NAME
from slimlm.checkpoint.reader import Checkpoint, read_config
from slimlm.checkpoint.resolve import BUNDLED_CONTEXT, ResolvedModel, resolve_model
from slimlm.checkpoint.skeleton import auto_dtype, load_config, load_tokenizer, parameter_count
from slimlm.checkpoint.staging import check_output
from slimlm.checkpoint.task import refuse_other_task
from slimlm.checkpoint.tokenizer import check_tokenizer
from slimlm.device import pick_device, resident_memory, return_memory_at_once
from slimlm.errors import UserError
from slimlm.evaluation.text import DEFAULT_WINDOW, TestWindows, load_test_windows
from slimlm.families import FAMILIES, family_of
from slimlm.linalg.ridge import HELD_EVERY
from slimlm.method import Method
from slimlm.methods import method_named
from slimlm.model.skip import skip_modules, skipping
from slimlm.model.streamed import StreamedModel
from slimlm.progress import Progress
from slimlm.prune.plan import require_room_later
from slimlm.recipe import AnyStep, PruneStep, Recipe, SliceStep
from slimlm.run import Plan

NO_DATA = (
    "no calibration data: pass --dataset with a text file, a hub dataset, wikitext2, c4, alpaca or "
    "fineweb-edu, or --dataset self to let the model write its own (needs the whole model in memory)"
)
GRADIENT_BYTES = 2  # they are kept in bf16
LARGE = 256 * 10**6  # bytes of weights above which memory is worth more than page faults


@dataclass
class Job:
    """Everything a run needs, checked. windows: None if there are none, or they are still to be sampled.

    inputs: files and directories that are read. started, memory_before: the clock's seconds and the process's resident
    bytes when all this began. seconds: what each stage took so far.
    """

    recipe: AnyStep
    resolved: ResolvedModel
    method: Method[Any]
    output: Path
    model: StreamedModel
    tokenizer: Any
    plan: Plan
    test: TestWindows | None
    windows: Windows | None
    inputs: list[Path]
    started: float
    memory_before: int
    seconds: dict[str, float]
    resumed: bool = False


def prepare(
    recipe: AnyStep,
    overwrite: bool,
    resume: bool,
    progress: Progress,
    is_probe: bool = False,
    work_dir: Path | None = None,
    access: Access | None = None,
) -> Job:
    """Find every fault that can be found without computing. Raises UserError; writes nothing.

    resume: what an earlier run wrote may stand at the output; whether it is this one's is not decided here.
    is_probe: the model is a part of the one that is meant, and may grow by what makes the whole smaller.
    work_dir: where hidden states are to wait, if not beside the output. access: to the hub.
    """
    started, memory_before = time.perf_counter(), resident_memory()
    method = method_named(recipe.method)
    resolved = resolve_known(recipe.model, recipe.revision, recipe.trust_remote_code, access)
    if sum(file.stat().st_size for file in resolved.path.glob("*.safetensors") if file.is_file()) > LARGE:
        return_memory_at_once()  # first of all: what is allocated before stays as it was
    output = output_of([recipe])
    inputs = [
        resolved.path,
        *(Path(name) for name in (recipe.dataset, recipe.eval_text) if name and Path(name).exists()),
    ]
    is_there = resume and (output / MANIFEST_NAME).is_file()  # a result, which needs no room
    replaceable = overwrite or is_there
    check_output(output, replaceable, inputs, work_dir=work_dir)
    model = open_model(resolved.path, pick_device(recipe.device), "fast", recipe.trust_remote_code)
    skip_modules(model, recipe.skip)
    plan = method.plan(model, recipe)
    _refuse_other_class(model, plan)
    progress.line(f"model: {resolved}")
    if isinstance(recipe, SliceStep) and recipe.widths:
        if plan.parameters >= parameter_count(model.model) and not is_probe:
            raise UserError(f"--widths {recipe.widths} removes nothing: {plan.parameters:,} parameters would be left")
        recipe = recipe.model_copy(update={"sparsity": 1 - plan.parameters / parameter_count(model.model)})
    size = sum(spec.nbytes for spec in plan.tensors.values())
    for line in describe(plan, method, model, size):
        progress.line(line)
    tokenizer = load_tokenizer(resolved.path, recipe.trust_remote_code)
    carrier = model.family.carrier if method.sparsity_of == "parameters" else None
    others = {plan.config.model_type, *([carrier.model_type] if carrier else [])} - {model.config.model_type}
    for model_type in sorted(others):
        check_tokenizer(resolved.path, tokenizer, model_type, recipe.trust_remote_code)
    recipe = settle(recipe, method, resolved, model.config, output)
    windows, test = _windows(recipe, method, tokenizer, model.config.vocab_size)
    if not is_there:
        written = size + journalled(recipe, method, model)
        check_output(output, replaceable, inputs, written, work_dir, spilled(recipe, method, model), resume)
    progress.stage("checking weights", parameter_count(model.model))
    start = time.perf_counter()
    model.checkpoint.check_finite(progress.step)
    seconds = {"checking": time.perf_counter() - start}  # the one part of this that grows with the model
    return Job(
        recipe=recipe,
        resolved=resolved,
        method=method,
        output=output,
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        test=test,
        windows=windows,
        inputs=inputs,
        started=started,
        memory_before=memory_before,
        seconds=seconds,
    )


def later_runs_of(job: Job, whole: Recipe) -> list[AnyStep]:
    """The runs of a recipe after its first, the prepared one, with what they take over from that: the length of its
    windows, and that the bundled model can do without data."""
    own = {"dataset": SELF} if job.resolved.origin == "bundled" else {}
    window = job.recipe.max_seq_length
    return [
        run.model_copy(update={"max_seq_length": run.max_seq_length or window, **({} if run.dataset else own)})
        for run in whole.steps[1:]
    ]


def keeps_shapes(job: Job) -> bool:
    return job.plan.parameters == parameter_count(job.model.model)


def check_later(job: Job, whole: Recipe) -> None:
    """Raises UserError for runs of a recipe that cannot follow its first, the prepared one."""
    before, is_kept = [job.recipe], keeps_shapes(job)
    for later in later_runs_of(job, whole):
        method = method_named(later.method)
        with skipping(job.model, later.skip):
            for slicing in before:
                if isinstance(slicing, SliceStep) and isinstance(later, PruneStep):
                    require_room_later(job.model, slicing, later)
            if is_kept:
                is_kept = method.plan(job.model, later).parameters == job.plan.parameters
        before.append(later)
        if later.dataset is None and method.calibrates(later, job.resolved.path):
            raise UserError(f"{NO_DATA}, for the {later.method} that comes later, too")


def resolve_known(
    model: str, revision: str | None, trust_remote_code: bool, access: Access | None = None
) -> ResolvedModel:
    """A model's directory, nothing large fetched for a family that is not known. Raises UserError."""

    def accept(path: Path) -> None:
        values = read_config(path)
        refuse_other_task(path, values)
        if values.get("auto_map") and values["model_type"] not in FAMILIES:
            raise UserError(
                f"{path} is {values['model_type']!r}, which comes with Python code of its own: slimlm knows no such "
                "architecture, with --trust-remote-code or without (`slimlm models` lists those it knows)"
            )
        family_of(load_config(path, trust_remote_code))

    return resolve_model(model, revision, accept, trust_remote_code, access)


def _refuse_other_class(model: StreamedModel, plan: Plan) -> None:
    """Raises UserError where a checkpoint's own class would be left for one that need not compute the same."""
    own, other = type(model.model).__name__, type(plan.carrier).__name__
    if is_own_class(model.config) and type(plan.carrier) is not type(model.model):
        raise UserError(
            f"{own} comes with the checkpoint, and the result would be a {other}: prune it, or leave out "
            "--trust-remote-code if both compute the same"
        )


def describe(plan: Plan, method: Method[Any], model: StreamedModel, size: int) -> list[str]:
    """What is going to happen, before it does."""
    dense = parameter_count(model.model)
    skipped = [f"{len(model.skipped)} modules of {sum(model.skipped.values()):,} weights stay as they are"]
    if method.sparsity_of != "parameters":
        line = f"parameters: {dense:,}, of which some will be zero; weights: {size / 1e6:,.1f} MB, as before"
        return [line, *(skipped if model.skipped else [])]
    return [
        f"parameters: {dense:,} -> {plan.parameters:,} ({plan.parameters / dense - 1:+.1%}); "
        f"weights: {model.checkpoint.bytes_on_disk() / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB",
        *(f"{name}: {before} -> {after}" for name, (before, after) in plan.changes.items()),
        *([plan.remark] if plan.remark else []),
        *(skipped if model.skipped else []),
    ]


def journalled(recipe: AnyStep, method: Method[Any], model: StreamedModel) -> int:
    """Bytes of gradients that lie beside the result while it is made."""
    return GRADIENT_BYTES * method.gradients(recipe, model) if recipe.dataset else 0


def spilled(recipe: AnyStep, method: Method[Any], model: StreamedModel) -> int:
    """Bytes of hidden states that wait in pairs of files: to calibrate, then two streams to measure."""
    assert recipe.max_seq_length is not None
    per_window: int = recipe.max_seq_length * model.config.hidden_size * model.dtype.itemsize * 2
    calibrating = recipe.num_calibration_samples + method.scratch(recipe, model) if recipe.dataset else 0
    measuring = 2 * recipe.eval_windows if recipe.measure else 0
    return per_window * (calibrating + measuring)


def _windows(
    recipe: AnyStep, method: Method[Any], tokenizer: Any, vocabulary: int
) -> tuple[Windows | None, TestWindows | None]:
    """Calibration and test windows, as far as they are wanted and do not have to be sampled first."""
    assert recipe.max_seq_length is not None
    windows = test = None
    if recipe.dataset not in (None, SELF):
        windows = load_windows(
            recipe.dataset,
            tokenizer,
            recipe.num_calibration_samples,
            recipe.max_seq_length,
            recipe.seed,
            recipe.text_column,
        )
        low, high = int(windows.tokens.min()), int(windows.tokens.max())
        if low < 0 or high >= vocabulary:
            raise UserError(
                f"calibration data {recipe.dataset!r} holds tokens {low} to {high}; the model has {vocabulary}"
            )
    if recipe.measure:
        test = load_test_windows(recipe.eval_text, tokenizer, recipe.eval_windows, recipe.max_seq_length)
    count = len(windows.tokens) if windows else recipe.num_calibration_samples
    if method.holds_out(recipe) and count < HELD_EVERY:
        raise UserError(
            f"the refit holds out every {HELD_EVERY}th calibration window and there are {count}: "
            "raise --num-calibration-samples, give more text, or add --no-refit"
        )
    return windows, test


def open_model(
    path: Path, device: torch.device, precision: Literal["fast", "stock"], trust_remote_code: bool = False
) -> StreamedModel:
    """A checkpoint directory, ready to stream.

    precision: what it computes in. "stock" is what `from_pretrained(dtype="auto")` would take; "fast" is that too on a
    GPU, but float32 for float16, in which small gradients are zero; and float32 on a CPU, where it costs nothing.
    """
    checkpoint = Checkpoint(path)
    config = load_config(path, trust_remote_code)
    dtype = auto_dtype(config, checkpoint)
    if precision == "fast" and (device.type == "cpu" or dtype == torch.float16):
        dtype = torch.float32
    return StreamedModel(checkpoint, config, family_of(config), device, dtype, trust_remote_code)


def settle(recipe: AnyStep, method: Method[Any], resolved: ResolvedModel, config: Any, output: Path) -> AnyStep:
    """The recipe with every default that depends on the model filled in. Raises UserError where there is none."""
    dataset = recipe.dataset or (SELF if resolved.origin == "bundled" else None)
    if not method.calibrates(recipe, resolved.path):
        dataset = None
    elif dataset is None:
        raise UserError(NO_DATA)
    context: int = getattr(config, "max_position_embeddings", DEFAULT_WINDOW)
    default = BUNDLED_CONTEXT if resolved.origin == "bundled" else min(DEFAULT_WINDOW, context)
    length = recipe.max_seq_length or default
    if length > context:
        raise UserError(f"--max-seq-length {length} is beyond the model's context of {context} tokens")
    return recipe.model_copy(update={"dataset": dataset, "max_seq_length": length, "output_dir": str(output)})


def output_of(steps: Sequence[AnyStep]) -> Path:
    """Where the result goes; by default `llama-slice-25` (25% sliced off the model llama) in the working directory.

    Of several steps of one method, which are its shots, the last gives the name.
    """
    model = Path(steps[0].model).expanduser()
    parts = [model.resolve().name if model.is_dir() else model.name]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following is None or following.method != step.method:
            parts += [step.method, *([step.extent] if step.extent else [])]
    return Path(steps[0].output_dir or "-".join(parts)).expanduser().resolve()
