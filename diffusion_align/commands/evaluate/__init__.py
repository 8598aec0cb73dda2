"""`evaluate`: pictures of several models for the same prompts and noise, compared in a report."""
