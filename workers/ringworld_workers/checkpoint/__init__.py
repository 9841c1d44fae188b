"""Portable checkpoints: flat ranges, a manifest, any mesh."""
