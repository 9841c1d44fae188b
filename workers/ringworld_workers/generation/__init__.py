"""Asking a model: where it lies, its weights and tokenizers, and prompts of text and media."""

from ringworld_workers.generation.coder import Coder, load_coder
from ringworld_workers.generation.loading import (
    LoadedModel,
    choose_device,
    choose_dtype,
    load_model,
)
from ringworld_workers.generation.prompts import Clip, Image, chat_prompt, prompt_of
from ringworld_workers.generation.source import ModelSource, RequestError

__all__ = [
    "Clip",
    "Coder",
    "Image",
    "LoadedModel",
    "ModelSource",
    "RequestError",
    "chat_prompt",
    "choose_device",
    "choose_dtype",
    "load_coder",
    "load_model",
    "prompt_of",
]
