"""Asking a model: where it lies, its weights and tokenizers, and prompts of text and media."""
