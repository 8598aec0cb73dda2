"""Lists what a preset needs, the licences, and what of it is on this disk. The internet is never used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_align.options import VERBS, resolve
from diffusion_align.origins import DATA_SETS, MODELS, PROMPT_LISTS, SHIPPED, STEP_AWARE
from diffusion_align.rewards.catalogue import CATALOGUE
from diffusion_align.rewards.spec import read_spec
from diffusion_align.system.network import offline

UNKNOWN = "unknown to this package: see its page on the hub"
CLIP_L = "timm/vit_large_patch14_clip_224.openai"  # where open_clip has OpenAI's ViT-L-14
_SHARDS = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class Need:
    """One thing that a run needs. `here`: it is on this disk. `how`: what fetches or makes it, or why it is missing."""

    what: str
    name: str
    here: bool
    licence: str
    size: str = ""
    how: str = ""
    by_itself: bool = True  # the run fetches it

    def line(self) -> str:
        if self.here:
            state = "here"
        else:
            size = f", {self.size}" if self.size else ""
            state = (
                f"not here{size}; the run fetches it, or `{self.how}` does"
                if self.by_itself
                else f"missing: {self.how}"
            )
        return f"{self.what:16} {self.name}: {state}; licence: {self.licence}"


def needs_of(preset: str) -> list[Need]:
    """What METHOD/NAME needs, in the order in which a run uses it."""
    method, _, name = preset.partition("/")
    verb = VERBS[f"train {method}"]
    options: Any = resolve(verb.options, verb.words, preset=name).options
    found = [_model(options)]
    for option, look in (
        ("dataset_name", _data),
        ("train_data_dir", _data),
        ("prompts", _prompts),
        ("preference_model", _step_aware),
    ):
        value = getattr(options, option, None)
        if value is not None:
            found.append(look(value))
    rewards = getattr(options, "reward", None)
    found += _rewards(rewards) if rewards is not None else []
    return found + list(_packages(options))


def report(presets: list[str]) -> list[str]:
    """Text lines that name for each preset what it needs and how much of it is on this disk."""
    lines: list[str] = []
    for preset in presets:
        needs = needs_of(preset)
        here = sum(need.here for need in needs)
        rest = [need for need in needs if not need.here]
        if not rest:
            end = "all of it is here"
        elif not all(need.by_itself for need in rest):
            end = f"{here} of {len(needs)} here; what is missing must be made or installed first"
        elif offline():
            end = f"{here} of {len(needs)} here; HF_HUB_OFFLINE is set, so a run fetches nothing"
        else:
            end = f"{here} of {len(needs)} here; the run fetches the rest"
        lines += [f"{preset}: {end}", *(f"  {need.line()}" for need in needs)]
    return lines


def _model(o: Any) -> Need:
    name = o.pretrained_model_name_or_path
    known = MODELS.get(name)
    licence = known.licence if known else UNKNOWN
    how = f"hf download {name}"
    here = name == "tiny" or Path(name).expanduser().is_dir() or _has_weights(_snapshot(name, "models", o.revision))
    return Need("model", name, here, licence, known.size if known else "", how)


def _data(name: str) -> Need:
    known = DATA_SETS.get(name)
    licence = known.licence if known else UNKNOWN
    if name == "tiny" or Path(name).expanduser().exists():
        return Need("data", name, True, licence)
    if known is None or known.make:
        how = f"it is not published; `{known.make}` makes a substitute" if known else "no such path here"
        if known is None and "/" in name:
            return Need("data", name, False, licence, how=f"hf download {name} --repo-type dataset")
        return Need("data", name, False, licence, how=how, by_itself=False)
    return Need(
        "data", name, _all_shards(_snapshot(known.repo, "datasets"), known.files[0]), licence, known.size,
        f"hf download {known.repo} --repo-type dataset --include '{known.files[0]}'",
    )  # fmt: skip


def _prompts(name: str) -> Need:
    if name == "tiny":
        return Need("prompts", name, True, "Apache-2.0")
    if name in SHIPPED:
        return Need("prompts", name, True, SHIPPED[name].licence)
    known = PROMPT_LISTS.get(name)
    if known is None or Path(name).expanduser().exists():
        return Need("prompts", name, Path(name).expanduser().exists(), "your own", how="no such file", by_itself=False)
    files = list(known.files.values())
    if known.sha256:
        here, how = _web_cache(known.sha256).is_file(), f"curl -LO {known.repo}/{files[0]}"
    else:
        here = _has(_snapshot(known.repo, "datasets"), files)
        how = f"hf download {known.repo} {' '.join(files)} --repo-type dataset"
    return Need("prompts", name, here, known.licence, known.size, how)


def _step_aware(name: str) -> Need:
    known = STEP_AWARE.get(name)
    if known is None or Path(name).expanduser().exists():
        here = Path(name).expanduser().exists()
        how = "no such file; `diffusion-align reward train-spm` trains one"
        return Need("preference model", name, here, "your own", how=how, by_itself=False)
    here = _has(_snapshot(known.repo, "models"), list(known.files))
    how = f"hf download {known.repo} {' '.join(known.files)}"
    return Need("preference model", name, here, known.licence, known.size, how)


def _rewards(text: str) -> list[Need]:
    found = []
    for part in read_spec(text).parts:
        entry = CATALOGUE.get(part.kind)
        if entry is None:
            found.append(Need("reward", part.at, True, UNKNOWN))
            continue
        size = f"{entry.gigabytes:g} GB" if entry.gigabytes else ""
        if part.at or entry.needs != "download":
            found.append(Need("reward", part.kind, True, entry.licence, size))
        elif entry.repo:
            snapshot = _snapshot(entry.repo, "models", part.revision)
            here = any(_has(snapshot, [file]) for file in entry.files)
            how = f"hf download {entry.repo} {entry.files[0]}"
            found.append(Need("reward", part.kind, here, entry.licence, size, how))
        else:  # clipscore, and aesthetic, whose head is downloaded from GitHub
            here = _has(_snapshot(CLIP_L, "models"), ["open_clip_model.safetensors"])
            here = here and (part.kind != "aesthetic" or any(_torch_cache().glob("*-sac*logos*ava1-l14-linearMSE.pth")))
            how = f"hf download {CLIP_L} open_clip_model.safetensors"
            found.append(Need("reward", part.kind, here, entry.licence, size, how))
    return found


def _packages(o: Any) -> Iterator[Need]:
    if getattr(o, "use_8bit_adam", False):
        how = "pip install 'diffusion_align[8bit]'"
        yield Need("package", "bitsandbytes", find_spec("bitsandbytes") is not None, "MIT", "", how, by_itself=False)
    for tracker in (o.report_to or "").split(","):
        if tracker:
            here, how = find_spec(tracker) is not None, f"pip install {tracker}"
            yield Need("package", tracker, here, UNKNOWN, "", how, by_itself=False)


def _torch_cache() -> Path:
    """torch.hub's folder of downloads, without torch."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def _web_cache(sha256: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "diffusion_align" / "prompts" / f"{sha256[:16]}.json"


