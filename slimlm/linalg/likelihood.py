"""What a model's logits make of the tokens that came."""

from typing import Annotated, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, kl_div

LOSS_CHUNK = 2048
TINY = 1e-6  # of probability, below which nothing is left
CACHED, LARGE = 1 << 20, 1 << 27  # logits at a time: what stays in a CPU's cache, and what keeps a GPU busy


def window_nll(
    logits: Annotated[Tensor, "batch time vocab"], targets: Annotated[Tensor, "batch time", int]
) -> Annotated[Tensor, "batch"]:
    """Negative log-likelihood of each window's targets under its logits, fp64."""
    windows = []
    for scores, wanted in zip(
        logits, targets, strict=True
    ):  # a window at a time: logits are the largest tensor there is
        parts = zip(scores.split(LOSS_CHUNK), wanted.split(LOSS_CHUNK), strict=True)
        windows.append(
            sum(cross_entropy(part.float(), target, reduction="none").double().sum() for part, target in parts)
        )
    return torch.stack([torch.as_tensor(window, dtype=torch.float64) for window in windows])


class Likeliest(NamedTuple):
    """Of distributions, the outcomes that are likeliest, and what each has. tokens: int32; logs: fp32, in nats."""

    tokens: Annotated[Tensor, "*positions k"]
    logs: Annotated[Tensor, "*positions k"]

    @classmethod
    def of(cls, logits: Annotated[Tensor, "*positions vocabulary"], count: int) -> "Likeliest":
        """`count` of each."""
        logs, tokens = logits.float().log_softmax(-1).topk(count)
        return cls(tokens.to(torch.int32), logs)

    def at(self, places: Annotated[Tensor, "some", int], device: torch.device) -> "Likeliest":
        """Those of some positions, elsewhere."""
        return Likeliest(self.tokens[places].to(device), self.logs[places].to(device))

    def among(self, logs: Annotated[Tensor, "*positions vocabulary"]) -> Annotated[Tensor, "*positions vocabulary"]:
        """The distributions as logs, what is left of each shared out as another one, given by logs, has it."""
        tokens, own = self.tokens.long(), self.logs
        rest = (1 - own.exp().sum(-1, keepdim=True)).clamp_min(TINY).log()
        others = logs.scatter(-1, tokens, -torch.inf)
        return (others + (rest - others.logsumexp(-1, keepdim=True))).scatter(-1, tokens, own)


class _Context(Protocol):
    """What autograd keeps of a function's call."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Tensors, of any shape, for the gradient."""


class _Divergence(torch.autograd.Function):
    """Its gradient, softmax(logits) - softmax(wanted), is made beside it, a chunk at a time: logits are the largest
    tensors there are, and autograd would keep several of their size."""

    @staticmethod
    def forward(ctx: _Context, logits: Tensor, *wanted: Tensor) -> Tensor:
        """wanted: logits, or what `Likeliest` holds."""
        vocabulary, needed = logits.shape[-1], ctx.needs_input_grad[0]
        rows = max(1, (CACHED if logits.device.type == "cpu" else LARGE) // vocabulary)
        parts = [one.reshape(-1, one.shape[-1]).split(rows) for one in (logits, *wanted)]
        slopes, sums = list[Tensor](), list[Tensor]()
        for part, *given in zip(*parts, strict=True):
            got = part.float().log_softmax(-1)
            target = Likeliest(*given).among(got) if len(given) > 1 else given[0].float().log_softmax(-1)
            sums.append(kl_div(got, target, reduction="sum", log_target=True))
            if needed:
                slopes.append(got.exp_().sub_(target.exp_()).to(logits.dtype))
        if needed:
            ctx.save_for_backward(torch.cat(slopes).view_as(logits))
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Of the logits alone."""
        (slopes,) = ctx.saved_tensors
        return slopes * slope, *[None] * (len(ctx.needs_input_grad) - 1)


def divergence(
    logits: Annotated[Tensor, "*positions vocabulary"], wanted: Annotated[Tensor, "*positions vocabulary"] | Likeliest
) -> Annotated[Tensor, ""]:
    """KL(wanted || logits) of next-token distributions, summed over all positions, in fp32 and nats (distillation,
    arXiv 1503.02531, at temperature 1). `wanted`, logits, is taken to be constant. Of `Likeliest`, what is left of
    each distribution counts as one outcome."""
    given = wanted if isinstance(wanted, Likeliest) else (wanted,)
    total: Tensor = _Divergence.apply(logits, *given)  # type: ignore[no-untyped-call]
    return total
