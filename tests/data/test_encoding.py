"""Encoding shared out over processes: the same bits as by one, a little at a time, resumed, and nobody lost unnamed."""

import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers_cache import SHAPE, SIZE, FakeModel, Shaped, build, make_pairs, picture, shaped_pairs
from helpers_train import SCHEDULE
from stress.jobs import launch

from diffusion_align.commands.train import encode
from diffusion_align.data import Ranking
from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.encoding import LISTS_AT_A_TIME
from diffusion_align.data.frames import Frames
from diffusion_align.data.pairs_and_rankings import Pair
from diffusion_align.data.shards import Ranks
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import sum_over_ranks


class Meeting:
    """Threads that meet as processes do: each gives a number and gets the sum."""

    def __init__(self, count):
        self.numbers, self.barrier = [0] * count, threading.Barrier(count)

    def of(self, rank, after_meeting=lambda: None):
        def meet(number):
            self.numbers[rank] = int(number)
            self.barrier.wait(30)
            result = sum(self.numbers)
            self.barrier.wait(30)
            after_meeting()
            return result

        return meet


def build_together(folder, pairs, models, after_meeting=lambda rank: None, **options):
    """The caches of all ranks, or the error of each."""
    meeting, found = Meeting(len(models)), [None] * len(models)

    def work(rank):
        ranks = Ranks(rank, len(models), meeting.of(rank, lambda: after_meeting(rank)))
        try:
            found[rank] = build(folder, pairs, models[rank], ranks=ranks, **options)
        except BaseException as error:  # the others must not wait for it, as they would not for a process that is gone
            found[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def some_pairs(tmp_path):
    """Pictures and prompts in several rows, some rows broken."""
    pairs = make_pairs(60)
    cut = picture(3)[:200]
    pairs[4] = Pair("set:4", "p", cut, picture(1))
    pairs[50] = Pair("set:50", "p", picture(2), cut)
    pairs[31] = Pair("set:31", "p", tmp_path / "absent.png", picture(2))
    return pairs


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_number_of_processes_makes_the_same_files(tmp_path, ranks):
    pairs, options = some_pairs(tmp_path), {"max_bad_fraction": 0.1, "known_bad": [BadRow("set:99", "no prompt")]}
    whole, alone = FakeModel(), build(tmp_path / "one", pairs, **options)
    build(tmp_path / "count", pairs, whole, **options)
    models = [FakeModel() for _ in range(ranks)]
    caches = build_together(tmp_path / "many", pairs, models, **options)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert all(cache.kept == alone.kept and cache.bad == alone.bad == 4 for cache in caches)
    # Each picture and prompt once in all, and nobody does it all.
    assert sum(model.pictures for model in models) == whole.pictures == alone.pictures
    assert max(model.pictures for model in models) < whole.pictures
    assert sorted(sum((model.prompts for model in models), [])) == sorted(whole.prompts)


def test_any_number_of_processes_makes_the_same_files_of_buckets_crops_and_mirrors(tmp_path):
    """Every picture has one of three shapes; rows and shapes of a shard are those of one process."""
    pairs, frames = shaped_pairs(40), Frames(32, buckets=True, step=8, crops=2, mirrored=True)
    options = {"resolution": 32, "frames": frames}
    whole, models = Shaped(), [Shaped() for _ in range(3)]
    alone = build(tmp_path / "one", pairs, whole, **options)
    caches = build_together(tmp_path / "many", pairs, models, **options)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert sum(model.pictures for model in models) == whole.pictures == alone.pictures == 40 * 2 * 4
    assert all(cache.groups == alone.groups and cache.variants == 4 for cache in caches)


def test_ranks_meet_after_each_chunk(tmp_path):
    """One shard, so one process has all the work: the other meets it after every 16 rankings of 3."""
    rankings = [
        Ranking(str(i), "p", tuple(picture(3 * i + k) for k in range(3)), (1.0, 0.5, 0.0))
        for i in range(4 * LISTS_AT_A_TIME)
    ]
    models, most, last = [FakeModel(), FakeModel()], [], [0, 0]

    def after_meeting(rank):
        most.append(models[rank].pictures - last[rank])
        last[rank] = models[rank].pictures

    caches = build_together(tmp_path, rankings, models, after_meeting, pairs_per_shard=1024)
    assert [model.pictures for model in models] == [12 * LISTS_AT_A_TIME, 0] and len(caches[1]) == 4 * LISTS_AT_A_TIME
    assert max(most) == 3 * LISTS_AT_A_TIME


def test_a_build_goes_on_after_a_rank_has_failed(tmp_path):
    """Then with another number of processes."""
    pairs = make_pairs(60, pictures=120)
    whole = build(tmp_path / "whole", pairs)
    models = [FakeModel(), FakeModel(fail_at=30)]
    found = build_together(tmp_path / "cut", pairs, models)
    assert isinstance(found[1], KeyboardInterrupt) and isinstance(found[0], threading.BrokenBarrierError)
    again = [FakeModel() for _ in range(3)]
    build_together(tmp_path / "cut", pairs, again)
    assert 0 < sum(model.pictures for model in again) <= whole.pictures - 32 and not any(
        model.prompts for model in again
    )
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_too_many_broken_rows_stop_all(tmp_path):
    pairs = make_pairs(100)
    for i in range(40, 50):
        pairs[i] = Pair(f"set:{i}", "p", b"junk%d" % i, picture(1))
    found = build_together(tmp_path, pairs, [FakeModel(), FakeModel()])
    errors = [error for error in found if isinstance(error, DataError)]
    assert len(errors) == 1 and "of 100 rows are bad" in str(errors[0])


def test_a_picture_that_changes_meanwhile_is_named(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(0))

    def meet(number):
        if list(tmp_path.rglob("names-*.json")):  # the digests are written
            path.write_bytes(picture(1))
        return number

    with pytest.raises(DataError, match=r"a.png: has changed since encoding began; delete .* and start again"):
        build(tmp_path / "cache", [Pair("0", "p", path, picture(2))], ranks=Ranks(total=meet))


def options_of(folder, precision="no"):
    return SimpleNamespace(
        cache_dir=None, output_dir=str(folder), resolution=SIZE, cache_limit_gb=None, seed=0, max_bad_fraction=0.01,
        encode_precision=precision,
    )  # fmt: skip


class Model(FakeModel):
    """A model that knows its device and notes the precision in which it is asked."""

    device, schedule = torch.device("cpu"), SCHEDULE

    def predict(self, x, t, text):
        return torch.zeros_like(x)

    def __init__(self, **more):
        super().__init__(**more)
        self.asked = set()

    def cut_captions(self, prompts):
        return 0, 77

    def encode_images(self, images, noise):
        self.asked.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return super().encode_images(images, noise)

    def encode_text(self, prompts):
        self.asked.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return super().encode_text(prompts)


def test_precision_is_an_option_and_part_of_the_key(tmp_path):
    accelerator, pairs, folders = Accelerator(cpu=True), make_pairs(4), set()
    for name, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model = Model()
        cache = encode.encoded(options_of(tmp_path, name), model, accelerator, pairs)
        assert model.asked == {dtype} and cache.identity.get("precision", "no") == name
        assert cache.batch([0])[0].dtype == torch.float32
        folders.add(cache.folder)
    assert len(folders) == 3
    # The key of float32 is what it was, so that earlier caches are found.
    assert "precision" not in encode.encoded(options_of(tmp_path), Model(), accelerator, pairs).identity


@pytest.mark.parametrize("fault", ["room", "finite"])
def test_the_command_names_the_flag_that_helps(tmp_path, monkeypatch, fault):
    """On the one line of the error, which the floors below write without flags."""
    model = Model()
    if fault == "room":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**12, used=0, free=0))
    else:
        model.encode_images = lambda images, noise: torch.full((len(images), *SHAPE), torch.nan)
    cure = "free some.*--cache_dir on another disk" if fault == "room" else "not finite.*--encode_precision no"
    with pytest.raises(DataError, match=cure):
        encode.encoded(options_of(tmp_path), model, Accelerator(cpu=True), make_pairs(4))


