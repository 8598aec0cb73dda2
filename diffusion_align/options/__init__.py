"""Options of the command: declared once, merged from defaults, preset, file and command line, checked early.

Nothing here imports torch, and nothing below the command imports this: options end in the command that read them.
"""

from .annotate import Annotate
from .data import DataCheck, DataConvert, DataInspect
from .files import all_presets, preset_names, preset_path, read_yaml, to_yaml
from .names import UsageError, nearest, unknown
from .parse import Parsed, build_parser, parse
from .resolve import Resolved, resolve
from .reward import RewardScore, RewardServe
from .sample import Evaluate, Sample
from .schema import Option, by_any_name, options_of
from .synth import Synth
from .train_common import TrainCommon, TrainOffline
from .train_dpo import TrainDpo
from .train_online import TrainD3po, TrainDdpo, TrainOnline, TrainPrdp, TrainSpo
from .train_rankdpo import TrainRankdpo
from .train_spm import TrainSpm
from .verbs import VERBS, Verb

__all__ = [
    "VERBS",
    "Annotate",
    "DataCheck",
    "DataConvert",
    "DataInspect",
    "Evaluate",
    "Option",
    "Parsed",
    "Resolved",
    "RewardScore",
    "RewardServe",
    "Sample",
    "Synth",
    "TrainDpo",
    "TrainCommon",
    "TrainD3po",
    "TrainDdpo",
    "TrainOffline",
    "TrainOnline",
    "TrainPrdp",
    "TrainRankdpo",
    "TrainSpm",
    "TrainSpo",
    "UsageError",
    "Verb",
    "all_presets",
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
