"""What to train: job specs and data recipes, validated without torch or Ray."""
