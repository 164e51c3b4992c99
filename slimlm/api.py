"""What `import slimlm` offers beside the command line: a recipe carried out, or a model in memory made smaller."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import numpy
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from slimlm.compression import CompressResult
from slimlm.device import check_process
from slimlm.display import usual
from slimlm.errors import UserError
from slimlm.plain import Json
from slimlm.progress import Progress
from slimlm.recipe import Recipe, Setting, one_step
from slimlm.stages import compress as compress_recipe

Data = str | Path | Iterable[str | Mapping[str, Json]] | Tensor
How = str | Path | bool | Progress | None


@overload
def compress(recipe: Recipe, **how: How) -> CompressResult: ...
@overload
def compress(recipe: PreTrainedModel, *tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreTrainedModel: ...
def compress(recipe: Recipe | PreTrainedModel, *others: PreTrainedTokenizerBase, **settings: Any) -> Any:
    """Carry out a recipe (`slimlm.stages.compress` says how), or make a model that is in memory smaller.

    compress(model, tokenizer, sparsity=0.25, dataset=texts) returns a model of a stock class, in eval mode, with the
    dtype and on the device of the one given, which stays as it is. Settings are a recipe's; dataset may also be texts
    or rows, as a list, any iterable or a `datasets.Dataset`, or tokens [windows, time]. The manifest is the returned
    model's attribute `slimlm`.

    The same engine does it, from disk to disk: the model is saved to a temporary directory (in work_dir, where that is
    given) and the result read back. Beside the model given, which is the caller's, memory is what
    `slimlm compress --dry-run` says of the saved model, and in the end that of the result; the disk holds both for a
    while. Raises UserError and RunFailure like the command.
    """
    if isinstance(recipe, Recipe):
        return compress_recipe(recipe, *others, **settings)
    if not isinstance(recipe, PreTrainedModel):
        raise UserError(f"compress takes a Recipe or a transformers model, not a {type(recipe).__name__}")
    tokenizer = settings.pop("tokenizer", None) if not others else others[0]
    if tokenizer is None or len(others) > 1:
        raise UserError("compress(model, tokenizer, ...) needs the model's tokenizer, and settings by name")
    return _in_memory(recipe, tokenizer, **settings)


def _in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Data | None = None,
    progress: Progress | None = None,
    work_dir: Path | str | None = None,
    **settings: Setting,
) -> PreTrainedModel:
    check_process()
    if unknown := {"model", "output_dir", "revision"} & settings.keys():
        raise UserError(f"{unknown.pop()} is of no use for a model in memory")
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise UserError("the model has an adapter: merge it first (merge_and_unload)")
    progress = usual(progress)
    with tempfile.TemporaryDirectory(prefix="slimlm-", dir=work_dir) as place:
        source = Path(place) / "model"
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        progress.line(f"saving the model ({size / 1e6:,.1f} MB) to {source}; it stays in memory as well")
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        given: dict[str, Setting] = {} if dataset is None else {"dataset": _data_at(dataset, Path(place))}
        if isinstance(dataset, Tensor):
            given |= {"num_calibration_samples": dataset.shape[0], "max_seq_length": dataset.shape[1]}
        recipe = one_step(**{**given, **settings, "model": str(source), "output_dir": str(Path(place) / "out")})
        result = compress_recipe(recipe, progress=progress, work_dir=None if work_dir is None else Path(place))
        found = AutoModelForCausalLM.from_pretrained(
            result.output_dir, dtype="auto", trust_remote_code=result.manifest["needs_remote_code"]
        )
    found.config.name_or_path = model.config.name_or_path  # the directory it came from is gone
    name = str(model.config.name_or_path or type(model).__name__)
    found.slimlm = {**result.manifest, "model": {**result.manifest["model"], "name": name, "path": None}}
    return found.to(model.device).eval()


def _data_at(dataset: Data, place: Path) -> str:
    """Calibration data as a recipe names it. Raises UserError for tokens of another shape."""
    if isinstance(dataset, Tensor):
        if dataset.dim() != 2 or dataset.is_floating_point() or not dataset.numel():
            raise UserError(f"tokens are integers [windows, time], not {dataset.dtype} {list(dataset.shape)}")
        numpy.save(place / "tokens.npy", dataset.to("cpu", torch.int64).numpy())
        return str(place / "tokens.npy")
    if isinstance(dataset, (str, Path)):
        return str(dataset)
    with (place / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in dataset:
            file.write(json.dumps(row, default=_plain) + "\n")
    return str(place / "rows.jsonl")


def _plain(value: Any) -> Any:
    """Of an array its numbers; of anything else, which no document is made of, its words."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
