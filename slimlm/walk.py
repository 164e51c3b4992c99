"""The engine: calibration data through a model one block at a time, from shards on disk.

Nothing here knows a method or an architecture by name. The model's own `forward` says how blocks are called: it runs
once per batch with every block's `forward` replaced by a recorder, so masks, rotary embeddings and whatever a family
passes to its layers are exactly what the model would have used. Blocks then run alone, with those arguments, while
only their own weights are in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from slimlm.activations import HiddenStates, InMemory
from slimlm.checkpoint.code import is_own_class
from slimlm.checkpoint.hf_internals import load_tensors, module_names, release
from slimlm.checkpoint.lookup import looked_up
from slimlm.checkpoint.prefetch import Prefetch
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import build_skeleton, check_against_skeleton, refuse_absurd_sizes, use_only_known
from slimlm.device import return_freed_memory
from slimlm.errors import RunFailure, UserError
from slimlm.families import Family
from slimlm.linalg.likelihood import window_nll
from slimlm.matrices import See, canonical, is_turned, matrix, watched
from slimlm.stream import BlockCall, Stream, owner_of, put, reuse, set_parameter

Kind = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of a block's tensors
LARGE_TABLE = 1 << 26  # bytes of an embedding above which only the rows that are needed are read
LARGE_LOGITS = 1 << 28  # bytes of logits held at once


class _Stop(Exception):
    """Ends the model's forward once the last block was reached."""


