"""What a command says, and to whom: readers that leave, encodings, log files, rewards that exit, modes of files."""

from __future__ import annotations

import ast
import errno
import io
import os
import re
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
from stress.runs import flags, make_world, train
from tqdm import tqdm

from diffusion_align import cli
from diffusion_align.commands.interrupt import Interrupted, Interruptible
from diffusion_align.evaluation import contact_sheet
from diffusion_align.models import saved_weights
from diffusion_align.rewards import RewardError, prefetch
from diffusion_align.rewards.custom import python_reward
from diffusion_align.system.consoles import tolerant_output
from diffusion_align.system.progress import counted, progress_bar


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
def test_a_closed_pipe_does_not_end_the_work(monkeypatch, closed, name):
    monkeypatch.setattr(sys, name, closed)
    with tolerant_output():
        for _ in range(3):
            print("x" * 100_000, file=getattr(sys, name), flush=True)
    assert getattr(sys, name) is closed


def test_a_run_whose_output_is_cut_off_is_finished(world, tmp_path, monkeypatch, closed):
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "stdout", closed)
    assert cli.main(flags(world, "dpo", tmp_path / "run")) == 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_closed_pipe_while_listing_is_no_error():
    done = subprocess.Popen(
        [sys.executable, "-m", "diffusion_align.cli", "presets", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    assert done.wait() == 0 and not done.stderr.read()
    done.stderr.close()


class Gone(io.StringIO):
    """A terminal that was closed under a command that goes on, as after `disown`."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def fileno(self):
        return self.number


def test_a_terminal_that_was_closed_does_not_end_the_work(monkeypatch, tmp_path):
    with (tmp_path / "terminal").open("wb") as file:
        monkeypatch.setattr(sys, "stderr", Gone(file.fileno()))
        with tolerant_output():
            print("step 1", file=sys.stderr)
        assert os.fstat(file.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_a_full_disk_under_the_log_ends_no_work_and_is_reported(capfd):
    words = [sys.executable, "-m", "diffusion_align.cli", "presets", "show", "dpo/tiny"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    said = done.stderr.decode().splitlines()
    assert len(said) == 1 and "some output of this command is lost: No space left on device" in said[0]


@pytest.mark.parametrize("missing", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_service_without_outputs_runs_the_command(monkeypatch, missing):
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["presets", "show", "dpo/tiny"]) == 0 and cli.main(["presets", "show", "dpo/none"]) == 2
    assert all(getattr(sys, name) is None for name in missing)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_character_reaches_every_console(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with tolerant_output():
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


@pytest.fixture
def now(monkeypatch):
    """The time that bars read, in seconds."""
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("diffusion_align.system.consoles.monotonic", lambda: clock[0])
    return clock


def test_a_log_file_gets_lines_and_a_terminal_a_bar(monkeypatch, now):
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=100, desc="draw", unit="picture") as bar:
            for _ in range(100):
                now[0] += 1.0
                bar.update()
                bar.set_postfix({"loss": "0.5"}, refresh=False)
    lines = log.getvalue().splitlines()
    # Of 100 s: after two, every thirty from there, and at the end. What is left follows from the mean so far.
    assert [line.split(" [")[0] for line in lines] == [
        f"draw: {n} %, {n} of 100" for n in (2, 32, 62, 92, 100)
    ] and "\r" not in log.getvalue()  # fmt: skip
    assert "[00:02<01:38" in lines[0] and "[01:32<00:08" in lines[3] and lines[3].endswith(", loss=0.5]")
    assert terminal.getvalue().count("\r") > 100 and " 100/100 [01:40<00:00" in terminal.getvalue()


def test_short_work_writes_nothing_into_a_log_file(monkeypatch, now):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress_bar(range(3), desc="read", unit="row"):
        now[0] += 0.6
    assert not log.getvalue()


def test_a_bar_of_unknown_length_and_a_hidden_one(monkeypatch, now):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress_bar(iter(range(3)), desc="read", unit="row"):
        now[0] += 1.5
    assert log.getvalue().splitlines()[-1].startswith("read: 3 [00:04")
    before = log.getvalue()
    assert list(progress_bar(range(3), desc="hidden", unit="row", hidden=True)) == [0, 1, 2]
    assert log.getvalue() == before


def test_slow_pictures_are_counted_by_the_steps_of_the_sampler(monkeypatch, now):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(total=4, desc="sample grid of the base", unit="picture") as bar:
        step = counted(lambda x, t: x + t, lambda: bar.update(4 / 25))  # four pictures in one batch, 25 steps of 20 s
        for number in range(25):
            now[0] += 20.0
            assert step(number, t=1) == number + 1
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("sample grid of the base: 4 %, 0.2 of 4 [00:20<08:00")
    assert lines[-1].startswith("sample grid of the base: 100 %, 4 of 4 [08:20<00:00")


@pytest.mark.parametrize("seconds", [0.1, 10.0])
def test_progress_bars_of_libraries_write_few_lines_to_log_files(monkeypatch, now, seconds):
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        with tolerant_output():
            print("before", file=sys.stderr)
            for _ in tqdm(range(10), desc="Loading weights", mininterval=0.0, ascii=True):
                now[0] += seconds
            print("after\r\n", file=sys.stderr)
    lines = log.getvalue().split("\n")
    shown = [line.split("|")[0] for line in lines[1:-3]]
    done = [10, 40, 70, 100, 100] if seconds > 1 else []
    assert shown == [f"Loading weights: {n:3d}%" for n in done]
    assert lines[0] == "before" and lines[-3] == "after\r" and log.getvalue().count("\r") == 1
    assert terminal.getvalue().count("\r") > 10


def test_every_bar_of_the_package_is_made_in_one_place():
    package = Path(cli.__file__).parent
    made = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"tqdm\(|\(tqdm\)|trange\(|print\([^\n]*\\r", path.read_text(encoding="utf-8"))
    ]
    assert made == ["progress.py"]


def test_every_file_of_text_is_utf_8_whatever_the_locale():
    package, lacking = Path(cli.__file__).parent, []
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call) and "utf-8" not in ast.unparse(call):
                lacking.append(f"{path.name}:{call.lineno} {ast.unparse(call)}")
    assert not lacking


def opens_text(call):
    """Whether a call opens a file as text: by open, Path.open, read_text, write_text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name != "open" or owner in ("os", "Image", "opener", "tarfile", "archive"):
        return False
    words = [word.value for word in [*call.args, *(k.value for k in call.keywords)] if isinstance(word, ast.Constant)]
    return not any(word in ("rb", "wb", "ab", "r+b", "a+b", "xb") for word in words)


STOP = "raise type('Stop', (BaseException,), {})('enough')"


@pytest.mark.parametrize("way", ["sys.exit(0)", "raise SystemExit", "exit()", "raise GeneratorExit", STOP])
@pytest.mark.parametrize("where", ["when it is read", "when it scores"])
def test_a_reward_that_exits_is_an_error(tmp_path, way, where):
    file = tmp_path / "reward.py"
    inside = where == "when it scores"
    file.write_text(f"import sys\n{'' if inside else way}\ndef f(images, prompts):\n    {way if inside else 'pass'}\n")
    with pytest.raises(RewardError, match="SystemExit|GeneratorExit|Stop: enough"):
        python_reward(f"{file}:f")(torch.zeros(1, 3, 8, 8), ["a"])


def test_a_reward_that_exits_in_the_background_is_an_error_unlike_ctrl_c(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def f(images, prompts):\n    raise KeyboardInterrupt\n")
    reward = python_reward(f"{file}:f")
    pictures = torch.zeros(1, 3, 8, 8)
    with pytest.raises(RewardError, match="KeyboardInterrupt"):
        list(prefetch(reward(pictures, ["a"]) for _ in range(3)))
    with pytest.raises(KeyboardInterrupt):
        reward(pictures, ["a"])


def test_a_reward_file_that_fails_leaves_no_module_behind(tmp_path):
    before = set(sys.modules)
    (tmp_path / "c.py").write_text("raise ValueError('no weights')\n")
    with pytest.raises(RewardError, match="no weights"):
        python_reward(f"{tmp_path / 'c.py'}:f")
    assert set(sys.modules) == before


def test_exit_calls_of_libraries_are_failures(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda argv: sys.exit(0))
    assert cli.main(["doctor"]) == 1
    assert "called exit(0); the command did not finish" in capsys.readouterr().err


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


def test_repeated_signals_within_the_grace_period_are_ignored():
    now = [0.0]
    with (
        pytest.raises(Interrupted, match="a second signal"),
        Interruptible(grace=5.0, clock=lambda: now[0]) as interrupt,
    ):
        for at, number in ((0.0, signal.SIGTERM), (0.1, signal.SIGTERM), (4.9, signal.SIGINT)):
            now[0] = at
            os.kill(os.getpid(), number)
            assert interrupt.signal_number == signal.SIGTERM
        now[0] = 5.1
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("launched", [True, False])
def test_a_delayed_repetition_is_not_a_second_signal(launched):
    now = [0.0]

    def heard(number, at):  # as Python hears it: when the call in hand ends
        now[0] = at
        os.kill(os.getpid(), number)

    with Interruptible(clock=lambda: now[0], launched=launched) as interrupt:
        heard(signal.SIGTERM, 0.0)
        heard(signal.SIGTERM, 20.0)  # the launcher's repetition, sent at once, in a backward pass of 20 s
        assert interrupt.signal_number == signal.SIGTERM
        with pytest.raises(Interrupted, match="a second signal"):
            heard(signal.SIGTERM, 21.0)
    with Interruptible(clock=lambda: now[0], launched=launched):
        heard(signal.SIGINT, 0.0)
        if launched:
            heard(signal.SIGINT, 6.0)
        with pytest.raises(Interrupted, match="a second signal"):
            heard(signal.SIGINT, 7.0)  # a person's second Ctrl-C


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
def test_a_full_disk_at_export_keeps_the_older_file_and_names_the_checkpoint(world, tmp_path, monkeypatch, kind):
    run = tmp_path / "run"
    old = run / ("pytorch_lora_weights.safetensors" if kind == "lora" else "unet/diffusion_pytorch_model.safetensors")
    old.parent.mkdir(parents=True)
    old.write_bytes(b"good")

    def full(*args, **more):
        Path(args[1] if kind == "full" else args[0], "half").write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    owner = "diffusion_align.models.saved_weights."
    target = "UNet2DConditionModel.save_pretrained" if kind == "full" else "StableDiffusionPipeline.save_lora_weights"
    with monkeypatch.context() as patch:
        if kind == "full":
            patch.setattr(owner + target, lambda self, path: (Path(path).mkdir(), full(self, path)))
        else:
            patch.setattr(owner + target, staticmethod(full))
        code, said = train(flags(world, "dpo", run, "--overwrite_output_dir", mode=kind))
    assert code == 1 and "No space left on device" in said
    assert "The checkpoint of step 12 has them" in said and "--resume_from_checkpoint latest" in said
    assert not list(run.glob(".*partial*"))
    again = train(flags(world, "dpo", run, "--resume_from_checkpoint=latest", mode=kind))
    assert again[0] == 0 and old.read_bytes() != b"good"


def test_an_older_export_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    old = tmp_path / "pytorch_lora_weights.safetensors"
    old.write_bytes(b"good")

    def full(folder, **more):
        (Path(folder) / old.name).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    unet = SimpleNamespace(peft_config={"default": SimpleNamespace(r=4, lora_alpha=4, target_modules={"to_q"})})
    monkeypatch.setattr(saved_weights, "_lora_state", lambda unet: {})
    monkeypatch.setattr(saved_weights.StableDiffusionPipeline, "save_lora_weights", full)
    with pytest.raises(OSError, match="No space left"):
        saved_weights.save_lora(unet, tmp_path)  # pyright: ignore[reportArgumentType]
    assert old.read_bytes() == b"good" and [path.name for path in tmp_path.iterdir()] == [old.name]


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_sample_grid_that_cannot_be_written_costs_only_itself(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(contact_sheet, "write_atomically", full_disk)
    run = tmp_path / "run"
    assert train(flags(world, "dpo", run, "--run_validation=true", "--validation_steps=6"))[0] == 0
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    told = [record.getMessage() for record in caplog.records if "sample grid could not be written" in record.message]
    assert len(told) == 2 and "step-00000006.png" in told[0] and "No space left on device" in told[0]


def test_a_picture_that_cannot_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        contact_sheet.write_atomically(tmp_path / "step-00000006.png", b"picture")
    assert not list(tmp_path.iterdir())
