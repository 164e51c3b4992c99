"""A model without its weights: every module in place, every parameter on the meta device."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from slimlm.checkpoint.code import forget_own_code, runs_own_code
from slimlm.checkpoint.hf_internals import INITIALISED, is_converted, module_names
from slimlm.checkpoint.reader import Checkpoint, read_config
from slimlm.checkpoint.task import refuse_other_task
from slimlm.errors import UserError, one_line

logger = logging.getLogger(__name__)

# Building a model, transformers changes torch for the whole process and then puts back what it found: its default
# dtype, its functions. Of two that build at once, the later would put back what the earlier had changed.
BUILDING = threading.RLock()
_here = threading.local()

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def load_config(path: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config. Raises UserError for one that transformers cannot read, that describes no causal language
    model, or whose classes are in code that comes with it and is not trusted."""
    values = read_config(path)
    refuse_other_task(path, values)
    runs_code = runs_own_code(path, values, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=runs_code)
    except Exception as error:  # config classes validate with whatever exception their fields raise
        raise UserError(f"{path / 'config.json'} cannot be read: {one_line(error)}") from error
    if not runs_code:
        forget_own_code(config)
    quantised = getattr(config, "quantization_config", None), values.get("quantization")  # MLX calls it so
    if any(value is not None for value in quantised):
        raise UserError(f"{path} is quantised already; give slimlm the original floating-point checkpoint")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"{path / 'config.json'}: dtype is {dtype!r}, which no model computes in")
    return config


def auto_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What `from_pretrained(dtype="auto")` computes in: the config's dtype, else what the weights say."""
    dtype: torch.dtype | None = getattr(config, "dtype", None)
    return dtype or checkpoint.auto_dtype


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises UserError where it has none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer backends raise whatever they please
        raise UserError(f"{path} has no tokenizer transformers can load: {one_line(error)}") from error


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM of `config` in eval mode, parameters on meta, buffers (RoPE frequencies) real.

    Raises UserError when the config describes a model that cannot be built.
    """
    try:
        with BUILDING, _empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # model classes raise anything from KeyError to RuntimeError on absurd sizes
        raise UserError(f"no {config.model_type!r} model can be built from its config: {one_line(error)}") from error
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


@contextmanager
def _empty_weights() -> Iterator[None]:
    """Inside, modules that this thread makes have their parameters on meta."""
    _here.empty = True
    try:
        yield
    finally:
        _here.empty = False


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or not getattr(_here, "empty", False):
        return None  # as it is
    empty = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    setattr(empty, INITIALISED, True)
    return empty


register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]  # for all threads, but see _emptied


def refuse_absurd_sizes(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Raises UserError for sizes no checkpoint like this one can have, before a model of that size is built."""
    for name in SIZES:
        value = getattr(config, name, None)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= checkpoint.elements:
            raise UserError(f"{checkpoint.path / 'config.json'}: {name} is {value!r}, which no model like this has")
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise UserError(
            f"{checkpoint.path / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, "
            f"but the weights are {len(checkpoint.tensors)} tensors"
        )
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    if config.vocab_size * width > checkpoint.elements:
        raise UserError(
            f"{checkpoint.path / 'config.json'}: a vocabulary of {config.vocab_size} by hidden_size {width} is "
            f"more than the weights hold ({checkpoint.elements} parameters)"
        )


def use_only_known(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Have the checkpoint forget the tensors that the model does not know; they are logged. transformers ignores them
    too."""
    names, _ = module_names(model, checkpoint.tensors)
    state = model.state_dict().keys()
    if unknown := sorted(key for key, name in names.items() if name not in state):
        logger.warning("%s holds tensors its architecture does not use: %s", checkpoint.path, _some(unknown))
    checkpoint.use_only([key for key, name in names.items() if name in state])


def check_against_skeleton(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raises UserError when the checkpoint lacks a tensor the model needs or holds one of another shape or kind."""
    state = model.state_dict()
    names, converted = module_names(model, checkpoint.tensors)
    unreadable, _ = module_names(model, checkpoint.unreadable)
    for key, name in unreadable.items():
        if name in state:
            raise UserError(checkpoint.unreadable[key])
    missing = sorted(state.keys() - names.values() - model.all_tied_weights_keys.keys())
    _refuse_missing(checkpoint, model, [name for name in missing if not (converted and is_converted(model, name))])
    for key, name in names.items():
        expected = tuple(state[name].shape)
        stored = checkpoint.tensors[key]
        if not converted and stored.shape != expected:
            raise UserError(
                f"tensor {key} in {stored.path} has shape {list(stored.shape)}, its config calls for {list(expected)}"
            )
        if state[name].is_floating_point() and not stored.dtype.is_floating_point:
            raise UserError(f"tensor {key} in {stored.path} is stored as {stored.dtype}, not as floating-point numbers")
    _check_tied(checkpoint, model, {name: key for key, name in names.items()})


def _refuse_missing(checkpoint: Checkpoint, model: PreTrainedModel, missing: list[str]) -> None:
    """Raises UserError for names that are missing. A head that is not there transformers would make of random numbers,
    and call it a causal language model."""
    if not missing:
        return
    head = model.get_output_embeddings()
    if all(model.get_submodule(name.rpartition(".")[0]) is head for name in missing):
        raise UserError(
            f"{checkpoint.path} has no head ({_some(missing)}), and its config ties none to the embedding: give the "
            f"causal language model; this is a base model, of which {type(model).__name__} would predict nothing"
        )
    again = ": its index lists more than its files hold, fetch it again" if checkpoint.absent else ""
    raise UserError(f"{checkpoint.path} lacks {_some(missing)}, which its config calls for{again}")


def _check_tied(checkpoint: Checkpoint, model: PreTrainedModel, keys: dict[str, str]) -> None:
    for target, source in model.all_tied_weights_keys.items():
        if (
            target in keys
            and source in keys
            and not torch.equal(checkpoint.read(keys[target]), checkpoint.read(keys[source]))
        ):
            raise UserError(
                f"{checkpoint.path}: config ties {target} to {source}, but the files hold different values for them; "
                "set tie_word_embeddings to false in config.json if the untied ones are meant"
            )


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters of a skeleton, tied tensors counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
