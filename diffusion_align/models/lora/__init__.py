"""LoRA files: the adapter of a run, and files of other programs read into one."""
