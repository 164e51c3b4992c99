"""From what the user called a model to a directory on this machine."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimlm.errors import UserError, nearest

logger = logging.getLogger(__name__)

# The model that ships with slimlm, and the number of tokens it was trained to look back on.
BUNDLED_CONTEXT = 256
BUNDLED = {"llama": Path(__file__).parent.parent / "bundled" / "llama-6m"}

METADATA_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
WEIGHT_FILES = ["*.safetensors"]


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

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))

    try:
        path = fetch(METADATA_FILES)
        resolved = ResolvedModel(model, path, "hub", revision=path.name)
        _require_config(resolved)
        accept(path)
        fetch(WEIGHT_FILES)
    except GatedRepoError as error:
        raise UserError(
            f"model {model!r} is gated: accept its licence at https://huggingface.co/{model} "
            "and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {model!r} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"model {model!r} is not on the hub{nearest(model, BUNDLED)}; {_WAYS_OUT}") from error
    except (OSError, RuntimeError) as error:  # every connection error of httpx and huggingface_hub is one of these
        reason = str(error).strip().splitlines()[0][:120]
        raise UserError(
            f"model {model!r} could not be fetched from the hub ({type(error).__name__}: {reason})"
            f"{nearest(model, BUNDLED)}; {_WAYS_OUT}"
        ) from error
    return resolved


_WAYS_OUT = "log in with `hf auth login` if it is private, give a local directory, or use the bundled `--model llama`"
