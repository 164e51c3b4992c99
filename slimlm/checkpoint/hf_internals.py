"""The only file that imports transformers' semi-private loading code; a test of the same name guards it.

transformers renames and fuses tensors between file and module (`core_model_loading`). Using the same code for a part
of a model keeps slimlm right for every checkpoint layout that `from_pretrained` understands.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from slimlm.checkpoint.shard import StoredTensor
from slimlm.errors import UserError
from slimlm.progress import Switch

INITIALISED = "_is_hf_initialized"  # set on a parameter: transformers has no random numbers for it
BARS = Switch(
    transformers_logging.is_progress_bar_enabled,
    transformers_logging.disable_progress_bar,
    transformers_logging.enable_progress_bar,
)


def module_names(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], bool]:
    """For each tensor name in the files, the name it gets in the module (the first one, where it is split).

    Also whether any tensor is fused or split on the way, in which case names and shapes are not one to one.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = {}
    converted = False
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        converted |= pattern is not None
        if name not in state and key in state:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
        names[key] = name
    return names, converted


def is_converted(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor of the module is fused or split from those in the files, under other names."""
    mapping = get_model_conversion_mapping(model)
    targets = [target for entry in mapping if isinstance(entry, WeightConverter) for target in entry.target_patterns]
    return any(target.strip("^$").replace("\\", "") in name for target in targets)


def load_tensors(
    model: PreTrainedModel, slices: Mapping[str, StoredTensor | Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Put the tensors behind `slices` (name in the files -> any shape, read or not) into the model's modules.

    Raises UserError when a tensor's shape is not the module's; transformers would put random weights there.
    """
    config = LoadStateDictConfig(
        device_map={"": device}, dtype=dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    with BARS.off():
        info, _ = convert_and_load_state_dict_in_model(model, dict(slices), config)
    model.__dict__.pop("_weight_conversions", None)  # of these tensors alone; names to save by are all the model's
    for name, found, expected in info.mismatched_keys:
        raise UserError(f"tensor {name} has shape {list(found)} in the checkpoint, {list(expected)} by its config")
    for name, error in info.conversion_errors.items():
        raise UserError(f"tensor {name} could not be converted: {error}")


def checkpoint_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module tensors, of any shape, under the names and in the layout that `save_pretrained` would write."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def release(module: nn.Module) -> None:
    """Give the memory of a module's parameters back, leaving meta tensors in their place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
