"""Folders for other benchmarks: names and grids are read back as the benchmarks' scorers read them."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.evaluation.benchmark_folders import (
    Drawn,
    arrange,
    compbench_targets,
    dpg_targets,
    grid,
    read_drawn,
    unsafe,
)
from diffusion_align.evaluation.picture_folder import fill, picture_path

SIDE = 8
IDS = ["COCOval2014000000000042", "countbench0", "9", "stanford_7"]
PROMPTS = ["a red cat", "The clock reads 11:44.", "a red cat", "It's a dog & a cat, both on a mat."]


def picture(number):
    return torch.randint(256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(number)).float() / 255


def drawn(folder, rows, per_prompt=4, facts=None):
    """A folder in GenEval's layout whose picture p is `picture(p)`."""

    def draw(numbers):
        for number in numbers:
            yield [number], picture(number)[None]

    extras = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    prompts = [row["prompt"] for row in rows]
    list(fill(folder, prompts, draw, facts or {"seed": 0}, per_prompt=per_prompt, extras=extras))
    return folder


def rows(**columns):
    prompts = columns.pop("prompt", PROMPTS)
    return [{"prompt": text} | {key: column[i] for key, column in columns.items()} for i, text in enumerate(prompts)]


def levels(picture):
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def arranged(source, out, layout):
    return list(arrange(read_drawn(source), out, layout))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_dpg_scorer_finds_every_picture(tmp_path):
    """Its script takes the id up to the first dot, and cuts left above, right above, left below, right below."""
    paths = arranged(drawn(tmp_path / "drawn", rows(item_id=IDS)), tmp_path / "out", "dpg")
    found = sorted(path.name for path in (tmp_path / "out" / "dpg").iterdir())
    assert sorted(path.name for path in paths) == found and sorted(name.split(".")[0] for name in found) == sorted(IDS)
    for place, name in enumerate(IDS):
        with Image.open(tmp_path / "out" / "dpg" / f"{name}.png") as whole:
            assert whole.size == (2 * SIDE, 2 * SIDE)
            for which, (left, top) in enumerate([(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]):
                cut = np.asarray(whole.crop((left, top, left + SIDE, top + SIDE)))
                assert np.array_equal(cut, levels(picture(4 * place + which)))


def test_dpg_with_one_picture_of_a_prompt(tmp_path):
    arranged(drawn(tmp_path / "drawn", rows(item_id=IDS), per_prompt=1), tmp_path, "dpg")
    with Image.open(tmp_path / "dpg" / "9.png") as whole:
        assert np.array_equal(np.asarray(whole), levels(picture(2)))


def test_compbench_names_hold_prompt_and_order(tmp_path):
    """They sort samples/ by the number behind the last _, and take the prompt before the first; a category each."""
    kinds = ["color", "complex", "color", "complex"]
    arranged(drawn(tmp_path / "drawn", rows(category=kinds), per_prompt=3), tmp_path, "compbench")
    for kind in ("color", "complex"):
        places = [place for place in range(4) if kinds[place] == kind]
        names = [path.name for path in (tmp_path / "compbench" / kind / "samples").iterdir()]
        names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
        assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(6))
        assert [name.split("_")[0] for name in names] == [PROMPTS[place] for place in places for _ in range(3)]
        for name, number in zip(names, [3 * place + which for place in places for which in range(3)], strict=True):
            with Image.open(tmp_path / "compbench" / kind / "samples" / name) as one:
                assert np.array_equal(np.asarray(one), levels(picture(number)))
    assert {path.name for path in (tmp_path / "compbench").iterdir()} == {"color", "complex"}


def test_a_list_without_categories_has_one_folder(tmp_path):
    arranged(drawn(tmp_path / "drawn", rows(), per_prompt=1), tmp_path, "compbench")
    assert sorted(path.name for path in (tmp_path / "compbench" / "samples").iterdir())[-1] == "a red cat_000002.png"


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a red_cat", "has _"),
        ("../../escape", "slash"),
        ("/etc/passwd", "slash"),
        ("a\\b", "slash"),
        ("two\nlines", "control character"),
        ("a\x00b", "control character"),
        ("\ud800 lone", "lone surrogate"),
        ("x" * 245, "makes a name of 256 bytes, more than 255"),
        ("é" * 123, "makes a name of 257 bytes"),
    ],
)
def test_prompts_unfit_for_file_names_are_refused(tmp_path, prompt, fault):
    source = drawn(tmp_path / "drawn", rows(prompt=["a cat", prompt]), per_prompt=1)
    with pytest.raises(ValueError, match=f"prompt 1 .*{fault}") as refused:
        arranged(source, tmp_path / "out", "compbench")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]


@pytest.mark.parametrize(
    "prompt", ["x" * 244, "é" * 122, "The clock reads 11:44.", "...", 'a "b" | c > d * ?', "-rf ."]
)
def test_odd_but_safe_prompts_keep_their_names(tmp_path, prompt):
    assert unsafe(prompt, f"{prompt}_000000.png") is None
    arranged(drawn(tmp_path / "drawn", rows(prompt=[prompt]), per_prompt=1), tmp_path, "compbench")
    assert [path.name.split("_")[0] for path in (tmp_path / "compbench" / "samples").iterdir()] == [prompt]


