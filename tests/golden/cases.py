"""Tiny runs that together touch what compression can do, in a form of their own, and how a recipe says them.

A case names a model of `models.py` (or `bundled`), the steps of its recipe, and the settings that all steps share.
"""

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
DATA = {"dataset": "tokens.npy", "num_calibration_samples": 24, "max_seq_length": 24, "batch_size": 6}
MEASURED = {"eval_text": "text.txt", "eval_windows": 3}
SHARED = {**DATA, **MEASURED}
FEW = {"dataset": "text.txt", "num_calibration_samples": 16, "max_seq_length": 32, **MEASURED}
SELF = {**SHARED, "dataset": "self"}
BF16 = {**SHARED, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """One run.

    before: steps of a command of its own, on whose result this one runs. stops: numbers of the progress's steps, those
    of checks before the run left out, at which it is interrupted, one after another; it is resumed after each.
    is_stored: whether what it gives is in the repository: of cases in which no mask hangs on how a sum is rounded.
    """

    name: str
    model: str
    steps: tuple[Settings, ...]
    shared: Settings = field(default_factory=lambda: SHARED)
    before: tuple[Settings, ...] = ()
    stops: tuple[int, ...] = ()
    is_stored: bool = False

    @property
    def wording(self) -> str:
        """What is run, to tell results of a case that has been changed since."""
        return repr((self.model, self.steps, self.shared, self.before, self.stops))


def flat(steps: tuple[Settings, ...], shared: Settings) -> Settings:
    """A recipe that has its first step's settings at the top, and `then` for the second."""
    first, *later = steps
    assert len(later) < 2, "a flat recipe has two steps at most"
    return {**shared, **first, **({"then": later[0]} if later else {})}


def stepwise(steps: tuple[Settings, ...], shared: Settings) -> Settings:
    """A recipe with a list of steps. `shots` and `schedule` stay in the step that they are given in."""
    return {**shared, "steps": [dict(step) for step in steps]}


def step(method: str, sparsity: float | None = None, **settings: Any) -> Settings:
    return {"method": method, **({} if sparsity is None else {"sparsity": sparsity}), **settings}


SLICING = [
    Case("slice", "llama", (step("slice", 0.25),), is_stored=True),
    Case("slice tied", "llama tied", (step("slice", 0.2),)),
    Case("slice bf16", "llama", (step("slice", 0.25),), BF16),
    Case("slice gpt2", "gpt2 tied", (step("slice", 0.2),)),
    Case("slice opt", "opt", (step("slice", 0.2),)),
    Case("slice gpt_neox", "gpt_neox", (step("slice", 0.2),)),
    Case("slice gemma2", "gemma2", (step("slice", 0.15),)),
    Case("slice olmo2", "olmo2", (step("slice", 0.15),), is_stored=True),
    Case("slice mixtral", "mixtral", (step("slice", 0.2),), is_stored=True),
    Case("slice text", "qwen2", (step("slice", 0.2),), FEW),
    Case("slice self", "llama", (step("slice", 0.2),), SELF),
    Case("slice shards", "qwen2", (step("slice", 0.17, round_to=8),), {**SHARED, "max_shard_size": "40KB"}),
    Case("slice refined", "llama", (step("slice", widths="hidden=24,mlp=40", refine=2),)),
    Case("slice mixture", "llama", (step("slice", 0.2, self_share=0.4),)),
    Case("slice no refit", "gpt2", (step("slice", 0.185, refit=False),), is_stored=True),
    Case("slice no refit unweighted", "llama", (step("slice", 0.1875, refit=False, weighting="none"),)),
    Case("slice per-block", "llama", (step("slice", 0.3731, basis="per-block"),)),
    Case("slice per-block opt", "opt", (step("slice", widths="hidden=24", basis="per-block"),), is_stored=True),
    Case("slice per-block no refit", "phi", (step("slice", widths="hidden=24", basis="per-block", refit=False),)),
    Case("slice budget hidden", "phi", (step("slice", 0.215, budget="hidden"),)),
    Case("slice unweighted", "qwen2", (step("slice", 0.2, weighting="none"),)),
    Case("slice widths", "llama", (step("slice", widths="hidden=24,mlp=32,groups=1,blocks=2"),), is_stored=True),
    Case("slice widths tied", "llama tied", (step("slice", widths="hidden=24,tied=1/hidden=24"),)),
    Case("slice widths choice", "mistral", (step("slice", widths="hidden=24/mlp=24/blocks=2"),)),
    Case("slice skip", "qwen2", (step("slice", 0.167, skip=["*.down_proj", "lm_head"]),)),
    Case("rotate", "llama", (step("rotate"),), is_stored=True),
    Case("rotate gpt_neox", "gpt_neox", (step("rotate", weighting="none"),)),
    Case("slice rotated", "llama", (step("slice", 0.2),), before=(step("rotate"),)),
    Case("slice rotated no refit", "llama", (step("slice", 0.1875, refit=False),), before=(step("rotate"),)),
]
PRUNING = [
    Case("slimlm", "llama", (step("slimlm", 0.5),), is_stored=True),
    Case("slimlm bf16", "qwen2", (step("slimlm", 0.5),), BF16),
    Case("slimlm 2:4", "gpt2 tied", (step("slimlm", pattern="2:4"),)),
    Case("slimlm tiles", "gpt2", (step("slimlm", 0.5, pattern="4x4"),)),
    Case("slimlm tiles as they are", "llama", (step("slimlm", 0.4, pattern="8x8", reorder=False),), is_stored=True),
    Case("slimlm refined", "opt", (step("slimlm", 0.5, refine=2),)),
    Case("slimlm refined tied", "opt tied", (step("slimlm", 0.5, refine=2),)),
    Case("slimlm no refit", "phi", (step("slimlm", 0.5, refit=False),)),
    Case("slimlm mixtral", "mixtral", (step("slimlm", 0.4),)),
    Case("slimlm olmo2", "olmo2", (step("slimlm", 0.5, skip=["*.q_proj"]),)),
    Case("slimlm solved", "llama", (step("slimlm", 0.4, allocation="solved"),), is_stored=True),
    Case("slimlm owl", "gemma2", (step("slimlm", 0.5, allocation="owl"),)),
    Case("slimlm alphapruning", "opt", (step("slimlm", 0.5, allocation="alphapruning"),)),
    Case("slimlm global", "qwen2", (step("slimlm", 0.5, allocation="global", fisher_samples=64),)),
    Case("slimlm fisher", "llama", (step("slimlm", 0.5, curvature="gram+fisher", fisher_samples=64),)),
    Case("slimlm no swaps", "gpt_neox", (step("slimlm", 0.5, swaps=0, mask="obs"),)),
    Case("sparsegpt", "llama", (step("sparsegpt", 0.5),)),
    Case("sparsegpt 2:4", "opt", (step("sparsegpt", pattern="2:4"),), is_stored=True),
    Case("sparsegpt tiles", "llama tied", (step("sparsegpt", 0.5, pattern="16x16"),)),
    Case("sparsegpt pq", "gemma3_text", (step("sparsegpt", 0.5, allocation="pq"),)),
    Case("obc", "llama", (step("obc", 0.5),)),
    Case("obc 2:4", "phi", (step("obc", pattern="2:4"),), is_stored=True),
    Case("mfac", "llama", (step("mfac", 0.5, fisher_samples=96),)),
    Case("mfac damped", "opt", (step("mfac", 0.5, fisher_samples=96, fisher_damping=2.0),), is_stored=True),
    Case("mfac sequence", "gpt2", (step("mfac", 0.5, fisher_samples=24, fisher_unit="sequence"),)),
    Case("mfac text labels", "qwen2", (step("mfac", 0.5, fisher_samples=64, fisher_labels="text"),)),
    Case("mfac mixtral", "mixtral", (step("mfac", 0.4, fisher_samples=96),)),
    Case("woodfisher", "llama", (step("woodfisher", 0.5, fisher_samples=64, fisher_damping=0.05),)),
    Case("wanda", "mistral", (step("wanda", 0.5),)),
    Case("wanda owl", "phi", (step("wanda", 0.5, allocation="owl"),), is_stored=True),
    Case("magnitude", "gpt2", (step("magnitude", 0.5),)),
    Case("magnitude global", "mixtral", (step("magnitude", 0.5, allocation="global"),)),
    Case("magnitude pattern", "llama tied", (step("magnitude", pattern="1:4"),), {**MEASURED, "max_seq_length": 24}),
]
SLICED, SPARSE = step("slice", widths="hidden=24,mlp=40"), step("slimlm", pattern="2:4")
MFAC = {"optimizer": "mfac", "mfac_gradients": 4, "mfac_damping": 0.01, "hidden_weight": 0.5}
RECOVERED = step("recover", tokens=1152, self_share=0.25, batch_size=4, learning_rate=0.003)
SHOTS = step("sparsegpt", 0.6, shots=3, schedule="cubic")
STAGES = [
    Case("slice then slimlm", "llama", (SLICED, SPARSE)),
    Case("slice then tiles", "qwen2", (step("slice", 0.25), step("sparsegpt", 0.5, pattern="4x4")), is_stored=True),
    Case("magnitude then slice", "gpt2", (step("magnitude", 0.3), step("slice", 0.2))),
    Case("shots", "llama", (SHOTS,)),
    Case("slice then recover", "llama tied", (SLICED, RECOVERED)),
    Case("slimlm then recover", "mixtral", (SPARSE, RECOVERED)),
    Case("slice then recover by mfac", "llama", (SLICED, RECOVERED | MFAC)),
    Case("slimlm then recover remembered", "llama", (SPARSE, RECOVERED | {"teacher_top_k": 16})),
    Case("shots then wanda", "opt", (step("magnitude", 0.4, shots=2, schedule="linear"), step("wanda", 0.6))),
]
RESUMED = [
    Case("slice resumed", "llama", (step("slice", 0.25),), stops=(2, 11, 8)),
    Case("slice refined resumed", "llama", (step("slice", 0.25, refine=2, self_share=0.5),), stops=(2, 14, 9)),
    Case("slice per-block resumed", "llama", (step("slice", 0.3731, basis="per-block"),), stops=(2,)),
    Case("slimlm resumed", "llama", (step("slimlm", 0.5),), stops=(2, 5)),
    Case("sparsegpt resumed", "llama", (step("sparsegpt", 0.5),), stops=(3,)),
    Case("mfac resumed", "llama", (step("mfac", 0.5, fisher_samples=96),), stops=(4, 8)),
    Case("slice then slimlm resumed", "llama", (SLICED, SPARSE), stops=(11, 15)),
    Case("slice then recover resumed", "llama", (SLICED, RECOVERED), stops=(11, 15, 8)),
    Case("shots resumed", "llama", (SHOTS,), stops=(11,)),
]
REAL = {"num_calibration_samples": 16, "max_seq_length": 64, "eval_windows": 4, "dataset": "text.txt"}
BUNDLED = [
    Case("bundled slice", "bundled", (step("slice", 0.25),), REAL),
    Case("bundled slimlm 2:4", "bundled", (step("slimlm", pattern="2:4", skip=["model.layers.[1-5]"]),), REAL),
]
CASES: dict[str, Case] = {case.name: case for case in [*SLICING, *PRUNING, *STAGES, *RESUMED, *BUNDLED]}
STORED = [case for case in CASES.values() if case.is_stored]
