"""The embedded world: captions about coloured shapes, pictures of them, and a judge that reads the pictures."""

from .caption import Caption, Thing, held_out, parse, sample_captions
from .judge import ATTRIBUTES, judge, read_picture
from .render import render

__all__ = ["ATTRIBUTES", "Caption", "Thing", "held_out", "judge", "parse", "read_picture", "render", "sample_captions"]
