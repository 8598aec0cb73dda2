"""What a command says, and to whom: readers that leave, encodings, log files, rewards that exit, modes of files."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from diffusion_align import cli, progress
from diffusion_align.commands.interrupt import Interrupted, Interruptible
from diffusion_align.consoles import steady
from diffusion_align.models import weights
from diffusion_align.progress import progress_bar
from diffusion_align.rewards import RewardError
from diffusion_align.rewards.custom import python_reward

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from stress_runs import flags, make_world, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def closed():
    """A text stream into a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", encoding="utf-8")
    yield stream
    stream.close()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_leaves_does_not_end_the_work(monkeypatch, closed, name):
    monkeypatch.setattr(sys, name, closed)
    with steady():
        for _ in range(3):
            print("x" * 100_000, file=getattr(sys, name), flush=True)
    assert getattr(sys, name) is closed


def test_a_run_whose_output_is_cut_off_is_finished(world, tmp_path, monkeypatch, closed):
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "stdout", closed)
    assert cli.main(flags(world, "dpo", tmp_path / "run")) == 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_listing_that_is_cut_off_is_no_error():
    done = subprocess.Popen(
        [sys.executable, "-m", "diffusion_align.cli", "presets", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    assert done.wait() == 0 and not done.stderr.read()
    done.stderr.close()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_character_reaches_every_console(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with steady():
        print("−3.1 points, café, 漢字, \udcff")
    said = raw.getvalue().decode(encoding)
    assert said.startswith("−3.1" if encoding == "utf-8" else "\\u22123.1") and "\\udcff" in said
    assert ("é" in said) == (encoding != "ascii")


def test_a_missing_file_with_an_accent_is_named_on_an_ascii_console(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = [sys.executable, "-m", "diffusion_align.cli", "data", "inspect", str(tmp_path / "café.parquet")]
    done = subprocess.run(argv, env=env, capture_output=True)
    assert done.returncode == 1 and b"caf\\xe9.parquet" in done.stderr and b"Traceback" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_lines_and_a_terminal_a_bar(monkeypatch):
    log, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(progress, "SECONDS", 1e9)  # so long that none passes here
    monkeypatch.setattr(progress, "SHORT", 0.0)
    for stream in (log, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=1000, desc="draw", unit="picture") as bar:
            for _ in range(1000):
                bar.update()
    lines = log.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in log.getvalue()  # where it begins and where it ends
    assert lines[0].startswith("draw: 0 %, 0 of 1000") and lines[1].startswith("draw: 100 %, 1000 of 1000")
    assert terminal.getvalue().count("\r") >= 2


def test_short_work_writes_nothing_into_a_log_file(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "SHORT", 1e9)
    assert list(progress_bar(range(3), desc="read", unit="row")) == [0, 1, 2] and not log.getvalue()


def test_a_bar_of_unknown_length_and_a_hidden_one(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress, "SHORT", 0.0)
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress_bar(iter(range(3)), desc="read", unit="row")) == [0, 1, 2]
    assert log.getvalue().splitlines()[-1].startswith("read: 3 [")
    before = log.getvalue()
    assert list(progress_bar(range(3), desc="hidden", unit="row", hidden=True)) == [0, 1, 2]
    assert log.getvalue() == before


def test_every_bar_of_the_package_is_made_in_one_place():
    package = Path(cli.__file__).parent
    made = [path.name for path in package.rglob("*.py") if "tqdm(" in path.read_text(encoding="utf-8")]
    assert made == ["progress.py"]


@pytest.mark.parametrize("way", ["sys.exit(0)", "raise SystemExit", "exit()"])
@pytest.mark.parametrize("where", ["when it is read", "when it scores"])
def test_a_reward_that_exits_is_an_error(tmp_path, way, where):
    file = tmp_path / "reward.py"
    inside = where == "when it scores"
    file.write_text(f"import sys\n{'' if inside else way}\ndef f(images, prompts):\n    {way if inside else 'pass'}\n")
    with pytest.raises(RewardError, match="SystemExit"):
        python_reward(f"{file}:f")(torch.zeros(1, 3, 8, 8), ["a"])


def test_an_exit_from_below_the_command_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda argv: sys.exit(0))
    assert cli.main(["doctor"]) == 1
    assert "called exit(0); its work is not done" in capsys.readouterr().err


def test_a_reward_file_may_hold_dataclasses_with_delayed_annotations(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom typing import ClassVar\n"
        "@dataclass\nclass Scale:\n    by: float = 2.0\n    of: ClassVar[int] = 1\n"
        "def f(images, prompts):\n    return [Scale().by] * len(prompts)\n"
    )
    assert python_reward(f"{file}:f")(torch.zeros(2, 3, 8, 8), ["a", "b"]).tolist() == [2.0, 2.0]


def test_reward_files_of_one_name_do_not_take_one_anothers_place(tmp_path):
    found = []
    for number in (1.0, 2.0):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = f"import sys\nNUMBER = {number}\ndef f(images, prompts):\n    return [sys.modules[__name__].NUMBER]\n"
        (folder / "mine.py").write_text(text)
        found.append(python_reward(f"{folder / 'mine.py'}:f"))
    assert [float(reward(torch.zeros(1, 3, 8, 8), ["a"])) for reward in found] == [1.0, 2.0]


def test_a_repeated_signal_is_the_first_one_until_its_grace_is_over():
    now = [0.0]
    with pytest.raises(Interrupted, match="a second signal"), Interruptible(grace=5.0, clock=lambda: now[0]) as asked:
        for at, number in ((0.0, signal.SIGTERM), (0.1, signal.SIGTERM), (4.9, signal.SIGINT)):
            now[0] = at
            os.kill(os.getpid(), number)
            assert asked.asked == signal.SIGTERM
        now[0] = 5.1
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_files_have_the_mode_of_the_umask(world, tmp_path, umask, mode, kind):
    before = os.umask(umask)
    try:
        assert train(flags(world, "dpo", tmp_path / "run", f"--cache_dir={tmp_path / 'cache'}", mode=kind))[0] == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert len(files) > 10
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {p.name: oct(mode) for p in files}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_full_disk_at_the_end_keeps_the_older_file_and_says_where_the_weights_are(world, tmp_path, monkeypatch, kind):
    run = tmp_path / "run"
    old = run / ("pytorch_lora_weights.safetensors" if kind == "lora" else "unet/diffusion_pytorch_model.safetensors")
    old.parent.mkdir(parents=True)
    old.write_bytes(b"good")

    def full(*args, **more):
        Path(args[1] if kind == "full" else args[0], "half").write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    owner = "diffusion_align.models.weights."
    target = "UNet2DConditionModel.save_pretrained" if kind == "full" else "StableDiffusionPipeline.save_lora_weights"
    with monkeypatch.context() as patch:
        if kind == "full":
            patch.setattr(owner + target, lambda self, path: (Path(path).mkdir(), full(self, path)))
        else:
            patch.setattr(owner + target, staticmethod(full))
        code, said = train(flags(world, "dpo", run, "--overwrite_output_dir", mode=kind))
    assert code == 1 and "No space left on device" in said
    assert "They are safe in the checkpoint of step 12" in said and "--resume_from_checkpoint latest" in said
    assert not list(run.glob(".*partial*"))
    again = train(flags(world, "dpo", run, "--resume_from_checkpoint=latest", mode=kind))
    assert again[0] == 0 and old.read_bytes() != b"good"


def test_an_older_export_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    old = tmp_path / "pytorch_lora_weights.safetensors"
    old.write_bytes(b"good")

    def full(folder, **more):
        (Path(folder) / old.name).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    unet = SimpleNamespace(peft_config={"default": SimpleNamespace(r=4, lora_alpha=4, target_modules={"to_q"})})
    monkeypatch.setattr(weights, "_lora_state", lambda unet: {})
    monkeypatch.setattr(weights.StableDiffusionPipeline, "save_lora_weights", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save_lora(unet, tmp_path)  # pyright: ignore[reportArgumentType]
    assert old.read_bytes() == b"good" and [path.name for path in tmp_path.iterdir()] == [old.name]
