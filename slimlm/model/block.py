"""One block of a streamed model, and the linears in it that read the same input.

How a block's matrices are stored (GPT-2's transposed `Conv1D`, experts packed into one parameter) and what they are
called in the whole model is known here and in `linears.py`; methods see matrices [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from slimlm.device import return_freed_memory
from slimlm.errors import RunFailure
from slimlm.families import Family
from slimlm.linalg.finite import all_finite
from slimlm.model.linears import See, canonical, matrix, watched
from slimlm.model.stream import BlockCall, Stop, Stream

if TYPE_CHECKING:
    from slimlm.model.streamed import StreamedModel

Kind = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of a block's tensors
Watch = Callable[[Tensor, Tensor], None]  # (what goes into a block, what comes out): [batch, time, hidden] each


class Block:
    """Block number `index`: its module, without weights but inside `loaded`, and its family as that is in this block.

    facts: figures for the log about the walk that is under way; None where nothing is to be said of it.
    """

    def __init__(self, model: StreamedModel, index: int, module: nn.Module) -> None:
        self.model = model
        self.index = index
        self.module = module
        self.path = model.family.block(index)
        self.family: Family = model.family.in_block(_parts_of(module))
        self.facts: dict[str, float] | None = {}
        self._finite: list[Tensor] = []  # per batch since it was asked for, whether all that came out is

    @property
    def kind(self) -> Kind:
        """What it has; alike for most."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in self.module.state_dict().items())

    @property
    def groups(self) -> tuple[Group, ...]:
        """All that methods prune, linears of one input together."""
        return tuple(Group(self, names) for names in self.family.inputs)

    def group(self, *names: str) -> Group:
        """Linears of one input, by name."""
        return Group(self, names)

    @contextmanager
    def loaded(self, following: int | None = None) -> Iterator[Block]:
        """Its weights in memory, those of the following block, the next one by default, on their way."""
        with self.model.loaded([self.path]):
            self.model.fetch_ahead(self.index + 1 if following is None else following)
            yield self
        return_freed_memory()

    def unload(self) -> None:
        """Let go of the weights before `loaded` ends."""
        self.model.release([self.path])
        return_freed_memory()

    def weights(self) -> dict[str, Tensor]:
        """Parameters, loaded, by name within it; linears' weights as [out, in]. Views: writing to them writes there."""
        return {name: canonical(self.module, name) for name, _ in self.module.named_parameters()}

    def matrix(self, name: str) -> Tensor:
        """A linear's or an expert's matrix: a view [out, in]."""
        return matrix(self.module, name)

    def placed(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Inside, the block has these parameters, by name within it, linears' as [out, in] of whatever sizes; then what
        it had before. They are in the model's dtype there, or in another."""
        return self.model.placed(self.path, tensors, dtype)

    @contextmanager
    def watched(self, names: Sequence[str], see: See) -> Iterator[None]:
        """Inside, `see` is shown what the named modules and experts' matrices get and give when they run.

        Experts run one after another meanwhile: the implementations that batch them show no inputs.
        """
        with self.model.eager_experts() if self.family.experts else ExitStack(), watched(self.module, names, see):
            yield

    def run(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """The block, loaded, on one batch of hidden states: [batch, time, hidden], and so is what comes out.

        Raises RunFailure naming the block when that is not finite: at once on a CPU; asking a GPU would have it wait,
        so there it is after all batches.
        """
        out = self.module(hidden, *call.args, **call.kwargs)
        out = out[0] if isinstance(out, tuple) else out
        self._finite.append(all_finite(out))
        if out.device.type == "cpu":
            self.require_finite()
        return cast(Tensor, out)

    def require_finite(self) -> None:
        """Raises RunFailure where anything that came out since it was asked last is not."""
        found, self._finite = self._finite, []
        if found and not torch.stack(found).all():
            raise RunFailure(
                f"activations leaving {self.path} hold NaN or Inf in {self.model.dtype}: "
                "the weights are broken, or this dtype is too narrow for them"
            )

    @torch.no_grad()
    def outputs(self, stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        """What goes in and what comes out, [batch, time, hidden] each, batch by batch; the stream stays where it is."""
        for number, before in stream.batches():
            yield before, self.run(before, stream.calls[number][self.index])
        self.require_finite()

    def advance(self, stream: Stream, watch: Watch = lambda before, after: None) -> None:
        """Move the stream past the block; `watch` sees what goes in and out."""
        for number, before in stream.batches():
            with torch.no_grad():
                after = self.run(before, stream.calls[number][self.index])
            watch(before, after)
            stream.hidden.replace(number, after)
        self.require_finite()
        stream.hidden.turn()

    def observe(self, stream: Stream) -> None:
        """Run the stream through the block for what hooks see; it stays where it is."""
        for _ in self.outputs(stream):
            pass

    @torch.no_grad()
    def inputs(
        self, stream: Stream, number: int, names: Sequence[str], hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the named modules get of batch `number`, the block running no further than they need.

        Each [batch, time, width]. The name "" stands for what comes out of the block, and "name>" for what a module
        gives. hidden: the batch, where it was read already.
        """
        found: dict[str, Tensor] = {}
        hidden = stream.hidden[number] if hidden is None else hidden

        def keep(name: str, tensor: Tensor) -> None:
            found[name] = tensor.reshape(*hidden.shape[:2], tensor.shape[-1])
            if len(found) == len(names):
                raise Stop

        def given(_: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
            keep(name, args[0])

        def gives(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
            keep(name, output)

        with ExitStack() as stack, suppress(Stop):
            for name in filter(None, names):
                module = self.module.get_submodule(name.removesuffix(">"))
                handle = (
                    module.register_forward_hook(partial(gives, name=name))
                    if name.endswith(">")
                    else module.register_forward_pre_hook(partial(given, name=name))
                )
                stack.callback(handle.remove)
            found[""] = self.run(hidden, stream.calls[number][self.index])
        return found

    def before(
        self, stream: Stream, number: int, writers: Sequence[str], reader: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [batch, time, hidden] of batch `number` once these writers, the block's first, have added
        to it; and what another linear gets, or as `inputs` has it."""
        names = [*(f"{name}>" for name in writers), *([] if reader is None else [reader])]
        hidden = stream.hidden[number]
        found = self.inputs(stream, number, names, hidden) if names else {}
        for name in writers:
            hidden = hidden + found[f"{name}>"] * self.model.residual_scale
        return hidden, None if reader is None else found[reader]


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input, by their names within it; often one. Weights are [out, in]."""

    block: Block
    names: tuple[str, ...]

    @property
    def full_names(self) -> tuple[str, ...]:
        """Names in the whole model."""
        return tuple(f"{self.block.path}.{name}" for name in self.names)

    @property
    def first(self) -> str:
        """The one that is looked at for all."""
        return self.names[0]

    @property
    def is_expert(self) -> bool:
        """Whether it is of a mixture's expert."""
        experts = self.block.family.experts
        return experts is not None and self.first.startswith(f"{experts.module}.")

    @property
    def matrices(self) -> list[Tensor]:
        """Views of the weights: [out, in] each."""
        return [self.block.matrix(name) for name in self.names]

    @property
    def rows(self) -> list[int]:
        """Outputs of each."""
        return [weight.shape[0] for weight in self.matrices]

    @property
    def inputs(self) -> int:
        """Inputs of all of them."""
        return int(self.block.matrix(self.first).shape[1])

    @property
    def elements(self) -> int:
        """Weights in all."""
        return sum(weight.numel() for weight in self.matrices)

    def tall(self, dtype: torch.dtype) -> Tensor:
        """Copies of the weights, one below the other: [sum of outs, in]."""
        return torch.cat([weight.to(dtype) for weight in self.matrices])

    def put(self, tall: Tensor) -> None:
        """Write tall: [sum of outs, in] to the weights."""
        for weight, found in zip(self.matrices, tall.split(self.rows), strict=True):
            weight.copy_(found)

    @property
    def cost(self) -> float:
        """Of solving for them by second-order methods, in whatever unit: a factorisation, and every output's row."""
        return float(self.inputs) ** 3 + self.elements * self.inputs

    def apart(self) -> list[Group]:
        """Each linear alone."""
        return [Group(self.block, (name,)) for name in self.names]


def _parts_of(module: nn.Module) -> dict[str, int]:
    """Modules and parameters of a block, by name, each with the first of its sizes."""
    modules = {name: 0 for name, _ in module.named_modules()}
    return modules | {name: parameter.shape[0] for name, parameter in module.named_parameters()}
