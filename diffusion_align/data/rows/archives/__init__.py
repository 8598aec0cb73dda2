"""Samples of archives, .tar and .zip. Nothing is extracted."""
