"""Stages of scripts/build_tiny.py: each builds one part of the embedded world from scratch, on a CPU."""
