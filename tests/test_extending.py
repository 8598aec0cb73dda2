"""docs/extending.md holds: a copy of the package is changed as the page says, and every command on it is run there."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers_machine import HANG
from helpers_page import Block, apply, commands_of, read_blocks

from diffusion_align.train import record

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = read_blocks(PAGE)
MOST_FILES = {
    "A pair loss": 3,
    "An online method": 3,
    "A reward": 3,
    "A linear sampler": 3,
    "A model family": 2,
    "A data layout": 2,
    "A training option": 2,
}


def in_package(section):
    return {block.path for block in BLOCKS if block.section == section and block.path.startswith("diffusion_align/")}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The folder in which every command of the page was run, one after the other in one process."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "diffusion_align", root / "diffusion_align", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "assets").symlink_to(ROOT / "assets")
    work = root / "work"
    work.mkdir()
    rest = []
    for block in BLOCKS:
        if block.path.startswith("diffusion_align/"):
            apply(block, root)
        else:
            rest.append(asdict(block))
    (work / "blocks.json").write_text(json.dumps(rest))
    program = [sys.executable, str(ROOT / "tests" / "helpers_page.py"), str(work)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(program, cwd=work, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return work


def test_every_section_is_tested():
    assert list(dict.fromkeys(block.section for block in BLOCKS)) == list(MOST_FILES)


@pytest.mark.parametrize("section", MOST_FILES)
def test_an_example_touches_no_more_files_than_the_page_says(section):
    """The table at the top of the page has the same numbers."""
    files = in_package(section)
    assert len(files) == MOST_FILES[section], files
    (row,) = (line for line in PAGE.splitlines() if f"](#{section.lower().replace(' ', '-')})" in line)
    counts = [int(word) for word in row.split("|")[2].replace(",", " ").replace(";", " ").split() if word.isdigit()]
    assert max(counts) == MOST_FILES[section]


def test_an_online_method_changes_no_file():
    new = {block.path for block in BLOCKS if block.section == "An online method" and block.kind == "new"}
    assert new == in_package("An online method")


@pytest.mark.parametrize("section", MOST_FILES)
def test_the_commands_of_an_example_do_what_the_page_says(section, copy):
    results = json.loads((copy / "results.json").read_text())
    mine = [result for result in results if result["section"] == section]
    assert mine
    for result in mine:
        what, _, text = result["promise"].partition(": ")
        assert what in ("", "prints", "refused"), what
        assert (result["code"] != 0) == (what == "refused"), (result["command"], result["output"])
        assert text in result["output"], (result["command"], result["output"])


@pytest.mark.parametrize("what", ["check", "format --check"])
def test_the_examples_are_written_as_the_package_is(what, copy):
    files = sorted({path for section in MOST_FILES for path in in_package(section) if path.endswith(".py")})
    command = [
        sys.executable,
        "-m",
        "ruff",
        *what.split(),
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
        *files,
    ]
    found = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stdout


def test_the_pair_loss_trains(copy):
    first, second = record.read(copy / "runs" / "mine" / "metrics.jsonl")
    assert first["loss"] == 1 != second["loss"] and first["grad_norm"] > 0


def test_the_online_method_trains(copy):
    (row,) = record.read(copy / "runs" / "best" / "metrics.jsonl")
    assert row["loss"] == 0 and row["items"] > 0 and row["grad_norm"] > 0


def test_the_option_changes_the_loss(copy):
    first, *_ = record.read(copy / "runs" / "lead" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log1p(math.e), rel=1e-5)  # -log sigmoid(-1)


def test_the_reward_scores_the_same_by_its_name_and_by_its_file(copy):
    own, named = (
        [json.loads(line) for line in (copy / f).read_text().splitlines()] for f in ("own.jsonl", "named.jsonl")
    )
    assert len(own) == 2 and all(0 < row["score"] < 1 for row in own)
    assert [row["score"] for row in own] == pytest.approx([row["score"] for row in named], rel=1e-5)


def test_a_change_whose_place_is_gone_fails(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\n")
    apply(Block("", "change", "a.py", " one\n+new\n-two\n"), tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\nnew\n"
    with pytest.raises(AssertionError, match="0 times"):
        apply(Block("", "change", "a.py", " one\n-two\n"), tmp_path)


def test_a_promise_belongs_to_the_command_below_it():
    assert commands_of("a\n# prints: x\nb\nc\n") == [("a", ""), ("b", "prints: x"), ("c", "")]
