"""Lists of prompts that are fetched by name, where they lie, and what their licences are. None of them ships here.

Where each was looked up stands in assets/prompts/README.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.data.prompts import Prompt, read_list
from diffusion_align.data.readers import DataError
from diffusion_align.offline import offline

STYLES = ("anime", "concept-art", "paintings", "photo")
ATTRIBUTES = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")


def _validation(attribute: str) -> str:
    # The data set's splits are named by what follows the first underscore of a configuration's name.
    name = f"{attribute}_val"
    return f"{name}/{name.split('_', 1)[1]}-00000-of-00001.parquet"


@dataclass(frozen=True)
class Benchmark:
    """`files` are by category, which a list of one file has under ""; `key` is what its rows call the category."""

    repo: str
    files: Mapping[str, str]
    prompts: int
    licence: str
    key: str = "category"


BENCHMARKS = {
    "hpdv2": Benchmark(
        "ymhao/HPDv2", {style: f"benchmark/{style}.json" for style in STYLES}, 3200, "Apache-2.0", key="style"
    ),
    "drawbench": Benchmark(
        "Jialuo21/DrawBench", {"": "data/test-00000-of-00001.parquet"}, 200, "none stated, by its authors or this copy"
    ),
    "t2i-compbench": Benchmark(
        "NinaKarine/t2i-compbench", {name: _validation(name) for name in ATTRIBUTES}, 2400, "MIT"
    ),
    "dpg-bench": Benchmark(
        "Jialuo21/DPG-Bench",
        {"": "data/test-00000-of-00001.parquet"},
        1065,
        "Apache-2.0 (its authors' repository; this copy states none)",
    ),
}
_NAME = re.compile(r"(?P<name>[\w-]+)(/(?P<category>[\w-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Wanted:
    """What a text such as hpdv2, hpdv2/photo or hpdv2@REVISION asks for."""

    name: str
    category: str | None
    revision: str | None

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]

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
    if found is None or found["name"] not in BENCHMARKS:
        return None
    files = BENCHMARKS[found["name"]].files
    if found["category"] is not None and found["category"] not in set(files) - {""}:
        has = ", ".join(name for name in files if name) or "none"
        raise DataError(f"{found['name']} has no category {found['category']}; it has {has}")
    return Wanted(found["name"], found["category"], found["revision"])


def fetch(asked: Wanted) -> tuple[list[Prompt], str]:
    """The prompts, fetched or out of the hub's cache, and REPOSITORY@COMMIT; each prompt's `extra` says that too.

    Raises:
        FileNotFoundError: in one line, that the hub does not give a file, and the command that fetches all of them.
        DataError: a file is no list of prompts.
    """
    known, revision, prompts = asked.benchmark, asked.revision, []
    for category, name in asked.files.items():
        path = _file(asked, name, revision)
        # The cache has a folder a commit; the other files are to be of the same.
        revision = path.parents[name.count("/")].name
        origin = {"list": asked.name, "source": f"{known.repo}@{revision}", "licence": known.licence}
        labels = {known.key: category} if category else {}
        for found in read_list(path):
            categories = tuple(f"{key}: {value}" for key, value in labels.items()) or found.categories
            prompts.append(Prompt(found.text, categories, {**found.extra, **labels, **origin}))
    return prompts, f"{known.repo}@{revision}"


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
