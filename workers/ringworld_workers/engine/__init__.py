"""Sharding and optimizer steps behind one protocol."""
