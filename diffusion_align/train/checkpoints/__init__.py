"""Checkpoints: complete or absent on disk, verified when read, and a training run as their content."""
