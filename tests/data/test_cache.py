"""The cache: right rows, each thing encoded once, safe to interrupt, never silently stale or damaged."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from helpers_cache import SHAPE, SIZE, FakeModel, build, make_pairs, mean, picture

from diffusion_align import rng
from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.cache import PairCache
from diffusion_align.data.disk import require_room
from diffusion_align.data.frames import load_picture
from diffusion_align.data.pairs_and_rankings import Pair, Ranking
from diffusion_align.system import progress


def test_batches_hold_the_winner_first_and_the_right_text(tmp_path):
    pairs = make_pairs()
    cache = build(tmp_path, pairs)
    indices = [39, 0, 17, 17]
    latents, text = cache.batch(torch.tensor(indices))
    assert latents.shape == (4, 2, *SHAPE) and latents.dtype == text.dtype == torch.float32
    for row, index in enumerate(indices):
        pair = pairs[index]
        clean = mean(torch.stack([load_picture(pair.winner, SIZE), load_picture(pair.loser, SIZE)]))
        assert (latents[row] - clean).abs().max() < 0.06  # five deviations of the noise
        assert torch.equal(text[row], torch.full((3, 2), float(len(pair.prompt))))
    assert len(cache) == 40 and cache.kept == list(range(40)) and cache.bad == 0
    assert torch.equal(cache.empty_text, torch.zeros(1, 3, 2))  # "" as a caption, not what guidance pushes away from


def test_the_posterior_is_sampled_once_with_noise_by_picture_index(tmp_path):
    """Pictures are numbered in the order in which they first appear, across chunks and shards."""
    pairs = make_pairs()
    order = list(dict.fromkeys(data for pair in pairs for data in (pair.winner, pair.loser)))
    latents, _ = build(tmp_path, pairs, seed=5).batch(range(40))
    for pair, row in zip(pairs, latents, strict=True):
        for data, latent in zip((pair.winner, pair.loser), row, strict=True):
            clean = mean(load_picture(data, SIZE)[None])[0]
            assert torch.allclose(latent, clean + rng.normal(SHAPE, 5, "vae", order.index(data)) / 100, atol=1e-6)


def test_each_picture_and_prompt_is_encoded_once(tmp_path):
    pairs, model = make_pairs(), FakeModel()
    cache = build(tmp_path, pairs, model)
    different = len({pair.winner for pair in pairs} | {pair.loser for pair in pairs})
    assert cache.pictures == model.pictures == different < 80
    assert sorted(model.prompts, key=len) == ["p" * i for i in range(8)]
    again = build(tmp_path, pairs, model)
    assert model.pictures == different and len(model.prompts) == 8
    assert torch.equal(again.batch(range(40))[0], cache.batch(range(40))[0])


def test_the_same_picture_under_another_name_is_recognised(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "b.png").write_bytes(picture(0))
    model = FakeModel()
    latents, _ = build(tmp_path / "cache", [Pair("0", "p", tmp_path / "a.png", tmp_path / "b.png")], model).batch([0])
    assert model.pictures == 1 and torch.equal(latents[0, 0], latents[0, 1])


@pytest.mark.parametrize("fail_at", range(0, 30, 4))
def test_an_interrupted_build_goes_on_after_its_whole_shards(tmp_path, fail_at):
    pairs = make_pairs()
    whole = build(tmp_path / "whole", pairs)
    first, second = FakeModel(fail_at=fail_at), FakeModel()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", pairs, first)
    cache = build(tmp_path / "cut", pairs, second)
    assert not second.prompts  # all text was there already
    if fail_at >= 16:  # at least one shard of 8 pairs, with its 16 pictures, was whole
        assert second.pictures < whole.pictures
    for mine, theirs in zip(cache.batch(range(40)), whole.batch(range(40)), strict=True):
        assert torch.equal(mine, theirs)


def test_killed_builds_end_in_the_same_cache(tmp_path):
    """SIGKILL at 8 moments of one build, each time going on: the result is that of the build that was left alone."""
    pairs = make_pairs()
    whole = build(tmp_path / "whole", pairs, pairs_per_shard=2)
    for moment in range(8):
        child = os.fork()
        if child == 0:
            try:
                build(tmp_path / "cut", pairs, FakeModel(pause=0.004), pairs_per_shard=2)
            finally:
                os._exit(0)
        time.sleep(0.01 + 0.004 * moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    cache = build(tmp_path / "cut", pairs, pairs_per_shard=2)
    for mine, theirs in zip(cache.batch(range(40)), whole.batch(range(40)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("lists", "options", "key"),
    [
        (make_pairs(), {}, "1353d3fffd7514a2"),
        (make_pairs(), {"seed": 3, "precision": "bf16"}, "d34d6c46d45bed94"),
        ([Ranking(str(i), "p", tuple(map(picture, range(i, i + 3))), (1.0, 0.5, 0.0)) for i in range(3)],
         {"dtype": torch.float16}, "b3a7731ec5e22894"),
    ],
    ids=["pairs", "seed and precision", "rankings in half precision"],
)  # fmt: skip
def test_the_key_of_a_cache_never_changes(tmp_path, lists, options, key):
    """Another key would encode every data set again. These were computed by an earlier version."""
    assert build(tmp_path, lists, **options).folder.name == key


@pytest.mark.parametrize(
    "change", ["model", "resolution", "data", "seed", "dtype"], ids=["model", "resolution", "data", "seed", "dtype"]
)
def test_a_changed_input_is_another_cache(tmp_path, change):
    pairs = make_pairs(8)
    first = build(tmp_path, pairs)
    model = FakeModel("other" if change == "model" else "fake")
    options = {"resolution": {"resolution": 32}, "seed": {"seed": 1}, "dtype": {"dtype": torch.float16}}.get(change, {})
    second = build(tmp_path, pairs[::-1] if change == "data" else pairs, model, **options)
    assert model.pictures > 0 and second.folder != first.folder
    assert {name for name in first.identity if first.identity[name] != second.identity[name]} == {change}


def test_half_precision_on_disk_is_float32_in_the_batch(tmp_path):
    pairs = make_pairs(8)
    half, full = build(tmp_path, pairs, dtype=torch.float16).batch([3]), build(tmp_path, pairs).batch([3])
    assert half[0].dtype == torch.float32 and torch.equal(half[0], full[0].half().float())


def test_broken_pictures_are_named_and_left_out(tmp_path):
    pairs = make_pairs()
    cut = picture(3)[:200]
    pairs[4] = Pair("set:4", "p", cut, picture(1))
    pairs[30] = Pair("set:30", "p", picture(2), cut)
    pairs[31] = Pair("set:31", "p", tmp_path / "absent.png", picture(2))
    cache = build(tmp_path, pairs, max_bad_fraction=0.1, known_bad=[BadRow("set:99", "no prompt")])
    assert cache.kept == [i for i in range(40) if i not in (4, 30, 31)] and cache.bad == 4
    assert torch.equal(cache.batch([4])[1][0], torch.full((3, 2), float(len(pairs[5].prompt))))
    rows = [json.loads(line) for line in (cache.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["set:99", "set:4", "set:30", "set:31"]
    assert rows[1]["reason"].startswith("winner cannot be decoded") and rows[2]["reason"].startswith("loser cannot")
    assert "absent.png" in rows[3]["reason"]


def test_too_many_broken_pictures_stop_the_build(tmp_path):
    pairs = make_pairs(100)
    pairs[20] = Pair("set:20", "p", b"", picture(1))
    assert len(build(tmp_path / "one", pairs)) == 99  # one in a hundred is allowed
    pairs[50] = Pair("set:50", "p", b"junk", picture(1))
    with pytest.raises(DataError, match="2 of 100 rows are bad.*set:20 winner is empty") as caught:
        build(tmp_path / "two", pairs)
    assert "\n" not in str(caught.value)


def test_no_good_pair_is_refused(tmp_path):
    with pytest.raises(DataError, match="no pairs to encode"):
        build(tmp_path, [])
    with pytest.raises(DataError, match="no pair has two good pictures"):
        build(tmp_path, [Pair("0", "p", b"", b"")], max_bad_fraction=1)


def test_encodings_that_are_not_finite_are_refused(tmp_path):
    model = FakeModel()
    model.encode_images = lambda images, noise: torch.full((len(images), *SHAPE), torch.nan)
    with pytest.raises(DataError, match="not finite.*sdxl-vae-fp16-fix"):
        build(tmp_path, make_pairs(2), model)


@pytest.mark.parametrize("kind", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_named_and_can_be_encoded_again(tmp_path, kind):
    pairs = make_pairs()
    cache = build(tmp_path, pairs)
    before = cache.batch(range(40))[0]
    shard = cache.folder / "pairs-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    if kind == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if kind == "flip" else data[:-1])
    with pytest.raises(DataError, match="pairs-00001.safetensors: is missing or damaged; delete .*manifest.json"):
        PairCache(cache.folder).batch(range(40))
    (cache.folder / "manifest.json").unlink()
    model = FakeModel()
    assert torch.equal(build(tmp_path, pairs, model).batch(range(40))[0], before)
    assert 0 < model.pictures < cache.pictures


def test_progress_goes_to_stderr_with_an_estimate(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "SHORT", 0.0)
    build(tmp_path, make_pairs(), progress=True)
    out, err = capfd.readouterr()
    assert not out and "encode pairs: 100 %, 40 of 40" in err and "encode prompts" in err
    next(tmp_path.glob("*/manifest.json")).unlink()
    next(tmp_path.glob("*/pairs-00002.json")).unlink()
    build(tmp_path, make_pairs(), progress=True)  # four shards of five are there
    assert "encode pairs: 100 %, 40 of 40" in capfd.readouterr().err


def test_a_finished_cache_is_held_to_this_runs_ceiling(tmp_path):
    """What a run with a high ceiling has built is not taken in silence by one with a low one."""
    pairs = make_pairs()
    pairs[3] = Pair("set:3", "p", b"broken", pairs[3].loser)
    known = [BadRow("set:40", "no prompt")]
    built = build(tmp_path, pairs, max_bad_fraction=0.5, known_bad=known)
    assert built.bad == 2
    assert build(tmp_path, pairs, max_bad_fraction=0.05, known_bad=known).bad == 2
    with pytest.raises(DataError, match=r"bad_rows.jsonl: 2 of 41 rows are bad.*the first: set:40 no prompt"):
        build(tmp_path, pairs, max_bad_fraction=0.04, known_bad=known)


def on_a_disk_with(monkeypatch, free, total=10**12):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=total, used=0, free=free))


def test_too_small_a_disk_is_refused_before_encoding(tmp_path, monkeypatch):
    """30 different pictures of 4 x 4 x 4 float32, 7 prompts and the empty one of 3 x 2: 7,872 bytes."""
    pairs, model, size = make_pairs(), FakeModel(), (30 * 64 + 8 * 6) * 4
    assert len({picture for pair in pairs for picture in pair.pictures}) == 30
    on_a_disk_with(monkeypatch, free=size - 1)
    with pytest.raises(
        DataError, match=r"encoding takes up to 7\.87e-06 GB, and the disk has 7\.87e-06 GB.*delete caches"
    ):
        build(tmp_path, pairs, model)
    assert not model.pictures and not model.prompts and not list(tmp_path.rglob("*.safetensors"))
    on_a_disk_with(monkeypatch, free=size)
    assert len(build(tmp_path, pairs, model)) == 40
    on_a_disk_with(monkeypatch, free=0)
    assert len(build(tmp_path, pairs, model)) == 40  # it is there


def test_half_precision_needs_half_the_room(tmp_path, monkeypatch):
    on_a_disk_with(monkeypatch, free=(30 * 64 + 8 * 6) * 2)
    assert len(build(tmp_path, make_pairs(), dtype=torch.float16)) == 40
    with pytest.raises(DataError, match="free some"):
        build(tmp_path, make_pairs())


def test_finished_shards_need_no_more_room(tmp_path, monkeypatch):
    pairs = make_pairs()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, pairs, FakeModel(fail_at=20))
    there = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    on_a_disk_with(monkeypatch, free=(30 * 64 + 8 * 6) * 4 - there)
    assert len(build(tmp_path, pairs)) == 40


def test_a_disk_that_reports_no_size_is_accepted(tmp_path, monkeypatch):
    on_a_disk_with(monkeypatch, free=0, total=0)
    assert len(build(tmp_path, make_pairs())) == 40


def test_a_file_that_is_gone_counts_as_empty(tmp_path):
    """A link to nowhere is listed, and cannot be asked for its size: so is a file that has gone since."""
    (tmp_path / ".tmp-dropped.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "text-00000.safetensors").write_bytes(b"x" * 10)
    require_room(tmp_path, 10)
    with pytest.raises(DataError, match="free some"):
        require_room(tmp_path, shutil.disk_usage(tmp_path).total + 11)
