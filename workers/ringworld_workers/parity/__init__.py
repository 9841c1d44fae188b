"""Parity: a job's own model and rows give one rank's loss and gradients on every ring.

``case`` says what is computed, ``compare`` computes it, ``report`` judges and tells; ``preflight``
does it on a stage's own workers before its first step.
"""
