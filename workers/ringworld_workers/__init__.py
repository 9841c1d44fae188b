"""How one rank trains: data, engine, train loop, checkpoints."""
