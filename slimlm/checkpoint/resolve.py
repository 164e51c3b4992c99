"""From what the user called a model to a directory on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimlm.checkpoint.reader import INDEX_NAME, SINGLE_NAME, parse_index
from slimlm.errors import UserError, nearest, one_line

# The model that ships with slimlm, and the number of tokens it was trained to look back on.
BUNDLED_CONTEXT = 256
BUNDLED = {"llama": Path(__file__).parent.parent / "bundled" / "llama-6m"}

METADATA_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class ResolvedModel:
    """A model's name as given, where it lies, and which version of it that is."""

    name: str
    path: Path
    origin: Literal["bundled", "directory", "hub"]
    revision: str | None = None

    def __str__(self) -> str:
        if self.origin == "hub":
            return f"{self.name} (hub, revision {self.revision})"
        return f"{self.name} ({self.origin}, {self.path})"


def resolve_model(
    model: str, revision: str | None = None, accept: Callable[[Path], None] = lambda path: None
) -> ResolvedModel:
    """The bundled alias, a directory, or a hub id, as a local directory; hub files are fetched as needed.

    `accept` sees the directory once config and index are there and before any weight is fetched, and raises
    UserError to refuse it. Raises UserError for what is none of the three or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        resolved = ResolvedModel(model, path.resolve(), "directory")
    elif model in BUNDLED:
        resolved = ResolvedModel(model, BUNDLED[model], "bundled")
    elif _looks_like_path(model):
        raise UserError(f"model directory {model!r} does not exist")
    else:
        return _from_hub(model, revision, accept)
    if revision is not None:
        raise UserError(f"--revision {revision!r} applies to hub ids only; {model!r} is a {resolved.origin} model")
    _require_config(resolved)
    accept(resolved.path)
    return resolved


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model.count("/") > 1 or Path(model).exists()


def _require_config(resolved: ResolvedModel) -> None:
    if not (resolved.path / "config.json").is_file():
        raise UserError(f"{resolved.path} holds no config.json: not a transformers model directory")


def _from_hub(model: str, revision: str | None, accept: Callable[[Path], None]) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=METADATA_FILES))
        resolved = ResolvedModel(model, path, "hub", revision=path.name)
        _require_config(resolved)
        accept(path)
        # By commit, so that a branch that moves meanwhile does not mix two versions.
        snapshot_download(model, revision=path.name, allow_patterns=_weight_files(path))
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"model {model!r} is gated: accept its licence at https://huggingface.co/{model} "
            "and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {model!r} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"model {model!r} is not on the hub{nearest(model, BUNDLED)}; {_WAYS_OUT}") from error
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        raise UserError(
            f"model {model!r} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}: {one_line(error)}){nearest(model, BUNDLED)}; {_WAYS_OUT}"
        ) from error
    return resolved


def _weight_files(path: Path) -> list[str]:
    """The shards the index names, not every safetensors file a repository may also hold."""
    index = path / INDEX_NAME
    return sorted(set(parse_index(index).values())) if index.is_file() else [SINGLE_NAME]


_WAYS_OUT = "log in with `hf auth login` if it is private, give a local directory, or use `llama`, the bundled model"
