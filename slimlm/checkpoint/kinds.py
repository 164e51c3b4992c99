"""What a path is that is no model slimlm can read, and what to do about it."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from slimlm.errors import UserError

CONFIG_NAME, INDEX_NAME, SINGLE_NAME = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_NAME, PACKED_NAME = "adapter_config.json", "packed.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
HEAD_BYTES = 512
MERGE = (
    'merge it with peft, `AutoPeftModelForCausalLM.from_pretrained(DIR, dtype="auto").merge_and_unload()'
    ".save_pretrained(NEW)`"
)
ADAPTER_BESIDE = (
    f"holds a PEFT adapter beside weights, and transformers would load both ({ADAPTER_NAME}): {MERGE}, or take the "
    "adapter's files away"
)
VECTORS = (
    "is a sentence-transformers model (modules.json): it turns text into vectors, and slimlm compresses models that "
    "write text"
)
URL = re.compile(
    r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)


def refuse_what_is_loaded_otherwise(path: Path) -> None:
    """Raises UserError for a directory with config and weights that is more than these."""
    for name, what in ((ADAPTER_NAME, ADAPTER_BESIDE), ("modules.json", VECTORS)):
        if (path / name).is_file():
            raise UserError(f"{path} {what}")


def other_kind(place: Path | str, names: Collection[str]) -> UserError:
    """What to raise for a directory that lacks config or weights: what its files say that it is instead.

    names: of the files in it and one level below, or of everything in a repository of the hub.
    """
    top = {name for name in names if "/" not in name}
    if not names:
        return UserError(f"{place} is empty: give a directory with {CONFIG_NAME} and safetensors weights")
    if found := next(_by_files(place, top), None) or _below(place, names):
        return UserError(f"{place} {found}")
    if CONFIG_NAME not in top:
        if {SINGLE_NAME, INDEX_NAME} & top:
            return UserError(f"{place} holds no {CONFIG_NAME}, without which weights say little: fetch that, too")
        beside = " but a tokenizer" if any(name.startswith("tokenizer") for name in top) else ""
        return UserError(f"{place} holds no {CONFIG_NAME}{beside}: not a transformers model directory")
    return UserError(
        f"{place} holds no safetensors weights, neither {SINGLE_NAME} nor {INDEX_NAME} (pickled ones are not read)"
    )


def _ending(names: Collection[str], *ends: str) -> str | None:
    return next((name for name in sorted(names) if name.endswith(ends)), None)


def _by_files(place: Path | str, top: set[str]) -> Iterator[str]:
    """What the names of files in it say, the surest first."""
    if ADAPTER_NAME in top:
        alone = f"holds a PEFT adapter, not a model ({ADAPTER_NAME}): {MERGE}"
        yield ADAPTER_BESIDE if CONFIG_NAME in top else alone
    if PACKED_NAME in top:
        yield f"is an archive of `slimlm pack`: get the model back with `slimlm unpack {place} NEW`"
    if "model_index.json" in top:
        yield "is a diffusers pipeline (model_index.json): slimlm compresses causal language models"
    if "modules.json" in top:
        yield VECTORS
    if _ending(top, ".gguf"):
        yield "holds GGUF files: give the checkpoint they were made of, and convert its result to GGUF afterwards"
    is_meta = "params.json" in top and CONFIG_NAME not in top
    # Weights that `from_pretrained` would not look for.
    name = _ending(top - {SINGLE_NAME}, ".safetensors")
    if name is not None and INDEX_NAME not in top and not is_meta:
        yield _shards_alone(name)
    if is_meta:
        yield (
            "is a model in its maker's own layout (params.json): get the one converted for transformers, often named "
            "-hf"
        )
    if _ending(top - {"training_args.bin", "optimizer.bin", "scheduler.bin"}, *PICKLES):
        yield (
            "holds pickled weights only; slimlm reads safetensors, which cannot run code: "
            "convert with `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)`"
        )
    endings = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".npz": "MLX", ".mlpackage": "Core ML"}
    for end, library in endings.items():
        if name := _ending(top, end):
            yield f"holds {library} weights only ({name}): get the model's safetensors for PyTorch"


def _shards_alone(name: str) -> str:
    if re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", name):
        return "is a distributed checkpoint: load it with transformers and save it with `save_pretrained`"
    if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name):
        return f"holds {name} and no {INDEX_NAME}: fetch that, too"
    return f"holds {name}, but transformers reads {SINGLE_NAME} or what {INDEX_NAME} lists: rename it, or fetch those"


def _below(place: Path | str, names: Collection[str]) -> str | None:
    """What directories in it say: a trainer's checkpoints, a model one level down, another library's export."""
    models = sorted({str(PurePosixPath(name).parent) for name in names if name.endswith(f"/{CONFIG_NAME}")})
    steps = {int(name.rpartition("-")[2]): name for name in models if re.fullmatch(r"checkpoint-\d+", name)}
    if steps:
        return f"holds checkpoints of a training run: give one of them, the newest is {Path(place) / steps[max(steps)]}"
    if len(models) == 1:
        return f"is no model, but {Path(place) / models[0]} in it looks like one: give that"
    if len(models) > 1:
        return f"is no model, but holds several ({', '.join(models[:3])}): give one of them"
    if _ending(names, ".onnx", "openvino_model.xml"):
        return "holds a model exported to ONNX or OpenVINO only: get its safetensors for PyTorch"
    return None


def names_in(directory: Path) -> set[str]:
    """Names of what lies in a directory, and in directories directly below it."""
    below = [path for child in _listed(directory) if child.is_dir() for path in _listed(child)]
    return {path.relative_to(directory).as_posix() for path in (*_listed(directory), *below) if not path.is_dir()}


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror or error}") from error


def refuse_no_directory(name: str) -> None:
    """Raises UserError for a path of something else, and for an address of the hub, which has ids.

    A name that may be an id passes.
    """
    if found := URL.match(name):
        revision = f" --revision {found['revision']}" if found["revision"] else ""
        raise UserError(f"{name} is an address: give the hub id, {found['id']}{revision}")
    if "://" in name:
        raise UserError(f"{name} is an address: give a hub id, or a directory")
    path = Path(name).expanduser()
    if path.is_symlink() and not path.exists():
        raise UserError(f"{name} is a link to {path.readlink()}, which does not exist")
    if path.is_file():
        raise UserError(f"{name} is {_file_kind(path)}")
    if path.exists():
        raise UserError(f"{name} is no directory: give one with {CONFIG_NAME} and safetensors weights")
    if name.startswith(("/", "./", "../", "~", ".\\")) or name.count("/") > 1:
        raise UserError(f"model directory {name!r} does not exist")


def _file_kind(path: Path) -> str:
    refuse_stand_in(path)
    if path.suffix == ".gguf" or _head(path).startswith(b"GGUF"):
        return "a GGUF file: give the checkpoint directory it was made of, and convert its result to GGUF afterwards"
    if path.suffix == ".safetensors":
        return f"a file of weights: give the directory that holds it and {CONFIG_NAME}"
    if path.suffix in PICKLES:
        return "a file of pickled weights: give a directory with safetensors, as `save_pretrained` makes it"
    return f"a file: give the directory that holds {CONFIG_NAME} and safetensors weights"


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def refuse_stand_in(path: Path) -> None:
    """Raises UserError for a file whose content was never fetched: Git LFS leaves a note, a browser a web page."""
    head = _head(path).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")
    if head.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path} is a web page, not the file itself: fetch it again, with `hf download`")
