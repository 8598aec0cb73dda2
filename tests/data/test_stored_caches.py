"""Caches on disk are listed and removed, the oldest first, and never while a process uses them."""

import fcntl
import os
import subprocess
import sys

import pytest
from helpers_cache import SIZE, FakeModel, make_pairs

from diffusion_align.cli import main
from diffusion_align.data import EncodingSettings, build_cache
from diffusion_align.data.stored_caches import (
    IN_USE,
    OverLimit,
    caches_in,
    hold,
    is_in_use,
    make_room,
    remove,
    remove_oldest,
)


def build(folder, seed, **more):
    return build_cache(FakeModel(), make_pairs(4), folder, EncodingSettings(SIZE, seed), progress=False, **more)


@pytest.fixture
def three(tmp_path):
    """Three caches that no process uses, by seed; the last use of seed 2 is oldest, then 0, then 1."""
    homes = [build(tmp_path, seed).folder for seed in range(3)]
    for age, home in zip((2, 1, 3), homes, strict=True):
        os.utime(home / IN_USE, (1e9 - age, 1e9 - age))
    return homes


def names(folder):
    return [cache.home for cache in caches_in(folder)]


def test_caches_are_listed_by_their_last_use_with_their_size(tmp_path, three):
    (tmp_path / "labels").mkdir()
    (tmp_path / "0123456789abcdef.txt").write_text("not a cache")
    assert names(tmp_path) == [three[2], three[0], three[1]]
    for cache in caches_in(tmp_path):
        assert cache.size == sum(path.stat().st_size for path in cache.home.iterdir())
        assert (cache.pairs, cache.resolution) == (4, SIZE)
    opened = build(tmp_path, 2)
    assert names(tmp_path) == [three[0], three[1], opened.folder]


def test_the_oldest_are_removed_until_the_limit_is_kept(tmp_path, three):
    sizes = {cache.home: cache.size for cache in caches_in(tmp_path)}
    gone = list(remove_oldest(tmp_path, sizes[three[0]] + sizes[three[1]]))
    assert [cache.home for cache in gone] == [three[2]] and names(tmp_path) == [three[0], three[1]]
    assert [cache.home for cache in make_room(three[1], 1, sizes[three[0]])] == [three[0]]
    with pytest.raises(OverLimit, match="encoding takes up to 2e-09 GB, over the limit of 1e-09 GB"):
        make_room(three[1], 2, 1)
    assert names(tmp_path) == [three[1]]  # nothing more is removed for what cannot fit


def test_a_cache_in_use_stays_and_the_next_is_removed(tmp_path, three):
    used = build(tmp_path, 2)
    os.utime(three[2] / IN_USE, (1, 1))
    assert is_in_use(three[2]) and not is_in_use(three[0])
    assert not remove(three[2])
    assert [cache.home for cache in make_room(tmp_path / "new", 1, 1 + caches_in(tmp_path)[0].size)] == [
        three[0],
        three[1],
    ]
    with pytest.raises(OverLimit, match="the 1 that are left are in use"):
        make_room(tmp_path / "new", 1, 2)
    assert used.batch([0])[0].shape[:2] == (1, 2)
    del used
    assert remove(three[2]) and names(tmp_path) == []


def test_another_process_that_uses_a_cache_keeps_it_and_a_killed_one_does_not(tmp_path, three):
    program = (
        "import sys, pathlib; from diffusion_align.data.stored_caches import hold; "
        "held = hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, str(three[0])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert is_in_use(three[0]) and not remove(three[0])
        process.kill()
    assert not is_in_use(three[0]) and remove(three[0])


@pytest.mark.parametrize("again", [False, True])
def test_a_cache_that_is_removed_while_it_is_opened_is_made_again(monkeypatch, three, again):
    """The remover comes between the opening of the lock's file and its lock; another process may make a new file."""
    lock, done = fcntl.flock, []

    def slow(descriptor, operation):
        if operation == fcntl.LOCK_SH and not done:
            done.append(remove(three[0]))
            if again:
                three[0].mkdir()
                (three[0] / IN_USE).touch()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    held = hold(three[0])
    assert done == [True] and held is not None
    assert list(three[0].iterdir()) == [three[0] / IN_USE] and is_in_use(three[0])


def test_a_removal_that_was_killed_leaves_nothing_for_long(tmp_path, three):
    (tmp_path / f".removed-{three[0].name}-1").mkdir()
    assert list(remove_oldest(tmp_path, 10**12)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(home.name for home in three)


def test_a_cache_without_the_file_of_its_use_is_as_old_as_its_newest_file(tmp_path, three):
    """Caches of older versions have none."""
    for home in three:
        (home / IN_USE).unlink()
        for path in home.iterdir():
            os.utime(path, (three.index(home) + 1, three.index(home) + 1))
    assert [cache.used for cache in caches_in(tmp_path)] == [1, 2, 3]
    assert remove(three[0]) and remove_oldest(tmp_path, 10**12).__next__ is not None


def test_a_half_built_cache_is_listed_and_can_be_removed(tmp_path, capsys, three):
    (three[0] / "manifest.json").unlink()
    assert main(["cache", "ls", str(tmp_path)]) == 0
    assert "not finished" in capsys.readouterr().out
    assert main(["cache", "rm", str(tmp_path), "--key", three[0].name]) == 0
    assert names(tmp_path) == [three[2], three[1]]


def test_a_limit_removes_before_encoding_and_only_then(tmp_path, three):
    told = []
    build(tmp_path, 2, before_encoding=lambda home, size: told.append(home))
    assert told == []
    fresh = build(tmp_path, 9, before_encoding=lambda home, size: told.append(make_room(home, size, 2 * size)))
    assert [cache.home for cache in told[0]][0] == three[0] and fresh.folder in names(tmp_path)


def test_ls_and_rm_on_the_command_line(tmp_path, capsys, three):
    run = tmp_path / "run"
    run.mkdir()
    held = hold(three[2])
    os.utime(three[2] / IN_USE, (1, 1))
    for folder in ("encoded", "cache"):
        (run / folder).symlink_to(tmp_path)
        assert main(["cache", "ls", str(run)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:3]] == [home.name for home in (three[2], three[0], three[1])]
        assert (
            lines[0].endswith("in use")
            and f"4 pairs or rankings at {SIZE}" in lines[1]
            and lines[3].startswith("3 caches")
        )
        (run / folder).unlink()
    rm = ["cache", "rm", str(tmp_path)]
    assert main(rm) == 2 and "--key KEY (may be repeated), --limit_gb N, or --all" in capsys.readouterr().err
    assert main([*rm, "--all", "--limit_gb", "1"]) == 2
    assert main([*rm, "--key", "zz"]) == 1 and "there is no cache 'zz'; it has" in capsys.readouterr().err
    assert main([*rm, "--key", three[2].name]) == 1
    assert "a process uses it, so it stays" in capsys.readouterr().err
    assert main([*rm, "--key", three[0].name[:8]]) == 0
    assert names(tmp_path) == [three[2], three[1]]
    assert main([*rm, "--limit_gb", "0"]) == 1 and "are in use" in capsys.readouterr().err
    assert held is not None
    held.close()
    assert main([*rm, "--all"]) == 0 and names(tmp_path) == []
    assert main(["cache", "ls", str(tmp_path / "none")]) == 1 and "no such folder" in capsys.readouterr().err
    assert main(["cache", "ls"]) == 2 and "which caches?" in capsys.readouterr().err