@pytest.mark.parametrize(
    ("ids", "per_prompt", "said"),
    [
        ([None] * 4, 4, "prompt 0 has no item_id"),
        (["a", "b", "../c", "d"], 4, "prompt 2: item_id '../c' is not letters"),
        (["a", "b", "c.d", "e"], 4, "prompt 2: item_id 'c.d' is not letters"),
        (["a", "b", "c", "b"], 4, "prompts 1 and 3 have one item_id, b"),
        (["a", "b", "c", "B"], 4, "prompts 1 and 3 have one item_id, B"),
        (IDS, 3, "takes 4 pictures of a prompt, or 1, not 3"),
    ],
)
def test_bad_item_ids_are_refused(ids, per_prompt, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        dpg_targets(Drawn(tmp_path, {}, rows(item_id=ids), per_prompt))


def test_a_category_cannot_be_a_path(tmp_path):
    with pytest.raises(ValueError, match="category '../x' is not letters"):
        compbench_targets(Drawn(tmp_path, {}, rows(category=["../x"] * 4), 1))


@pytest.mark.parametrize("layout", ["dpg", "compbench"])
def test_resuming_after_a_kill_at_any_file_gives_the_same_folder(tmp_path, monkeypatch, layout):
    """Killed before each rename in turn; at no time does a scorer's folder hold anything but whole pictures."""
    source = drawn(tmp_path / "drawn", rows(item_id=IDS))
    arranged(source, tmp_path / "whole", layout)
    whole, home = contents(tmp_path / "whole"), tmp_path / "cut" / layout
    module = sys.modules["diffusion_align.evaluation.picture_folder"]
    real, left = module.os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(source, target)

    cuts = 0
    for after in range(1, len(whole) + 1):
        left[0] = 2  # the manifest and one more picture a time
        monkeypatch.setattr(module, "os", SimpleNamespace(replace=dying, getpid=lambda after=after: after))
        try:
            arranged(source, tmp_path / "cut", layout)
        except KeyboardInterrupt:
            cuts += 1
        monkeypatch.undo()
        there = contents(home) if home.exists() else {}
        assert all(whole[f"{layout}/{name}"] == data for name, data in there.items())
    assert cuts >= len(whole) - 3
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*.png")}
    arranged(source, tmp_path / "cut", layout)
    assert contents(tmp_path / "cut") == whole and not (tmp_path / "cut" / f".{layout}").exists()
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_a_truncated_picture_is_written_again(tmp_path):
    source = drawn(tmp_path / "drawn", rows(item_id=IDS))
    arranged(source, tmp_path / "out", "dpg")
    whole, cut = contents(tmp_path / "out"), tmp_path / "out" / "dpg" / "9.png"
    cut.write_bytes(cut.read_bytes()[:50])
    arranged(source, tmp_path / "out", "dpg")
    assert contents(tmp_path / "out") == whole


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    arranged(drawn(tmp_path / "drawn", rows(item_id=IDS)), tmp_path / "out", "dpg")
    other = drawn(tmp_path / "other", rows(item_id=IDS), facts={"seed": 1})
    with pytest.raises(ValueError, match="another seed: choose a new folder"):
        arranged(other, tmp_path / "out", "dpg")
    longer = rows(item_id=[*IDS, "new"], prompt=[*PROMPTS, "one more"])
    arranged(drawn(tmp_path / "drawn", longer), tmp_path / "out", "dpg")  # a list may grow at its end
    assert len(list((tmp_path / "out" / "dpg").iterdir())) == 5
    shorter = drawn(tmp_path / "short", rows(item_id=IDS[:2], prompt=PROMPTS[:2]))
    with pytest.raises(ValueError, match=r"9\.png is of no prompt of this list"):
        arranged(shorter, tmp_path / "out", "dpg")


def test_stray_files_are_refused(tmp_path):
    source = drawn(tmp_path / "drawn", rows(item_id=IDS))
    arranged(source, tmp_path / "out", "dpg")
    (tmp_path / "out" / "dpg" / "dpg-bench_20261124_results.txt").write_text("notes of the scorer")
    arranged(source, tmp_path / "out", "dpg")
    (tmp_path / "out" / "dpg" / "0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.jpg is of no prompt"):
        arranged(source, tmp_path / "out", "dpg")


def test_an_incomplete_source_is_refused(tmp_path):
    source = drawn(tmp_path / "drawn", rows(item_id=IDS))
    picture_path(source, 5, 4).unlink()
    picture_path(source, 9, 4).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"2 of 16 pictures are missing or incomplete, the first .*00001.*0001\.png"):
        read_drawn(source)
    with pytest.raises(ValueError, match=r"has no pictures\.json"):
        read_drawn(tmp_path)
    drawn(source, rows(item_id=IDS))
    (source / "00002" / "metadata.jsonl").write_text(json.dumps({"prompt": "another"}) + "\n")
    with pytest.raises(ValueError, match="is of another prompt"):
        read_drawn(source)


def test_pictures_of_other_shapes_make_no_grid():
    with pytest.raises(ValueError, match="not squares of one size"):
        grid([torch.zeros(3, 4, 6)] * 4, "x.png")
    with pytest.raises(ValueError, match="not squares of one size"):
        grid([torch.zeros(3, 4, 4)] * 3 + [torch.zeros(3, 8, 8)], "x.png")
