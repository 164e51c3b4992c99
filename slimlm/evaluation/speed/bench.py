"""`slimlm bench`: how fast models read a prompt and write on, in turns with the dense model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slimlm.device import check_process, machine, pick_device
from slimlm.display import usual
from slimlm.errors import UserError, out_of_memory, require_at_least
from slimlm.evaluation.found import shortest_context
from slimlm.evaluation.speed.contenders import (
    Contender,
    Source,
    gguf_contenders,
    refuse_too_many,
    sources,
    stock_contenders,
    vllm_contenders,
)
from slimlm.evaluation.speed.engines import LLAMA_CPP, TRANSFORMERS, VLLM, LlamaCppRunner, gguf_files, require_installed
from slimlm.evaluation.speed.figures import Bench, ModelSpeed
from slimlm.evaluation.speed.judging import judged, known_shapes, predictions, shape_times
from slimlm.evaluation.speed.shape_times import Prediction, WithShapes
from slimlm.evaluation.speed.sparse_kernels import refuse_2_of_4_without_gpu
from slimlm.evaluation.speed.stock import flops_per_token
from slimlm.evaluation.speed.timing import CLOCKS, BatchSpeed, interleaved, speed_of
from slimlm.model.shape_times import Shape
from slimlm.progress import Progress
from slimlm.settings import DTYPES, BenchSettings, by_name

KERNELS = ("auto", "none", "bsr", "2:4")
ENGINES = (TRANSFORMERS, VLLM)


@by_name(BenchSettings)
@out_of_memory("lower --batch-sizes or --prompt-tokens, or give fewer models")
def bench(settings: BenchSettings) -> Bench:
    """Measure how fast models are, and `against`, taking turns.

    model: one or several directories, hub ids, GGUF files (then all of them, for llama.cpp) or `llama`. batch_sizes: as
    in "1,8", or numbers. Prompts are random tokens of the vocabulary all share, drawn by seed; they are shortened to
    what the models' context leaves room for. Raises UserError for what cannot be measured, before any work.
    """
    check_process()
    progress = usual(settings.progress)
    names = (settings.model,) if isinstance(settings.model, str) else tuple(settings.model)
    settings, sizes = _checked(settings, names)
    device = pick_device(settings.device)
    settings = replace(settings, device=str(device))
    engine = _engine(settings, names)
    require_installed(engine)
    _check_device(settings, engine, device)
    if engine == LLAMA_CPP:
        return _bench_files(settings, names, sizes, progress)
    found = sources(settings, names, device)
    if engine == TRANSFORMERS:
        refuse_too_many(found, device, is_spread=bool(settings.device_map))
    return _bench_checkpoints(settings, engine, found, sizes, progress)


def _checked(settings: BenchSettings, names: Sequence[str]) -> tuple[BenchSettings, tuple[int, ...]]:
    """With the batch sizes as numbers. Raises UserError for what cannot be."""
    if not names:
        raise UserError("give a model to measure")
    require_at_least(1, prompt_tokens=settings.prompt_tokens, rounds=settings.rounds)
    require_at_least(2, new_tokens=settings.new_tokens)
    chosen = (
        ("dtype", settings.dtype, DTYPES),
        ("kernels", settings.kernels, KERNELS),
        ("engine", settings.engine, ENGINES),
        ("clock", settings.clock, tuple(CLOCKS)),
    )
    for flag, value, known in chosen:
        if value not in known:
            raise UserError(f"--{flag} {value!r} is none of {', '.join(known)}")
    given = settings.batch_sizes.split(",") if isinstance(settings.batch_sizes, str) else settings.batch_sizes
    try:
        sizes = tuple(dict.fromkeys(int(size) for size in given))
    except ValueError as error:
        raise UserError(
            f"--batch-sizes {settings.batch_sizes!r}: give numbers with commas between, as in 1,8"
        ) from error
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch-sizes {settings.batch_sizes!r}: give at least 1")
    return settings, tuple(sorted(sizes))


def _engine(settings: BenchSettings, names: Sequence[str]) -> str:
    """What runs them all. Raises UserError for models of which some are GGUF files."""
    every = (*names, *([settings.against] if settings.against else []))
    files = [name for name in every if gguf_files(name)]
    if not files:
        return settings.engine
    if len(files) < len(every):
        other = next(name for name in every if name not in files)
        raise UserError(f"{files[0]} is for llama.cpp and {other} is not: compare GGUF files with GGUF files")
    if settings.engine == VLLM or settings.kernels not in ("auto", "none"):
        raise UserError("GGUF files are llama.cpp's: leave out --engine and --kernels")
    return LLAMA_CPP


def _check_device(settings: BenchSettings, engine: str, device: torch.device) -> None:
    """Raises UserError for kernels and clocks that are not there, and for models that cannot be spread."""
    if settings.device_map and (engine != TRANSFORMERS or settings.kernels not in ("auto", "none")):
        raise UserError("--device-map is for models as stored in transformers: leave it out, or --engine and --kernels")
    if settings.kernels == "2:4":
        refuse_2_of_4_without_gpu(device)
    if engine == VLLM and settings.kernels not in ("auto", "none"):
        raise UserError(f"--kernels {settings.kernels} is for transformers: vLLM chooses its own")
    if settings.clock == "cpu" and (device.type != "cpu" or engine == VLLM or torch.get_num_threads() > 1):
        raise UserError("--clock cpu is for one thread of a CPU: start it with OMP_NUM_THREADS=1, and --device cpu")


def _bench_files(settings: BenchSettings, names: Sequence[str], sizes: Sequence[int], progress: Progress) -> Bench:
    if tuple(sizes) != (1,):
        progress.line("llama.cpp is measured one sequence at a time: other batch sizes are left out")
    every = (*names, *([settings.against] if settings.against else []))
    contenders = gguf_contenders(every, settings)
    vocabulary = min(one.runner.vocabulary for one in contenders if isinstance(one.runner, LlamaCppRunner))
    return _measured(settings, LLAMA_CPP, contenders, _prompts(settings, vocabulary, (1,)), progress)


def _bench_checkpoints(
    settings: BenchSettings, engine: str, found: Sequence[Source], sizes: Sequence[int], progress: Progress
) -> Bench:
    settings = _fitting(settings, found, progress)
    prompts = _prompts(settings, min(source.vocabulary for source in found), sizes)
    if engine == VLLM:
        contenders = vllm_contenders(found, settings)
    else:
        contenders = stock_contenders(found, settings, prompts[0], progress)
    return _measured(settings, engine, contenders, prompts, progress)


def _fitting(settings: BenchSettings, found: Sequence[Source], progress: Progress) -> BenchSettings:
    """With a prompt that every context has room for. Raises UserError where none has."""
    context = shortest_context(found)
    if context is None or settings.prompt_tokens + settings.new_tokens <= context:
        return settings
    if settings.new_tokens >= context:
        raise UserError(f"--new-tokens {settings.new_tokens} is beyond the models' context of {context} tokens")
    progress.line(f"prompts are cut to {context - settings.new_tokens} tokens: the models' context is {context}")
    return replace(settings, prompt_tokens=context - settings.new_tokens)


def _prompts(settings: BenchSettings, vocabulary: int, sizes: Sequence[int]) -> list[Tensor]:
    """Random tokens, [batch, time] for each of the batch sizes."""
    generator = torch.Generator().manual_seed(settings.seed)
    return [torch.randint(vocabulary, (size, settings.prompt_tokens), generator=generator) for size in sizes]


def _measured(
    settings: BenchSettings, engine: str, contenders: Sequence[Contender], prompts: Sequence[Tensor], progress: Progress
) -> Bench:
    """prompts: [batch, time] each."""
    has_dense = settings.against is not None
    shapes = [known_shapes(one, prompts[0]) if has_dense else Counter[Shape]() for one in contenders]
    batches = []
    for batch in prompts:
        progress.stage(f"measuring, batch of {len(batch)}", len(contenders) * (1 + settings.rounds))
        batches.append(_of_batch(settings, contenders, shapes, batch, progress))
    found = [
        _described(one, [speeds[place] for speeds, _ in batches], [own[place] for _, own in batches], prompts[0])
        for place, one in enumerate(contenders)
    ]
    *models, dense = judged(contenders, found, shapes) if has_dense else [*found, None]
    return Bench(
        tuple(one for one in models if one is not None),
        dense,
        engine,
        prompts[0].shape[1],
        settings.new_tokens,
        settings.rounds,
        settings.clock,
        settings.seed,
        ", ".join(dict.fromkeys(str(device) for one in contenders for device in one.devices)) or settings.device,
        machine(torch.device(settings.device)),
    )


def _of_batch(
    settings: BenchSettings,
    contenders: Sequence[Contender],
    shapes: Sequence[Counter[Shape]],
    prompts: Tensor,
    progress: Progress,
) -> tuple[list[BatchSpeed], list[Prediction | None]]:
    """Of each model its speed, and what was predicted of it. prompts: [batch, time]."""
    rows, clock = len(prompts), CLOCKS[settings.clock]
    times = [shape_times(one, own, rows, clock) for one, own in zip(contenders, shapes, strict=True)]
    runners = [WithShapes(one.runner, own) if own else one.runner for one, own in zip(contenders, times, strict=True)]
    taken = interleaved(runners, prompts, settings.new_tokens, settings.rounds, progress.step)
    speeds = [speed_of(rows, prompts.shape[1], rounds) for rounds in taken]
    return speeds, predictions(contenders, times, speeds)


def _described(
    one: Contender, batches: Sequence[BatchSpeed], predicted: Sequence[Prediction | None], prompts: Tensor
) -> ModelSpeed:
    """prompts: [batch, time], of which the first is what is counted."""
    swapped = one.swapped
    return ModelSpeed(
        one.name,
        str(one.path),
        one.kernels,
        one.dtype,
        one.parameters,
        one.bytes,
        flops_per_token(one.model, prompts[:1]) if one.model is not None and not swapped else None,
        one.zeros,
        swapped.density if swapped else None,
        swapped.difference if swapped else None,
        tuple(batches),
        tuple(predicted),
    )
