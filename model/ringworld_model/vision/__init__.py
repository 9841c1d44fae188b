"""Vision tokenizers: frames to codes and back."""
