"""What the verbs beside `compress` take: each setting once, for functions by its name and for commands as a flag."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from slimlm.errors import UserError, nearest
from slimlm.recipe import FIELDS, Recipe
from slimlm.recipe.step import bytes_of

if TYPE_CHECKING:
    from slimlm.progress import Progress

DTYPES = ("auto", "float32", "bfloat16", "float16")  # that models can be asked to compute in
Given = ParamSpec("Given")
Settings = TypeVar("Settings")
Found = TypeVar("Found")
Default = TypeVar("Default")


def described(default: Default, description: str, shown: str = "", least: int | None = None, flag: str = "") -> Default:
    """A dataclass's field that is a flag, too.

    shown: the default in words, where the value does not say it. least: what the flag takes at least. flag: where it
    has another name than the field.
    """
    return field(default=default, metadata={"description": description, "shown": shown, "least": least, "flag": flag})


def _of_recipe(name: str) -> Any:
    info = FIELDS[name]
    return described(info.default, info.description or "")


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """token, cache_dir: for models on the hub, as `from_pretrained` takes them."""

    token: str | None = described(None, "for models on the hub", "of `hf auth login`")
    cache_dir: Path | str | None = described(None, "where models from the hub are kept", "the hub's own cache")


@dataclass(frozen=True, kw_only=True)
class RunSettings(HubSettings):
    """How a recipe is run. progress: who is told how far the work is."""

    overwrite: bool = described(False, "replace what an earlier run wrote there")
    resume: bool = described(False, "go on from what an interrupted run of the same command has finished")
    resume_anyway: bool = described(
        False, "resume with other versions or on another kind of machine, which rounds otherwise; slimlm.json says so"
    )
    work_dir: Path | str | None = described(
        None,
        "existing directory where hidden states wait while it runs, best on a fast local disk",
        "beside the output",
    )
    stream_memory: str | None = described(
        None,
        "memory that hidden states may take while they wait, as in 8GB; `0` has all wait in files",
        "a quarter of what is free",
    )
    progress: "Progress | None" = None

    @property
    def stream_bytes(self) -> int | None:
        """What `stream_memory` says. Raises UserError for what is no size."""
        if self.stream_memory in (None, "0"):
            return None if self.stream_memory is None else 0
        try:
            return bytes_of(self.stream_memory)
        except ValueError as error:
            raise UserError(f"--stream-memory: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PushSettings(RunSettings):
    """And where else its result goes."""

    push_to_hub: str | None = described(
        None, "upload the result there when it is whole; that it can be is checked first"
    )
    private: bool = described(False, "make that repository a private one")


@dataclass(frozen=True)
class CompressSettings(PushSettings):
    """What `compress` carries out, and how."""

    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class ModelSettings(HubSettings):
    """How a model is found and loaded. progress: who is told how far the work is."""

    revision: str | None = _of_recipe("revision")
    device: str = _of_recipe("device")
    trust_remote_code: bool = _of_recipe("trust_remote_code")
    progress: "Progress | None" = None


@dataclass(frozen=True)
class EvalSettings(ModelSettings):
    """What `evaluate` measures, and how; tasks None takes slimlm's own."""

    model: str | Sequence[str] = field(metadata={"description": "directories, hub ids, or `llama`"})
    against: str | None = described(
        None,
        "dense model to compare with, on identical windows and questions; or what `--log-samples` of an earlier run "
        "kept of it",
    )
    _: KW_ONLY
    against_revision: str | None = described(None, "hub revision of the model to compare with")
    tasks: Sequence[str] | None = described(
        None,
        "tasks of lm-eval by name or YAML path, comma-separated; `none` for texts only",
        "python_reference_continuation, which needs no network",
    )
    text: str | Sequence[str] | None = described(
        None,
        "texts for perplexity, comma-separated: files, `wikitext2` and `c4` as papers take them, `python-reference`, "
        "`python-sources`",
        "the last two: documentation and code, of the Python that runs this",
    )
    num_windows: int | None = described(
        None, "windows of each text, evenly spaced; 0 takes all", "128; of wikitext2 and c4 all", least=0
    )
    window: int | None = described(
        None,
        "tokens in a window",
        "as compressed with, else the model's context up to 2048; of an earlier run as there",
        least=2,
    )
    corrupt: Sequence[str] | None = described(
        None, "measure corrupted texts too, comma-separated: `typos`, `drop`, `case`"
    )
    batch_size: int | str | None = described(
        None, "windows or questions at a time; `auto` has lm-eval find out for questions", "8 windows, 16 questions"
    )
    limit: float | None = described(None, "questions per task: a number, or a share below 1")
    num_fewshot: int | None = described(None, "examples shown before each question", least=0)
    apply_chat_template: bool = described(False, "put questions and prompts into the tokenizer's chat template")
    system_instruction: str | None = described(None, "what a system turn says before each question")
    gen_kwargs: str | None = described(None, "how tasks that generate text do so, as lm-eval takes it: `temperature=0`")
    seed: int | None = described(None, "of draws, corruptions and few-shot examples", "0, and lm-eval's own", least=0)
    generate: int = described(48, "tokens that each model writes on from each of 16 prompts; 0 for none", least=0)
    fragile: int = described(
        0, "name so many documents of each text and task that the model lost, worst first", least=0
    )
    log_samples: Path | None = described(
        None, "new directory for what was measured of every token, question and continuation"
    )
    dtype: str = described("auto", "dtype to compute in: auto (as stored), float32, bfloat16 or float16")
    stream: bool = described(
        False, "with `--tasks none`, one block at a time, as is done by itself where the model does not fit into memory"
    )
    device_map: str | None = described(None, "how to place the model: `auto` spreads it over several GPUs")


