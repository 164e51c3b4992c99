"""From what the user called a model to a directory on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimlm.checkpoint.hub import Access, HubModel, fetch_model
from slimlm.checkpoint.kinds import (
    CONFIG_NAME,
    names_in,
    other_kind,
    refuse_no_directory,
    refuse_what_is_loaded_otherwise,
)
from slimlm.errors import UserError, nearest

# The model that ships with slimlm, and the number of tokens it was trained to look back on.
BUNDLED_CONTEXT = 256
BUNDLED = {"llama": Path(__file__).parent.parent / "bundled" / "llama-6m"}


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
    model: str,
    revision: str | None = None,
    accept: Callable[[Path], None] = lambda path: None,
    trust_remote_code: bool = False,
    access: Access | None = None,
) -> ResolvedModel:
    """The bundled alias, a directory, or a hub id, as a local directory; hub files are fetched as needed.

    `accept` sees the directory once config and index are there and before any weight is fetched, and raises
    UserError to refuse it. Code is fetched where it is trusted. Raises UserError for what is none of the three, is
    something else than a model, or cannot be reached.
    """

    def known(path: Path) -> None:
        refuse_what_is_loaded_otherwise(path)
        accept(path)

    path = Path(model).expanduser()
    if path.is_dir():
        resolved = ResolvedModel(model, path.resolve(), "directory")
    elif model in BUNDLED:
        resolved = ResolvedModel(model, BUNDLED[model], "bundled")
    else:
        refuse_no_directory(model)
        asked = HubModel(model, revision, access or Access())
        snapshot = fetch_model(asked, known, trust_remote_code, nearest(model, BUNDLED))
        return ResolvedModel(model, snapshot, "hub", revision=snapshot.name)
    if revision is not None:
        raise UserError(f"--revision {revision!r} applies to hub ids only; {model!r} is a {resolved.origin} model")
    if not (resolved.path / CONFIG_NAME).is_file():
        raise other_kind(resolved.path, names_in(resolved.path))
    known(resolved.path)
    return resolved
