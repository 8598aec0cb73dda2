"""The options of all commands: declared once, merged from defaults, preset, file and command line, and checked.

Nothing here imports torch.
"""

from .annotate import Annotate
from .data import DataCheck, DataConvert, DataInspect
from .export import Export
from .names import UsageError, nearest, unknown
from .reading.files import all_presets, preset_names, preset_path, read_yaml, to_yaml
from .reading.parse import Parsed, build_parser, parse
from .reading.resolve import Resolved, resolve
from .reward import RewardScore, RewardServe
from .sample import Evaluate, Sample
from .schema import Option, by_any_name, options_of
from .synth import Synth
from .train.common import GivenPictures, TrainCommon, TrainOffline, TrainUnet
from .train.d3po import TrainD3po
from .train.ddpo import TrainDdpo
from .train.dpo import TrainDpo
from .train.online import TrainOnline
from .train.prdp import TrainPrdp
from .train.rankdpo import TrainRankdpo
from .train.spm import TrainSpm
from .train.spo import TrainSpo
from .verb import Verb
from .verbs import VERBS

__all__ = [
    "VERBS",
    "Annotate",
    "DataCheck",
    "DataConvert",
    "DataInspect",
    "Evaluate",
    "Export",
    "GivenPictures",
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
    "TrainUnet",
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