def test_a_limit_on_the_caches_is_kept_or_the_flag_that_helps_is_named(tmp_path, capsys):
    options = options_of(tmp_path)
    first = encode.encoded(options, Model(), Accelerator(cpu=True), make_pairs(4)).folder
    size = sum(path.stat().st_size for path in first.iterdir())
    options.cache_limit_gb = 1e-9
    with pytest.raises(DataError, match="over the limit .* on all caches; raise --cache_limit_gb, or use fewer with"):
        encode.encoded(options, Model(), Accelerator(cpu=True), make_pairs(5))
    assert encode.encoded(options, Model(), Accelerator(cpu=True), make_pairs(4)).folder == first  # nothing to encode
    options.cache_limit_gb = 1.5 * size / 1e9
    second = encode.encoded(options, Model(), Accelerator(cpu=True), make_pairs(5)).folder
    assert f"cache            {first} removed (" in capsys.readouterr().out
    assert second.is_dir() and not first.exists()


def test_pairs_of_one_picture_are_counted_before_the_first_step(tmp_path, capsys):
    same, copy = make_pairs(1)[0].winner, tmp_path / "copy.png"
    copy.write_bytes(same)
    pairs = [*make_pairs(3), Pair("same", "p", same, same), Pair("copy", "q", same, copy)]
    encode.encoded(options_of(tmp_path), Model(), Accelerator(cpu=True), pairs)
    assert "pictures         2 of 5 compare a picture with itself, which teaches nothing" in capsys.readouterr().out
    encode.encoded(options_of(tmp_path), Model(), Accelerator(cpu=True), make_pairs(3))
    assert "with itself" not in capsys.readouterr().out


def test_two_processes_encode_together(tmp_path):
    pairs = make_pairs(60)
    build(tmp_path / "run" / "cache", pairs, pairs_per_shard=1024, prompts_per_shard=1024)
    expected = files(tmp_path / "run" / "cache")

    def work(rank):
        accelerator = Accelerator(cpu=True)
        watch.start(tmp_path / ".ranks", rank, 2)
        cache = encode.encoded(options_of(tmp_path / "shared"), Model(), accelerator, pairs)
        assert sum_over_ranks(accelerator, len(cache) + rank) == 121
        watch.stop()
        return 0

    ended = launch(2, work, tmp_path / "logs")
    assert ended.codes == [0, 0], ended.text
    assert files(tmp_path / "shared" / "cache") == expected


def test_a_process_that_is_gone_while_encoding_is_named(tmp_path):
    def work(rank):
        accelerator = Accelerator(cpu=True)
        watch.start(tmp_path / ".ranks", rank, 2)
        model = Model(pause=0.01)
        if rank == 1:
            model.encode_images = lambda images, noise: os._exit(9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "build_cache", lambda *a, **k: build(a[2], a[1], a[0], ranks=k["ranks"]))
            encode.encoded(options_of(tmp_path / "run"), model, accelerator, make_pairs(40))
        return 0

    ended = launch(2, work, tmp_path / "logs", patience=10)
    assert ended.codes[1] == 9 and ended.codes[0] != 0 and not ended.hung
    assert "rank 1 at step 0 (encoding) is gone, perhaps killed" in ended.said[0], ended.text