class StreamedModel:
    """A checkpoint as a sequence of parts (embeddings, blocks, head), one of them in memory at a time.

    Weights are computed with in `dtype` on `device`, whatever they are stored in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        family: Family,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
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
        blocks = self.model.get_submodule(family.blocks)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            raise UserError(f"{config.model_type!r} model has no blocks at {family.blocks}")
        self.blocks: list[nn.Module] = list(blocks)
        self.anatomy = [family.in_block(_parts_of(block)) for block in self.blocks]
        self.skipped: dict[str, int] = {}  # linears that are to stay as they are, and their weights: `methods/skip.py`
        self.keys_of = self._assign_keys()
        self.ahead = Prefetch(checkpoint, self.device)

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

    def checkpoint_tensor(self, name: str) -> Tensor:
        """A parameter by its module name, as stored. For those the file holds under one name of their own."""
        return self.checkpoint.read(self.key_of[name])

    def is_turned(self, name: str) -> bool:
        """Whether a parameter, by its module name, is stored transposed."""
        return is_turned(self.model, name)

    def weights(self, index: int) -> dict[str, Tensor]:
        """Parameters of block `index`, loaded, by name within it; linears' weights as [out, in]. Views."""
        block = self.blocks[index]
        return {name: canonical(block, name) for name, _ in block.named_parameters()}

    @cached_property
    def matrices(self) -> dict[str, torch.Size]:
        """Shapes [out, in] of all that methods prune, by full name."""
        return {
            f"{self.family.block(index)}.{name}": matrix(self.blocks[index], name).shape
            for index, anatomy in enumerate(self.anatomy)
            for name in anatomy.linears
        }

    @cached_property
    def kinds(self) -> list[Kind]:
        """What each block has; alike for most."""
        return [
            tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()) for block in self.blocks
        ]

    @contextmanager
    def watched(self, index: int, names: Sequence[str], see: See) -> Iterator[None]:
        """Inside, `see` is shown what the named modules and experts' matrices of block `index`, loaded, get and give.

        Experts run one after another meanwhile: the implementations that batch them show no inputs.
        """
        before = self.model.config._experts_implementation
        if self.anatomy[index].experts:
            self.model.set_experts_implementation("eager")
        try:
            with watched(self.blocks[index], names, see):
                yield
        finally:
            if self.anatomy[index].experts:
                self.model.set_experts_implementation(before)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A parameter by its module name, as stored, in runs of rows. For those the file holds as they are."""
        return self.checkpoint.tensors[self.key_of[name]].chunks()

    def stored_dtype(self, key: str, requested: str = "auto") -> torch.dtype:
        """dtype to write a tensor in: the requested one, or what the checkpoint has it (or most of itself) in."""
        if requested != "auto":
            dtype: torch.dtype = getattr(torch, requested)
            return dtype
        stored = self.checkpoint.tensors.get(key)
        return stored.dtype if stored else self.checkpoint.main_dtype

    @property
    def head_is_tied(self) -> bool:
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
            for part in parts:
                release(self.model.get_submodule(part))
            self.model.tie_weights(recompute_mapping=False)

    def _require_weights(self, parts: Sequence[str]) -> None:
        for part in parts:
            for name, parameter in self.model.get_submodule(part).named_parameters():
                parameter.requires_grad_(False)
                if parameter.is_meta:
                    raise UserError(f"{self.checkpoint.path} lacks {part}.{name}, which its config calls for")

    @contextmanager
    def block(self, index: int, step: int = 1) -> Iterator[nn.Module]:
        """Block `index` with its weights in memory; those of the one `step` further come meanwhile."""
        with self.loaded([self.family.block(index)]):
            self.ahead.ask(self.keys_of.get(self.family.block(index + step), []))
            yield self.blocks[index]
        return_freed_memory()

    @contextmanager
    def placed(self, part: str, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A part with the given weights, by name within it, inside the context; they may be wider than its config says.

        Linears' weights are [out, in], whatever the module has.
        Weights that are not given stay as they are; afterwards all are as they were.
        """
        module = self.model.get_submodule(part)
        before = {name: (owner_of(module, name), module.get_parameter(name)) for name in tensors}
        try:
            for name, tensor in tensors.items():
                tensor = tensor.to(self.device, self.dtype)
                put(module, name, tensor.T if is_turned(module, name) else tensor)
            yield module
        finally:
            for name, (owner, parameter) in before.items():
                set_parameter(owner, name.rpartition(".")[2], parameter)

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor], hidden: HiddenStates | None = None) -> Stream:
        """Start a stream for batches of tokens [batch, time]: what enters block 0, and every block's arguments.

        hidden: where the hidden states are to wait between blocks; in memory by default.
        """
        stream = Stream([batch.to(self.device) for batch in batches], InMemory() if hidden is None else hidden)
        large = [name for name in self.family.embeddings[:1] if self._is_large(name)]
        others = (self.family.final_norm, self.family.head, *large)
        with ExitStack() as stack:
            stack.enter_context(self.loaded([part for part in self.outside if part not in others]))
            for name in large:
                module = self.model.get_submodule(name)
                stored = self.checkpoint.tensors[self.key_of[f"{name}.weight"]]
                stack.enter_context(looked_up(module, stored, self.device, self.dtype))
            for tokens in stream.tokens:
                first, calls = self._record(tokens)
                stream.hidden.append(first)
                stream.calls.append([reuse(call, index, stream.calls) for index, call in enumerate(calls)])
        return stream

    def _is_large(self, name: str) -> bool:
        """Whether an embedding is to stay on disk while tokens are embedded."""
        stored = self.checkpoint.tensors.get(self.key_of.get(f"{name}.weight", ""))
        is_table = isinstance(self.model.get_submodule(name), nn.Embedding)
        return stored is not None and is_table and stored.nbytes > LARGE_TABLE

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        calls: dict[int, BlockCall] = {}
        first: list[Tensor] = []

        def recorder(index: int) -> Any:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index in calls:
                    raise UserError(f"{self.config.model_type!r} calls block {index} more than once: not supported")
                calls[index] = BlockCall(args, kwargs)
                first.append(hidden_states)
                if len(calls) == len(self.blocks):
                    raise _Stop
                return self._returned(hidden_states)

            return forward

        with self._replaced([recorder(index) for index in range(len(self.blocks))]):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _Stop:
                return first[0], [calls[index] for index in range(len(self.blocks))]
        raise UserError(f"{self.config.model_type!r} ran {len(calls)} of its {len(self.blocks)} blocks: not supported")

    @contextmanager
    def _replaced(self, forwards: Sequence[Any]) -> Iterator[None]:
        for block, forward in zip(self.blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _returned(self, hidden: Tensor) -> Any:
        """Hidden states as this family's blocks return them."""
        return (hidden, None) if self.family.tuples else hidden

    def advance(
        self, index: int, stream: Stream, watch: Callable[[Tensor, Tensor], None] = lambda before, after: None
    ) -> None:
        """Run block `index` (its weights loaded) over the whole stream, in place; `watch` sees what goes in and out.

        Raises RunFailure naming the block when activations stop being finite.
        """
        for number, before in enumerate(stream.hidden):
            with torch.no_grad():
                after = self.run(index, before, stream.calls[number][index])
            watch(before, after)
            stream.hidden.replace(number, after)
        stream.hidden.turn()

    def observe(self, index: int, stream: Stream) -> None:
        """Run block `index` over the stream for what hooks on it see; the stream stays where it is."""
        for number, hidden in enumerate(stream.hidden):
            with torch.no_grad():
                self.run(index, hidden, stream.calls[number][index])

    @torch.no_grad()
    def inputs(
        self, index: int, stream: Stream, number: int, names: Sequence[str], hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the named modules of block `index` get of batch `number`, the block running no further than they need.

        Each [batch, time, width]. The name "" stands for what comes out of the block, and "name>" for what a module
        gives. hidden: the batch, where it was read already.
        """
        found: dict[str, Tensor] = {}
        hidden, block = stream.hidden[number] if hidden is None else hidden, self.blocks[index]

        def keep(name: str, tensor: Tensor) -> None:
            found[name] = tensor.reshape(*hidden.shape[:2], tensor.shape[-1])
            if len(found) == len(names):
                raise _Stop

        def given(_: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
            keep(name, args[0])

        def gives(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
            keep(name, output)

        with ExitStack() as stack, suppress(_Stop):
            for name in filter(None, names):
                module = block.get_submodule(name.removesuffix(">"))
                handle = (
                    module.register_forward_hook(partial(gives, name=name))
                    if name.endswith(">")
                    else module.register_forward_pre_hook(partial(given, name=name))
                )
                stack.callback(handle.remove)
            found[""] = self.run(index, hidden, stream.calls[number][index])
        return found

    def before(
        self, index: int, stream: Stream, number: int, writers: Sequence[str], reader: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [batch, time, hidden] of batch `number` in block `index` once these writers, its first,
        have added to it; and what another linear gets."""
        names = [*(f"{name}>" for name in writers), *([reader] if reader else [])]
        hidden = stream.hidden[number]
        found = self.inputs(index, stream, number, names, hidden) if names else {}
        for name in writers:
            hidden = hidden + found[f"{name}>"] * self.residual_scale
        return hidden, found.get(reader or "")

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

    def run(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Block `index` (its weights loaded) on one batch of hidden states [batch, time, hidden]."""
        out = self.blocks[index](hidden, *call.args, **call.kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if not torch.isfinite(out).all():
            raise RunFailure(
                f"activations leaving {self.family.block(index)} hold NaN or Inf in {self.dtype}: "
                "the weights are broken, or this dtype is too narrow for them"
            )
        return cast(Tensor, out)

    @torch.no_grad()
    def nll(self, stream: Stream) -> Tensor:
        """Negative log-likelihood of each window's tokens 1.. under the model: fp64 [windows], on the CPU."""
        sums = [torch.zeros(tokens.shape[0], dtype=torch.float64, device=self.device) for tokens in stream.tokens]
        for number, positions, logits in self.logits(stream):
            targets = stream.tokens[number][:, 1:][:, positions]
            if targets.shape[1]:
                sums[number] += window_nll(logits[:, : targets.shape[1]], targets)
            del logits  # before the next are computed
        return torch.cat(sums).cpu()

    def logits(self, stream: Stream) -> Iterator[tuple[int, slice, Tensor]]:
        """Logits [batch, positions, vocab] of a stream that went through all blocks: (batch number, positions, logits).

        As many positions at a time as make up to LARGE_LOGITS bytes in fp32, of each batch in turn. The model's own
        forward runs around the blocks, so scaling and soft-capping of logits are its own.
        """
        with self._head_loaded():
            for number, start, part in self._pieces(stream):
                with torch.no_grad():
                    logits = self._around_blocks(part)
                yield number, slice(start, start + part.shape[1]), logits
                del logits  # before the next are computed

    def differentiable_logits(self, stream: Stream) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch number, states [batch, positions, hidden], logits): the logits as a function of the hidden states."""
        with self._head_loaded():
            for number, _, part in self._pieces(stream):
                leaf = part.detach().clone().requires_grad_()
                with torch.enable_grad():
                    logits = self._around_blocks(leaf)
                yield number, leaf, logits

    def _head_loaded(self) -> AbstractContextManager[None]:
        others = [part for part in self.outside if part not in (self.family.embeddings[0], *self.head_parts)]
        return self.loaded([*others, *self.head_parts])

    def _pieces(self, stream: Stream) -> Iterator[tuple[int, int, Tensor]]:
        for number, hidden in enumerate(stream.hidden):
            step = max(1, LARGE_LOGITS // (4 * hidden.shape[0] * self.config.vocab_size))
            for start in range(0, hidden.shape[1], step):
                yield number, start, hidden[:, start : start + step]

    def _around_blocks(self, hidden: Tensor) -> Tensor:
        width = self.model.get_parameter(f"{self.family.embeddings[0]}.weight").shape[1]
        unused = hidden.new_zeros(*hidden.shape[:2], width)
        with self._replaced([lambda *args, **kwargs: self._returned(hidden)] * len(self.blocks)):
            logits: Tensor = self.model(inputs_embeds=unused, use_cache=False).logits
            return logits


def _parts_of(block: nn.Module) -> dict[str, int]:
    """Modules and parameters of a block, by name, each with the first of its sizes."""
    modules = {name: 0 for name, _ in block.named_modules()}
    return modules | {name: parameter.shape[0] for name, parameter in block.named_parameters()}
