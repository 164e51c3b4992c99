"""Modelling files for checkpoints that no stock class can express. Importing this registers them with transformers."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimlm.modeling import modeling_narrow, modeling_sliced

OWN_CLASSES: dict[type[PretrainedConfig], type[PreTrainedModel]] = {
    model.config_class: model
    for model in (
        modeling_sliced.SlicedLlamaForCausalLM,
        modeling_sliced.SlicedOPTForCausalLM,
        modeling_sliced.SlicedPhiForCausalLM,
        modeling_narrow.NarrowOPTForCausalLM,
        modeling_narrow.NarrowGPT2LMHeadModel,
        modeling_narrow.NarrowGPTNeoXForCausalLM,
        modeling_narrow.NarrowStableLmForCausalLM,
        modeling_narrow.NarrowFalconForCausalLM,
        modeling_narrow.NarrowBloomForCausalLM,
    )
}

for _config, _model in OWN_CLASSES.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    # Saved again, a model takes its file along.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")


def auto_map(config_class: type[PretrainedConfig]) -> dict[str, str]:
    """The entry of a config by which transformers finds these classes in the checkpoint's own file."""
    module = config_class.__module__.rpartition(".")[2]
    model_class = OWN_CLASSES[config_class]
    return {
        "AutoConfig": f"{module}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }


def own_files(config: PretrainedConfig) -> tuple[Path, ...]:
    """The modelling file that travels with a checkpoint of this config, if it is one of ours; the config is made to
    name it."""
    if type(config) not in OWN_CLASSES:
        return ()
    config.auto_map = auto_map(type(config))
    return (Path(__file__).with_name(f"{type(config).__module__.rpartition('.')[2]}.py"),)
