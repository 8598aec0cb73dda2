"""Captions that are longer than a text encoder reads, in one line of text."""


def describe_long_captions(cut: int, of: int, limit: int) -> str:
    """A line aligned with those of a plan. `limit` counts tokens, begin and end of text among them."""
    reads = f"the {limit} tokens that the text encoder reads"
    if not cut:
        return f"captions         all {of} fit {reads}"
    return f"captions         {cut} of {of} are longer than {reads}: the rest of each is cut off"
