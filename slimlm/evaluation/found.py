"""A model that is to be measured, and what is known of it without loading it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.resolve import ResolvedModel, resolve_model
from slimlm.checkpoint.skeleton import auto_dtype, load_config
from slimlm.settings import BenchSettings, EvalSettings


@dataclass(frozen=True)
class Found:
    """Where it lies, and what it is. dtype: what it will compute in."""

    resolved: ResolvedModel
    checkpoint: Checkpoint
    config: PretrainedConfig
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.resolved.path

    @property
    def bytes(self) -> int:
        """Of its weights in memory."""
        return self.checkpoint.elements * self.dtype.itemsize

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """Tokens it takes at once; None where it does not say."""
        return getattr(self.config, "max_position_embeddings", None)


def find_model(name: str, revision: str | None, settings: EvalSettings | BenchSettings) -> Found:
    """Raises UserError for what is no whole checkpoint."""
    trust = settings.trust_remote_code

    def accept(path: Path) -> None:
        load_config(path, trust)

    resolved = resolve_model(name, revision, accept, trust, Access(settings.token, settings.cache_dir))
    checkpoint, config = Checkpoint(resolved.path), load_config(resolved.path, trust)
    dtype = auto_dtype(config, checkpoint) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return Found(resolved, checkpoint, config, dtype)


def shortest_context(models: Sequence[Found]) -> int | None:
    """Tokens that all models take at once; None where none says how many."""
    return min((one.context for one in models if one.context is not None), default=None)
