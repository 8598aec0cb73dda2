"""The engines of training and what they leave behind. A loop is a generator that yields after each optimizer step."""