def _snapshot(repo: str, kind: str, revision: str | None = None) -> Path | None:
    """The snapshot folder of a repository's revision in huggingface_hub's cache, or None if it is not there."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"{kind}--{repo.replace('/', '--')}"
    ref = home / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision or ""
    folder = home / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _has(snapshot: Path | None, files: list[str]) -> bool:
    # If a download did not finish, the link to its blob is broken.
    return snapshot is not None and all((snapshot / file).is_file() for file in files)


def _all_shards(snapshot: Path | None, pattern: str) -> bool:
    """Whether files match the pattern. If their names have the form i-of-N, all N of them must exist."""
    found = [path for path in snapshot.rglob(pattern) if path.is_file()] if snapshot else []
    numbers = [match.groups() for path in found if (match := _SHARDS.search(path.name))]
    return bool(found) and all(len(numbers) >= int(of) for _, of in numbers)


def _has_weights(snapshot: Path | None) -> bool:
    """Whether a pipeline's folder has the weights of each component that its index names."""
    if snapshot is None or not (snapshot / "model_index.json").is_file():
        return False
    index = json.loads((snapshot / "model_index.json").read_text(encoding="utf-8"))
    return all(
        any(path.is_file() for kind in ("*.safetensors", "*.bin") for path in (snapshot / component).glob(kind))
        for component in ("unet", "vae", "text_encoder", "text_encoder_2")
        if component in index
    )
