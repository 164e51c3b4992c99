"""What steps are made of gradients: AdamW, and M-FAC. Each says what it remembers, so that another process goes on."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor

from slimlm.linalg.window import GradientWindow

BETAS = (0.9, 0.95)
Named = Mapping[str, Annotated[Tensor, "..."]]
Changed = Mapping[str, Tensor]


class Optimizer(Protocol):
    """Steps of some parameters, by name. remembers: the kinds of what it remembers."""

    remembers: ClassVar[tuple[str, ...]]

    def update(self, rate: float) -> None:
        """A step by the gradients that the parameters hold."""

    def memory(self) -> dict[str, Named]:
        """What it remembers after a step, by kind and name: [...] each."""

    def go_on(self, step: int, memory: Mapping[str, Named]) -> None:
        """From what another one, that had done some steps, remembered: [...] each."""


class Adam:
    """PyTorch's AdamW without weight decay."""

    remembers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: Changed) -> None:
        """parameters: [...] by name."""
        self.parameters = parameters
        self.adam = torch.optim.AdamW(parameters.values(), betas=BETAS, weight_decay=0.0, fused=True)

    def update(self, rate: float) -> None:
        """A step by the gradients that the parameters hold."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()

    def memory(self) -> dict[str, Named]:
        """Both moments: [...] each."""
        state, parameters = self.adam.state, self.parameters.items()
        return {kind: {name: state[one][kind] for name, one in parameters} for kind in self.remembers}

    def go_on(self, step: int, memory: Mapping[str, Named]) -> None:
        """With both moments: [...] each."""
        for name, one in self.parameters.items():
            moments = {kind: found[name].to(one.device) for kind, found in memory.items()}
            self.adam.state[one] = {"step": torch.tensor(step, dtype=torch.float32, device=one.device), **moments}


class MFAC:
    """Down the gradient times the inverse Fisher matrix of the last ones, this one among them, averaged over steps
    (arXiv 2107.03356, section 4.2; as there, an average that starts at zero)."""

    remembers: ClassVar[tuple[str, ...]] = ("gradients", "products", "average")

    def __init__(self, parameters: Changed, count: int, damping: float, size: int = 0) -> None:
        """parameters: [...] by name. count, damping, size: of the window, which see."""
        self.parameters, self.step = parameters, 0
        (first, *_), length = parameters.values(), sum(one.numel() for one in parameters.values())
        self.average = torch.zeros(length, dtype=first.dtype, device=first.device)
        self.window = GradientWindow(self.average, count, damping, size)

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """A step by the gradients that the parameters hold. Raises ValueError for any that are not finite."""
        parameters = self.parameters.values()
        gradient = torch.cat([one.grad.flatten() for one in parameters if one.grad is not None])
        inner = self.window.replace(self.step % self.window.count, gradient)
        self.average.lerp_(self.window.times(gradient, inner), 1 - BETAS[0])
        self.step += 1
        for one, change in zip(parameters, self.average.split([one.numel() for one in parameters]), strict=True):
            one.sub_(change.view_as(one), alpha=rate)

    def memory(self) -> dict[str, Named]:
        """The window and the average: [...] each."""
        window = self.window
        found = {"gradients": window.gradients, "products": window.products, "average": self.average}
        return {kind: {"all": tensor} for kind, tensor in found.items()}

    def go_on(self, step: int, memory: Mapping[str, Named]) -> None:
        """With these: [...] each."""
        self.step = step
        for kind, found in self.memory().items():
            found["all"].copy_(memory[kind]["all"])