@dataclass(frozen=True)
class BenchSettings(ModelSettings):
    """What `bench` measures, and how."""

    model: str | Sequence[str] = field(
        metadata={
            "description": "directories or hub ids, for transformers; `.gguf` files and directories with one, for "
            "llama.cpp; or `llama`"
        }
    )
    against: str | None = described(None, "dense model to compare with; all take turns")
    _: KW_ONLY
    against_revision: str | None = described(None, "hub revision of the model to compare with")
    batch_sizes: str | Sequence[int] = described("1,8", "sequences at a time, comma-separated")
    prompt_tokens: int = described(128, "tokens in a prompt, fewer where the context is short", least=1)
    new_tokens: int = described(32, "tokens written after it", least=2)
    rounds: int = described(5, "how often each model runs, in turns, after a run that does not count", least=1)
    dtype: str = described("auto", "dtype to compute in: auto (as stored), float32, bfloat16 or float16")
    kernels: str = described(
        "auto",
        "kernels to run a pruned model with besides: bsr for tiles of zeros, 2:4 on GPUs, none, or auto: as its "
        "slimlm.json calls for",
    )
    engine: str = described("transformers", "what runs directories: transformers, or vllm where it is installed")
    clock: str = described(
        "wall", "wall, or cpu: the processor's time of one thread, which other work on the machine hardly lengthens"
    )
    device_map: str | None = described(None, "how to place models: `auto` spreads each over several GPUs")
    seed: int = described(0, "draws the prompts", least=0)


@dataclass(frozen=True)
class InspectSettings(ModelSettings):
    """What `inspect_model` looks at."""

    model: str = field(metadata={"description": "directory, hub id, or `llama`"})
    dataset: str | None = described(None, "text to run through the model, for outliers and predicted losses")
    _: KW_ONLY
    windows: int = described(16, "windows of the text", least=1)
    window: int = described(256, "tokens in a window", least=2)
    seed: int = described(0, "picks the windows", least=0)


def by_name(settings: Callable[Given, Settings]) -> Callable[[Callable[[Settings], Found]], Callable[Given, Found]]:
    """Makes a function of settings one that takes each of them by its name, and paths where they are text. It raises
    UserError for a name that it does not know."""
    known = signature(settings)

    def decorated(work: Callable[[Settings], Found]) -> Callable[Given, Found]:
        @wraps(work)
        def call(*given: Given.args, **named: Given.kwargs) -> Found:
            try:
                made = settings(*given, **named)
            except TypeError as error:
                near = [nearest(name, known.parameters) for name in named if name not in known.parameters]
                said = str(error).partition("() ")[2] or error
                raise UserError(f"{work.__name__}: {said}{''.join(near[:1])}") from error
            for name, value in vars(made).items():
                if "Path" not in str(known.parameters[name].annotation):
                    vars(made)[name] = _text_of_paths(value)
            return work(made)

        vars(call)["__signature__"] = known.replace(return_annotation=signature(work).return_annotation)
        return call

    return decorated


def _text_of_paths(value: Default) -> Default | str | tuple[object, ...]:
    if isinstance(value, (list, tuple)) and any(isinstance(one, Path) for one in value):
        return tuple(map(_text_of_paths, value))
    return str(value) if isinstance(value, Path) else value
