"""What people do with checkpoints besides training: list, verify, compare, copy."""
