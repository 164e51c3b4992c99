"""What `slimlm bench` finds out: of each model, at each batch size."""

from dataclasses import asdict, dataclass

from slimlm.checkpoint.manifest import versions
from slimlm.evaluation.speed.shape_times import Prediction
from slimlm.evaluation.speed.timing import BatchSpeed
from slimlm.plain import Json
from slimlm.shown import Shown


@dataclass(frozen=True)
class ModelSpeed:
    """One model, with one kind of kernels. bytes: of its files of weights. flops: for each token of a prompt. zeros:
    share in its linears' weights. density, difference: with sparse kernels, the share of these weights that is
    multiplied, and how far logits are from those without. predicted: of decoding, from the shapes of its products.
    verdict: whether it is faster than the dense model, and why not."""

    name: str
    path: str
    kernels: str
    dtype: str
    parameters: int | None
    bytes: int
    flops: float | None
    zeros: float | None
    density: float | None
    difference: float | None
    batches: tuple[BatchSpeed, ...]
    predicted: tuple[Prediction | None, ...] = ()
    verdict: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench(Shown):
    """What was measured. models: each as stored and then, where it was run so, with sparse kernels. dense: what they
    are compared with."""

    models: tuple[ModelSpeed, ...]
    dense: ModelSpeed | None
    engine: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    clock: str
    seed: int
    device: str
    machine: str

    def describe(self) -> dict[str, Json]:
        """Ready for JSON, with the versions of what decides a figure."""
        return {**asdict(self), "versions": versions()}
