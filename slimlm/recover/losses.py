"""What a student is trained by: token distributions in, sums over tokens out."""

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || logits) of next-token distributions, [windows, time, vocabulary] each, summed over all positions: []
    in fp32, in nats (distillation, arXiv 1503.02531, at temperature 1)."""
    got, target = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return kl_div(got, target, reduction="sum", log_target=True)


def text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of a text's tokens 1.., [windows, time], summed: [] in fp32, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
