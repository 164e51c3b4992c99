"""What a model's logits make of the tokens that came."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div

from slimlm.linalg.differentiable import Context, applied

TINY = 1e-6  # of probability, below which nothing is left
CACHED, LARGE = 1 << 20, 1 << 27  # logits at a time: what stays in a CPU's cache, and what keeps a GPU busy


def rows_at_once(logits: Annotated[Tensor, "*positions outcomes"], cached: int) -> int:
    """How many positions to work on at a time. cached: numbers that stay in a CPU's cache."""
    return max(1, (cached if logits.device.type == "cpu" else LARGE) // logits.shape[-1])


def window_nll(
    logits: Annotated[Tensor, "batch time vocab"], targets: Annotated[Tensor, "batch time", int]
) -> Annotated[Tensor, "batch"]:
    """Negative log-likelihood of each window's targets under its logits, fp64."""
    return token_figures(logits, targets)[:, 0].double().sum(-1)


def token_figures(
    logits: Annotated[Tensor, "batch time vocab"],
    targets: Annotated[Tensor, "batch time", int],
    dense: Annotated[Tensor, "batch time vocab"] | None = None,
) -> Annotated[Tensor, "batch figures time"]:
    """Of each target, fp32: its negative log-likelihood; with a dense model's logits also the one under these, KL(dense
    || this) of the two distributions, all in nats, and whether (1 or 0) both find the same token likeliest."""
    models = [logits] if dense is None else [logits, dense]
    rows = rows_at_once(logits, CACHED)
    windows = []
    for wanted, *own in zip(targets, *models, strict=True):  # logits are the largest tensors there are: no copy of all
        pieces = zip(wanted.split(rows), *(one.split(rows) for one in own), strict=True)
        found = [_figures([part.float().log_softmax(-1) for part in parts], some[:, None]) for some, *parts in pieces]
        windows.append(torch.cat(found).T)
    return torch.stack(windows)


def _figures(logs: list[Tensor], wanted: Tensor) -> Tensor:
    """logs: [positions, vocab] of one model or two. wanted: [positions, 1]."""
    figures = [-log.gather(-1, wanted) for log in logs]
    if len(logs) > 1:
        own, dense = logs
        terms = kl_div(own, dense, reduction="none", log_target=True).masked_fill_(dense == -torch.inf, 0)
        figures.append(terms.sum(-1, keepdim=True))
        figures.append((own.argmax(-1, keepdim=True) == dense.argmax(-1, keepdim=True)).float())
    return torch.cat(figures, dim=-1)


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


class _Divergence(torch.autograd.Function):
    """Its gradient, softmax(logits) - softmax(wanted), is made beside it, a chunk at a time: logits are the largest
    tensors there are, and autograd would keep several of their size."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, *wanted: Tensor) -> Tensor:
        """wanted: logits, or what `Likeliest` holds."""
        needed, rows = ctx.needs_input_grad[0], rows_at_once(logits, CACHED)
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
    def backward(ctx: Context, slope: Tensor) -> tuple[Tensor | None, ...]:
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
    return applied(_Divergence, logits, *given)
