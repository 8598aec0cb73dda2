"""Options of the command: declared once, merged from defaults, preset, file and command line, checked early.

Nothing here imports torch, and nothing below the command imports this: options end in the command that read them.
"""

from .files import preset_names, preset_path, read_yaml, to_yaml
from .names import UsageError, nearest, unknown
from .parse import Parsed, build_parser, parse
from .resolve import Resolved, resolve
from .sample import Evaluate, Sample
from .schema import Option, by_any_name, options_of
from .train_dpo import TrainDpo
from .verbs import VERBS, Verb

__all__ = [
    "VERBS",
    "Evaluate",
    "Option",
    "Parsed",
    "Resolved",
    "Sample",
    "TrainDpo",
    "UsageError",
    "Verb",
    "build_parser",
    "by_any_name",
    "nearest",
    "options_of",
    "parse",
    "preset_names",
    "preset_path",
    "read_yaml",
    "resolve",
    "to_yaml",
    "unknown",
]
