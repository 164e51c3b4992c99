"""A checkpoint as a sequence of parts (embeddings, blocks, head), one of them in memory at a time.

Nothing here knows a method or an architecture by name. How calibration data goes through a model is in `ends.py` (what
comes before and after the blocks), `block.py` and `walk.py` (the blocks themselves).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, count

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from slimlm.attention import attending_fast
from slimlm.checkpoint.code import is_own_class
from slimlm.checkpoint.hf_internals import load_tensors, module_names, release
from slimlm.checkpoint.prefetch import Prefetch
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import build_skeleton, check_against_skeleton, refuse_absurd_sizes, use_only_known
from slimlm.device import quick_products
from slimlm.errors import UserError
from slimlm.families import family_of
from slimlm.model.block import Block, Group
from slimlm.model.linears import is_turned
from slimlm.model.shape_times import StepTimes
from slimlm.model.stream import owner_of, put, set_parameter


class StreamedModel:
    """A model whose weights are in memory only where a context says so, in `dtype` on `device`, however stored.

    skipped: linears that are to stay as they are, by full name, and their weights (`skip.py`). times: how long decoding
    takes (`step_times.py`), where a step asked for it.
    Raises UserError for a checkpoint that does not fit its config.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        family = family_of(config)
        # A class that comes with the checkpoint may compute something else than what would stand in for it.
        self.family = replace(family, carrier=None) if is_own_class(config) else family
        self.device = torch.device(device)
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        refuse_absurd_sizes(config, checkpoint)
        if family.norm_eps and not getattr(config, family.norm_eps, 0) >= 0:
            raise UserError(f"{checkpoint.path / 'config.json'}: {family.norm_eps} is negative")
        self.model = build_skeleton(config, dtype, trust_remote_code)
        use_only_known(checkpoint, self.model)
        check_against_skeleton(checkpoint, self.model)
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, buffer.to(self.device))
        modules = self.model.get_submodule(family.blocks)
        if not isinstance(modules, nn.ModuleList) or len(modules) == 0:
            raise UserError(f"{config.model_type!r} model has no blocks at {family.blocks}")
        self.blocks: list[Block] = list(map(partial(Block, self), count(), modules))
        self.skipped: dict[str, int] = {}
        self.times: StepTimes | None = None
        self.keys_of = self._assign_keys()
        self.ahead = Prefetch(checkpoint, self.device)

    def another(self, checkpoint: Checkpoint, config: PretrainedConfig) -> "StreamedModel":
        """A model beside this one, computed in the same way."""
        return StreamedModel(checkpoint, config, self.device, self.dtype, self.trust_remote_code)

    def _assign_keys(self) -> dict[str, list[str]]:
        """File names of tensors by the part they belong to: a block's path, or the module's own path outside blocks."""
        names, self.fused = module_names(self.model, self.checkpoint.tensors)
        known = self.model.state_dict().keys()
        self.key_of = {name: key for key, name in names.items() if name in known}
        for target, source in self.model.all_tied_weights_keys.items():
            for name, other in ((target, source), (source, target)):
                if other in self.key_of:
                    self.key_of.setdefault(name, self.key_of[other])
        keys_of: dict[str, list[str]] = {}
        for key, name in names.items():
            if name not in known:
                continue
            inside = name.startswith(self.family.blocks + ".")
            depth = self.family.blocks.count(".") + 2
            part = ".".join(name.split(".")[:depth]) if inside else name.rpartition(".")[0]
            keys_of.setdefault(part, []).append(key)
        return keys_of

    @property
    def groups(self) -> list[Group]:
        """All that methods prune, in the model's order."""
        return list(chain.from_iterable(block.groups for block in self.blocks))

    @property
    def widest(self) -> int:
        """Inputs of the matrices that have most; 0 where none are pruned."""
        return max((group.inputs for group in self.groups), default=0)

    @cached_property
    def matrices(self) -> dict[str, torch.Size]:
        """Shapes [out, in] of all that methods prune, by full name."""
        return {
            name: matrix.shape
            for group in self.groups
            for name, matrix in zip(group.full_names, group.matrices, strict=True)
        }

    @property
    def why_not_rotated(self) -> str:
        """For a message, where the family says that its stream cannot be."""
        return f"{self.config.model_type!r} cannot be rotated: {self.family.why_not}"

    def require_declared(self, verb: str) -> None:
        """Raises UserError naming weights that the family does not declare."""
        tied = self.model.all_tied_weights_keys
        unknown = [name for name in self.model.state_dict() if self.family.role(name) is None and name not in tied]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"{self.config.model_type!r} has weights slimlm does not know how to {verb}: {unknown[0]}{more} "
                "(a newer transformers may have added them)"
            )

    def checkpoint_tensor(self, name: str) -> Tensor:
        """A parameter by its module name, [...] as stored. For those the file holds under one name of their own."""
        return self.checkpoint.read(self.key_of[name])

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A parameter by its module name, as stored, in runs [rows, ...]. For those the file holds as they are."""
        return self.checkpoint.tensors[self.key_of[name]].chunks()

    def stored_dtype(self, key: str, requested: str) -> torch.dtype:
        """dtype to write a tensor in: the requested one, or what the checkpoint has it (or most of itself) in."""
        if requested != "auto":
            dtype: torch.dtype = getattr(torch, requested)
            return dtype
        stored = self.checkpoint.tensors.get(key)
        return stored.dtype if stored else self.checkpoint.main_dtype

    @property
    def head_is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return f"{self.family.head}.weight" in self.model.all_tied_weights_keys

    @property
    def head_parts(self) -> list[str]:
        """The modules to load for the head's weight to be there."""
        return [self.family.head, *(self.family.embeddings if self.head_is_tied else ())]

    @property
    def outside(self) -> list[str]:
        """Paths of the modules outside the blocks that hold weights."""
        return [part for part in self.keys_of if not part.startswith(self.family.blocks + ".")]

    @contextmanager
    def loaded(self, parts: Sequence[str]) -> Iterator[None]:
        """The named parts' weights in memory inside the context."""
        keys = [key for part in parts for key in self.keys_of.get(part, [])]
        try:
            slices = {key: self.ahead.take(key) for key in keys}
            load_tensors(self.model, slices, self.device, self.dtype)
            del slices
            self.model.tie_weights(recompute_mapping=False)
            self._require_weights(parts)
            yield
        finally:
            self.release(parts)

    def release(self, parts: Sequence[str]) -> None:
        """Let go of the named parts' weights."""
        for part in parts:
            release(self.model.get_submodule(part))
        self.model.tie_weights(recompute_mapping=False)

    def fetch_ahead(self, index: int) -> None:
        """Have the weights of block `index`, if there is one, come while others compute."""
        self.ahead.ask(self.keys_of.get(self.family.block(index), []))

    def _require_weights(self, parts: Sequence[str]) -> None:
        for part in parts:
            for name, parameter in self.model.get_submodule(part).named_parameters():
                parameter.requires_grad_(False)
                if parameter.is_meta:
                    raise UserError(f"{self.checkpoint.path} lacks {part}.{name}, which its config calls for")

    @contextmanager
    def placed(self, part: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """A part with the given weights, by name within it, inside the context; they may be wider than its config says.
        They are in the model's dtype there, or in another.

        Linears' weights are [out, in], whatever the module has.
        Weights that are not given stay as they are; afterwards all are as they were.
        """
        module = self.model.get_submodule(part)
        before = {name: (owner_of(module, name), module.get_parameter(name)) for name in tensors}
        try:
            for name, tensor in tensors.items():
                tensor = tensor.to(self.device, dtype or self.dtype)
                put(module, name, tensor.T if is_turned(module, name) else tensor)
            yield module
        finally:
            for name, (owner, parameter) in before.items():
                set_parameter(owner, name.rpartition(".")[2], parameter)

    @contextmanager
    def eager_experts(self) -> Iterator[None]:
        """Inside, experts run one after another."""
        before = self.model.config._experts_implementation
        self.model.set_experts_implementation("eager")
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)

    @contextmanager
    def quick_products(self) -> Iterator[None]:
        """Inside, CPUs make products and attention as is fastest, for what rounding does not decide. It does in a
        mixture, whose router would choose others, and where a token's place is added to scores (alibi)."""
        decides = self.family.experts or getattr(self.config, "alibi", self.family.alibi)
        if decides or self.device.type != "cpu":
            yield
            return
        with quick_products(self.device, self.dtype), attending_fast(self.model):
            yield

    @property
    def norm_eps(self) -> float:
        """The epsilon of the residual stream's norms."""
        name = self.family.norm_eps
        return float(getattr(self.config, name)) if name else float(nn.LayerNorm(1).eps)

    @property
    def residual_scale(self) -> float:
        """What writers' outputs are multiplied by before they are added."""
        return self._factor(self.family.residual_scale)

    @property
    def logit_divisor(self) -> float:
        """What the head's outputs are divided by."""
        return self._factor(self.family.logit_divisor)

    def _factor(self, attribute: str | None) -> float:
        return float(getattr(self.config, attribute)) if attribute else 1.0
