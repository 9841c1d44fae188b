"""The words of a conversation, as the Large World Model was trained on them."""

CHAT_SYSTEM = "You are a helpful assistant."
"""The line before a conversation."""
USER_PREFIX = "USER:"
"""What comes before a question."""
ASSISTANT_PREFIX = "ASSISTANT:"
"""What comes before an answer."""
