"""The training engines, their checkpoints and metrics. A loop is a generator that yields after each optimizer step."""
