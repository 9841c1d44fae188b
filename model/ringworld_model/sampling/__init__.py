"""Which token comes next: settings, the grammar of frames, draws, and text as it comes."""

from ringworld_model.sampling.grammar import Allowed, Grammar, State
from ringworld_model.sampling.settings import DrawSettings, SamplingSettings
from ringworld_model.sampling.text_stream import TextStream

__all__ = ["Allowed", "DrawSettings", "Grammar", "SamplingSettings", "State", "TextStream"]
