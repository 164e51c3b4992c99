"""Modelling files for checkpoints that no stock class can express. Importing this registers them with transformers."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from slimlm.modeling.modeling_sliced_llama import SlicedLlamaConfig, SlicedLlamaForCausalLM

SLICED_LLAMA_FILE = Path(__file__).with_name("modeling_sliced_llama.py")

AutoConfig.register(SlicedLlamaConfig.model_type, SlicedLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(SlicedLlamaConfig, SlicedLlamaForCausalLM, exist_ok=True)

__all__ = ["SLICED_LLAMA_FILE", "SlicedLlamaConfig", "SlicedLlamaForCausalLM"]
