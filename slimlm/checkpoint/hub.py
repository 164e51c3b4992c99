"""A model on the hub, fetched into its cache: what is needed of it and no more, all of one commit."""

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from slimlm.checkpoint.companions import CODE, FOREIGN, TEMPLATES
from slimlm.checkpoint.kin import KIN
from slimlm.checkpoint.kinds import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, other_kind
from slimlm.checkpoint.reader import read_index, stated_weights
from slimlm.errors import UserError, one_line

logger = logging.getLogger(__name__)

ELSEWHERE = "*/*"  # other formats and the maker's own layout are in directories of their own; "*" crosses their "/"
WAYS_OUT = (
    "log in with `hf auth login` or give --token if it is private, give a local directory, or use `llama`, the bundled "
    "model"
)


@dataclass(frozen=True)
class Access:
    """How the hub is met, as in transformers: with which token, and where what is fetched is kept."""

    token: str | None = field(default=None, repr=False)
    cache_dir: Path | str | None = None


@dataclass(frozen=True)
class HubModel:
    """A model by its hub id, and how to get at it."""

    name: str
    revision: str | None
    access: Access

    def fetch(self, names: Sequence[str], but: Sequence[str] = (), commit: str | None = None) -> Path:
        """The snapshot's directory, with those of the named files that can be had.

        Raises LocalEntryNotFoundError, huggingface_hub's, where neither network nor cache has any of it.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        download: Callable[..., str] = partial(
            snapshot_download,
            self.name,
            revision=commit or self.revision,
            allow_patterns=list(names),
            ignore_patterns=list(but),
            token=self.access.token,
            cache_dir=self.access.cache_dir,
        )
        try:
            return Path(download())
        except LocalEntryNotFoundError as error:  # without the network, and what lacks may not be needed
            logger.info("of %s the cache holds a part at most: %s", self.name, one_line(error))
            try:
                return Path(download(local_files_only=True))
            except LocalEntryNotFoundError as local:
                partly = getattr(local, "snapshot_path", None)
                if partly is None:
                    raise error from None
                return Path(partly)

    def files(self, commit: str) -> list[str]:
        """Names of everything in the repository."""
        from huggingface_hub import HfApi

        return HfApi(token=self.access.token).list_repo_files(self.name, revision=commit)


def fetch_model(model: HubModel, accept: Callable[[Path], None], with_code: bool, hint: str) -> Path:
    """The directory of a model's snapshot, weights and all. Raises UserError in one line for all that can go wrong.

    accept: sees the directory before any weights are fetched. with_code: Python files, too. hint: what may be meant by
    a name that is not there.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = model.fetch(["*"], but=[ELSEWHERE, *FOREIGN, *([] if with_code else [CODE])])
        if not (path / CONFIG_NAME).is_file():
            _refuse_lacking(model, path, CONFIG_NAME)
        accept(path)
        _fetch_weights(model, path)
        return path
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"model {model.name!r} is gated: accept its licence at https://huggingface.co/{model.name} "
            "and log in with `hf auth login`, or give --token"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {model.name!r} has no revision {model.revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"model {model.name!r} is not on the hub{hint}; {WAYS_OUT}") from error
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        offline = _is_offline() and isinstance(error, LocalEntryNotFoundError)
        why = "it is not in the cache, and HF_HUB_OFFLINE is set" if offline else _said(error)
        raise UserError(
            f"model {model.name!r} is no directory here and could not be fetched from the hub ({why}){hint}; {WAYS_OUT}"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetch_weights(model: HubModel, path: Path) -> None:
    """What `from_pretrained` would read, in its order, by commit: a branch that moves meanwhile mixes no versions."""
    stated = stated_weights(path)
    for name in (stated,) if stated else (SINGLE_NAME, INDEX_NAME):
        model.fetch([glob.escape(name), f"{TEMPLATES}/*", KIN.as_posix()], commit=path.name)
        if not (path / name).is_file():
            continue
        if name.endswith(".safetensors"):
            return
        shards = read_index(path, name).files
        model.fetch([glob.escape(shard) for shard in shards], commit=path.name)
        for shard in shards:
            if not (path / shard).is_file():
                _refuse_lacking(model, path, shard)
        return
    _refuse_lacking(model, path, stated or SINGLE_NAME)


def _refuse_lacking(model: HubModel, path: Path, name: str) -> NoReturn:
    """Raises UserError for a file that is needed: not in the cache, or not on the hub, which then is something else."""
    try:
        names = [] if _is_offline() else model.files(path.name)
    except Exception as error:
        raise UserError(
            f"model {model.name!r} lacks {name} in the cache, and the hub fails ({_said(error)})"
        ) from error
    if names and name not in names:
        if CONFIG_NAME in names and INDEX_NAME in names:
            raise UserError(f"model {model.name!r} lacks {name} on the hub, though its index lists it")
        raise other_kind(f"model {model.name!r}", names)
    why = ", and HF_HUB_OFFLINE is set: unset it" if _is_offline() else ": try again"
    raise UserError(f"model {model.name!r} lacks {name} in the cache{why}, or fetch it with `hf download {model.name}`")
