"""Saves of checkpoints on a disk that is full, or nearly so."""

import os
import resource
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import Tensor

from diffusion_align.train.checkpoints.store import CheckpointError, latest_good, save
from stress.checkpoint.kills import base, content, ended, in_child, is_content


def limited_files(folder: Path, points: int, parameters: int) -> Counter[str]:
    """Saves with a limit on the size of files, from 0 to just below the largest file."""
    weights = base(parameters)
    save(folder, 1, *content(1, weights))
    return _full(folder, points, weights, 4 * parameters, _limit)


@contextmanager
def _limit(size: int) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def full_disks(folder: Path, points: int, parameters: int, checked: bool) -> Counter[str] | None:
    """Saves on a small disk (a tmpfs) with different amounts of free space, which is checked beforehand if `checked`.

    None if this user may not mount one.
    """
    weights = base(parameters)
    size = 12 * parameters
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={3 * size + 2**22}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        return None
    try:
        save(folder / "run", 1, *content(1, weights))

        @contextmanager
        def filled(room: int) -> Iterator[None]:
            usage = shutil.disk_usage(folder)
            with (folder / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, usage.free - room)
            if not checked:
                shutil.disk_usage = lambda path: usage._replace(total=0)
            yield
            (folder / "ballast").unlink()

        return _full(folder / "run", points, weights, size, filled)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _full(
    folder: Path, points: int, weights: Tensor, size: int, short: Callable[[int], AbstractContextManager[None]]
) -> Counter[str]:
    """One save for each of `points` amounts of space between 0 and `size`; each must be reported and leave nothing."""
    found: Counter[str] = Counter(points=0, reported=0, wrong=0, broken=0)

    def starved(room: int) -> int:
        with short(room):
            try:
                save(folder, 2, *content(2, weights))
            except CheckpointError:
                reported = True
            else:
                reported = False
        if not reported or os.listdir(folder) != ["step-00000001"]:
            return 1
        save(folder, 2, *content(2, weights))  # there is space again
        return 0

    for point in range(points):
        code = ended(in_child(lambda: starved(size * point // points)))  # noqa: B023
        found["points"] += 1
        found["reported"] += code == 0
        found["wrong"] += code != 0
        latest = latest_good(folder)
        found["broken"] += latest is None or latest.step != 2 or not is_content(latest, weights)
        shutil.rmtree(folder / "step-00000002")
    return found
