"""LoRA files: that of a run, and files of other programs read into one."""
