"""What a student is trained by: token distributions in, sums over tokens out."""

from torch import Tensor
from torch.nn.functional import cross_entropy


def text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of a text's tokens 1.., [windows, time], summed: [] in fp32, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
