"""The matrices inside a block as methods see them, [out, in] each, whatever module keeps them.

A linear's weight is one; GPT-2's `Conv1D` keeps it transposed; a mixture packs one for each expert into a parameter
[experts, out, in] and calls `linear` on its slices, which is where their inputs can be seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

See = Callable[[str, Tensor, Tensor], None]  # (name, input [..., in], output [..., out])


def is_turned(module: nn.Module, name: str) -> bool:
    """Whether a parameter, by its name within `module`, is stored transposed."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(owner), Conv1D)


def turned_shape(module: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape as stored, from that of a linear's weight as [out, in]; and the other way round."""
    return shape[::-1] if is_turned(module, name) else shape


def canonical(module: nn.Module, name: str) -> Tensor:
    """A parameter by its name within `module`; a linear's weight as [out, in]. A view: writing to it writes there."""
    owner, _, leaf = name.rpartition(".")
    parameter: Tensor = getattr(module.get_submodule(owner), leaf).detach()
    return parameter.T if is_turned(module, name) else parameter


def matrix(block: nn.Module, name: str) -> Tensor:
    """The matrix of a linear, or of an expert as in `mlp.experts.down_proj.3`: a view [out, in]."""
    packed, _, expert = name.rpartition(".")
    if expert.isdigit() and packed in dict(block.named_parameters()):
        return block.get_parameter(packed).detach()[int(expert)]
    return canonical(block, f"{name}.weight")


@contextmanager
def watched(block: nn.Module, names: Sequence[str], see: See) -> Iterator[None]:
    """Inside, `see` is shown what the named modules and experts' matrices of a block get and give, when they run.

    An expert that no token is routed to does not run.
    """
    experts = {matrix(block, name).data_ptr(): name for name in names if name.rpartition(".")[2].isdigit()}
    with ExitStack() as stack:
        for name in names:
            if name not in experts.values():
                handle = block.get_submodule(name).register_forward_hook(partial(_show, see=see, name=name))
                stack.callback(handle.remove)
        if experts:
            stack.enter_context(_Linears(experts, see))
        yield


def _show(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, see: See, name: str) -> None:
    see(name, args[0], output)


class _Linears(TorchFunctionMode):
    """Shows calls of `linear` with certain weights, told by where these are in memory."""

    def __init__(self, names: dict[int, str], see: See) -> None:
        super().__init__()
        self.names = names
        self.see = see

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        output = func(*args, **(kwargs or {}))
        if func is linear and (name := self.names.get(args[1].data_ptr())) is not None:
            self.see(name, args[0], output)
        return output
