"""Lists of prompts that are fetched by name. Their sources stand in `origins`, and in assets/prompts/README.md."""

import hashlib
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.prompts import PROMPT_KEYS, Prompt, prompt_of, read_list
from diffusion_align.data.rows.known_layouts import PROMPT_LIST
from diffusion_align.data.rows.tables.columnar import parquet_rows, parquet_schema
from diffusion_align.data.rows.tables.table_rows import table_rows
from diffusion_align.origins import PROMPT_LISTS, PromptList
from diffusion_align.system.network import offline

_NAME = re.compile(r"(?P<name>[\w-]+)(/(?P<category>[\w-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class ListRequest:
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


def requested_list(text: str) -> ListRequest | None:
    """What a text asks for; None if it names no list that is fetched.

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
    return ListRequest(found["name"], found["category"], found["revision"])


def fetch_list(asked: ListRequest) -> tuple[list[Prompt], str]:
    """The prompts, fetched or from the hub's cache, and REPOSITORY@COMMIT, which is also in each prompt's `extra`.

    Raises:
        FileNotFoundError: a file cannot be fetched; with the command that fetches all of them.
        DataError: a file is no list of prompts.
    """
    known, revision, prompts = asked.benchmark, asked.revision, []
    source, seen = known.repo, set()
    for category, name in asked.files.items():
        if known.sha256:
            path = web_list(asked.name)
        else:
            path = _file(asked, name, revision)
            # The cache has a folder for each commit; the other files must be of the same commit.
            revision = path.parents[name.count("/")].name
            source = f"{known.repo}@{revision}"
        origin = {"list": asked.name, "source": source, "licence": known.licence}
        labels = {known.key: category} if category and known.key else {}
        for found in _prompts_once(path, seen) if known.once else read_list(path):
            categories = tuple(f"{key}: {value}" for key, value in labels.items()) or found.categories
            prompts.append(Prompt(found.text, categories, {**found.extra, **labels, **origin}))
    if not prompts:
        raise DataError(f"prompts {asked.name}: {source} holds no prompt")
    return prompts, source


def _prompts_once(path: Path, seen: set[str]) -> Iterator[Prompt]:
    """The prompts of a table of preferences that are not in `seen`, to which they are added, in order."""
    if path.suffix == ".parquet":
        names = parquet_schema(path).names
        columns = [name for name in names if name.lower() in PROMPT_KEYS][:1]
        rows: Iterator[Mapping[str, Any]] = iter(parquet_rows(path, columns)) if columns else iter(())
    else:
        rows = (raw.values for raw in table_rows(path, PROMPT_LIST) if not isinstance(raw, BadRow))
    for row in rows:
        prompt = prompt_of(row)
        if isinstance(prompt, Prompt) and prompt.text and prompt.text not in seen:
            seen.add(prompt.text)
            yield Prompt(prompt.text)


def web_cache(name: str) -> Path:
    """The file of a list that is fetched from a web address; it lies beside the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "diffusion_align" / "prompts" / f"{PROMPT_LISTS[name].sha256[:16]}.json"


def web_list(name: str) -> Path:
    """The one file of a list with a checksum, fetched once.

    Raises:
        FileNotFoundError: it could not be fetched; with the address.
        DataError: its checksum is not the known one.
    """
    known, path = PROMPT_LISTS[name], web_cache(name)
    url = f"{known.repo}/{next(iter(known.files.values()))}"
    if not path.is_file():
        try:
            if offline():
                raise OSError("HF_HUB_OFFLINE is set")
            with urllib.request.urlopen(url, timeout=60) as answer:  # https, from `origins`
                data = answer.read()
        except OSError as error:
            said = " ".join(str(error).split())[:100]
            raise FileNotFoundError(
                f"prompts {name}: {url} could not be fetched ({said}); fetch it by hand and give "
                f"its path in place of {name}"
            ) from error
        if hashlib.sha256(data).hexdigest() != known.sha256:
            raise DataError(f"prompts {name}: {url} is not the file that was published: its sha256 differs")
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{os.getpid()}-{path.name}")
        staged.write_bytes(data)
        os.replace(staged, path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != known.sha256:
        raise DataError(f"prompts {name}: {path} is damaged: remove it, and it is fetched again")
    return path


def _file(asked: ListRequest, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(asked.benchmark.repo, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's client raises a dozen kinds; each means that the file cannot be fetched
        online = "with HF_HUB_OFFLINE unset" if offline() else "when the hub answers"
        at = f" --revision {asked.revision}" if asked.revision else ""
        command = f"hf download {asked.benchmark.repo} {' '.join(asked.files.values())} --repo-type dataset{at}"
        raise FileNotFoundError(
            f"prompts {asked.name}: {name} is not in the hub's cache and could not be fetched "
            f"({type(error).__name__}); {online}, run `{command}`, or give a file of prompts"
        ) from error
