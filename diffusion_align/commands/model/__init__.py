"""Models as files: what they are, their conversion, and how commands load them."""
