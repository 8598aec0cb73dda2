"""What is said of captions that are longer than a text encoder reads."""


def describe_cut(cut: int, of: int, limit: int) -> str:
    """One line, aligned as those of a plan are. `limit` counts tokens, begin and end of text among them."""
    reads = f"the {limit} tokens that the text encoder reads"
    if not cut:
        return f"captions         all {of} fit {reads}"
    return f"captions         {cut} of {of} are longer than {reads}: the rest of each is cut off"
