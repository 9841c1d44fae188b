"""Stores of objects by key: folders and S3 buckets behind one protocol."""
