"""Lists of prompts that are fetched by name, out of the table in `origins`. None of them ships here.

Where each was looked up stands in assets/prompts/README.md.
"""

import hashlib
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.data.prompts import Prompt, prompts_once, read_list
from diffusion_align.data.raw_rows import DataError
from diffusion_align.origins import BENCHMARKS, PROMPT_LISTS, PromptList
from diffusion_align.system.network import offline

__all__ = ["BENCHMARKS", "PROMPT_LISTS", "Wanted", "fetch", "wanted"]

_NAME = re.compile(r"(?P<name>[\w-]+)(/(?P<category>[\w-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Wanted:
    """What a text such as hpdv2, hpdv2/photo or hpdv2@REVISION asks for."""

    name: str
    category: str | None
    revision: str | None

    @property
    def benchmark(self) -> PromptList:
        return PROMPT_LISTS[self.name]

    @property
    def files(self) -> dict[str, str]:
        """The files to fetch, by category."""
        files = self.benchmark.files
        return dict(files) if self.category is None else {self.category: files[self.category]}


def wanted(text: str) -> Wanted | None:
    """What a text asks for; None where it names no list that is fetched.

    Raises:
        DataError: a list that has no such category.
    """
    found = _NAME.fullmatch(text)
    if found is None or found["name"] not in PROMPT_LISTS:
        return None
    known = PROMPT_LISTS[found["name"]]
    categories = [name for name in known.files if name and known.key]
    if found["category"] is not None and found["category"] not in categories:
        has = ", ".join(categories) or "none"
        raise DataError(f"{found['name']} has no category {found['category']}; it has {has}")
    if found["revision"] is not None and known.sha256:
        raise DataError(f"{found['name']} is one known file and has no other revision")
    return Wanted(found["name"], found["category"], found["revision"])


def fetch(asked: Wanted) -> tuple[list[Prompt], str]:
    """The prompts, fetched or out of the hub's cache, and REPOSITORY@COMMIT; each prompt's `extra` says that too.

    Raises:
        FileNotFoundError: in one line, that the hub does not give a file, and the command that fetches all of them.
        DataError: a file is no list of prompts.
    """
    known, revision, prompts = asked.benchmark, asked.revision, []
    source, seen = known.repo, set()
    for category, name in asked.files.items():
        if known.sha256:
            path = web_list(asked.name)
        else:
            path = _file(asked, name, revision)
            # The cache has a folder a commit; the other files are to be of the same.
            revision = path.parents[name.count("/")].name
            source = f"{known.repo}@{revision}"
        origin = {"list": asked.name, "source": source, "licence": known.licence}
        labels = {known.key: category} if category and known.key else {}
        for found in prompts_once(path, seen) if known.once else read_list(path):
            categories = tuple(f"{key}: {value}" for key, value in labels.items()) or found.categories
            prompts.append(Prompt(found.text, categories, {**found.extra, **labels, **origin}))
    if not prompts:
        raise DataError(f"prompts {asked.name}: {source} holds no prompt")
    return prompts, source


def web_cache(name: str) -> Path:
    """Where a list that comes from an address on the web is kept: beside the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "diffusion_align" / "prompts" / f"{PROMPT_LISTS[name].sha256[:16]}.json"


def web_list(name: str) -> Path:
    """The one file of a list with a checksum, fetched once.

    Raises:
        FileNotFoundError: it could not be fetched; with the address.
        DataError: it is another file than the one known.
    """
    known, path = PROMPT_LISTS[name], web_cache(name)
    url = f"{known.repo}/{next(iter(known.files.values()))}"
    if not path.is_file():
        try:
            if offline():
                raise OSError("HF_HUB_OFFLINE is set")
            with urllib.request.urlopen(url, timeout=60) as answer:  # an address of ours, https
                data = answer.read()
        except OSError as error:
            said = " ".join(str(error).split())[:100]
            raise FileNotFoundError(
                f"prompts {name}: {url} could not be fetched ({said}); fetch it by hand and give its path as --prompts"
            ) from error
        if hashlib.sha256(data).hexdigest() != known.sha256:
            raise DataError(f"prompts {name}: {url} is not the file that was published: its sha256 is another")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{os.getpid()}-{path.name}")
        part.write_bytes(data)
        os.replace(part, path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != known.sha256:
        raise DataError(f"prompts {name}: {path} is damaged: remove it, and it is fetched again")
    return path


def _file(asked: Wanted, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(asked.benchmark.repo, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's client raises a dozen kinds; each means that the file is not to be had
        online = "with HF_HUB_OFFLINE unset" if offline() else "when the hub answers"
        at = f" --revision {asked.revision}" if asked.revision else ""
        command = f"hf download {asked.benchmark.repo} {' '.join(asked.files.values())} --repo-type dataset{at}"
        raise FileNotFoundError(
            f"prompts {asked.name}: {name} is not in the hub's cache and could not be fetched "
            f"({type(error).__name__}); {online}, run `{command}`, or give a file of prompts"
        ) from error
