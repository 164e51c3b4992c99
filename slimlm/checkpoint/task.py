"""What a config says that its model is for. slimlm compresses causal language models, as transformers loads them."""

from collections.abc import Mapping
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from slimlm.checkpoint.kinds import CONFIG_NAME
from slimlm.errors import UserError
from slimlm.families import FAMILIES
from slimlm.plain import Json

OF_PARTS = ("text_config", "vision_config", "audio_config")  # of a multimodal model
CAUSAL = ("ForCausalLM", "LMHeadModel")
TEXT_PART = (
    'with `whole = AutoModelForImageTextToText.from_pretrained(DIR, dtype="auto"); text = '
    "AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)`, then `text.model, "
    "text.lm_head = whole.model.language_model, whole.lm_head; text.save_pretrained(NEW)`, and its tokenizer"
)


def refuse_other_task(path: Path, values: Mapping[str, Json]) -> None:
    """Raises UserError for a config, as it is written, of anything but a causal language model, saying what it is of.

    A base model passes: whether its head is tied or there is for its weights to say.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        tokenizers = {"tokenizer_class", "added_tokens_decoder", "model_max_length"} & values.keys()
        what = "is a tokenizer's" if tokenizers else "is empty" if not values else "names no model_type"
        raise UserError(f"{path / CONFIG_NAME} {what}: it is not a model's config; fetch the model's own")
    listed = values.get("architectures") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"{path / CONFIG_NAME}: architectures is {listed!r:.60}, not a list of class names")
    architectures: list[str] = listed
    named = f"{model_type!r}{f' ({architectures[0]})' if architectures else ''}"
    if any(isinstance(values.get(name), dict) for name in OF_PARTS):
        raise UserError(f"{path} is {named}, a multimodal model: {_text_part(values)}")
    if values.get("is_encoder_decoder") is True:
        raise UserError(f"{path} is {named}, an encoder-decoder: slimlm compresses decoder-only language models")
    known = (MODEL_MAPPING_NAMES.get(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    bases = [name for names in known if names for name in ((names,) if isinstance(names, str) else names)]
    if architectures and not any(name.endswith(CAUSAL) or name in bases for name in architectures):
        raise UserError(
            f"{path} is {named}, a model for another task, whose head slimlm would lose: it compresses causal language "
            "models (...ForCausalLM)"
        )


def _text_part(values: Mapping[str, Json]) -> str:
    text = values.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    inner = text_type or f"{values['model_type']}_text"
    if inner in FAMILIES:
        return f"save its text part, {inner!r}, {TEXT_PART}"
    if inner in CONFIG_MAPPING_NAMES:
        return f"slimlm knows no such, and not its text part, {inner!r}, either (`slimlm models` lists what it knows)"
    return "slimlm compresses language models alone (`slimlm models` lists those it knows)"
