"""The command: fast answers, one-line errors, exit codes."""

import subprocess
import sys

import pytest
import yaml

from diffusion_align import cli
from diffusion_align.options import all_presets, preset_names, preset_path

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "open_clip", "scipy")
# What must answer at once: help at every level, the presets, and mistakes of every kind.
LIGHT = [
    (["--help"], 0),
    ([], 0),
    (["--version"], 0),
    (["train"], 0),
    (["train", "--help"], 0),
    (["train", "dpo", "--help"], 0),
    (["sample", "-h"], 0),
    (["evaluate", "--help"], 0),
    (["data", "inspect", "--help"], 0),
    (["data", "inspect"], 2),
    (["data", "convert", "x"], 2),
    (["presets"], 0),
    (["presets", "ls"], 0),
    (["presets", "ls", "--help"], 0),
    (["presets", "show", "tiny"], 0),
    (["doctor", "--help"], 0),
    (["tran"], 2),
    (["train", "dpp"], 2),
    (["presets", "check"], 0),
    (["presets", "lss"], 2),
    (["presets", "show", "tny"], 2),
    (["presets", "show"], 2),
    (["presets", "cp", "tiny", "--force"], 2),
    (["train", "dpo"], 2),
    (["train", "dpo", "--lerning_rate", "1"], 2),
    (["train", "dpo", "--preset", "tiny", "--data", "x", "train.seed=x"], 2),
    (["train", "dpo", "--config", "none.yaml"], 2),
    (["sample", "--prompt", "x"], 2),
    (["evaluate"], 2),
]


@pytest.mark.parametrize(("argv", "code"), LIGHT, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_light_commands_import_nothing_heavy(argv, code):
    """Each in a fresh interpreter, which itself reports what it has imported."""
    program = (
        f"import sys; from diffusion_align.cli import main; code = main({argv!r}); "
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    if code:
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("diffusion-align: error: ")


def test_a_plan_does_not_import_diffusers(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "a.png", "rejected": "a.png"}')
    (tmp_path / "a.png").write_bytes(b"not looked at")
    argv = ["train", "dpo", "--model", "owner/name", "--data", str(tmp_path / "pairs.jsonl"), "--dry-run"]
    heavy = ("diffusers", "transformers", "open_clip")
    program = (
        f"import sys; from diffusion_align.cli import main; code = main({argv!r}); "
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not on this disk" in done.stdout and "steps            1, 4 samples, 4 epochs of 1 pairs" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_imports_little():
    """Counted in modules, of which torch alone has more than 1000: seconds are the machine's affair."""
    program = (
        "import sys, contextlib\nfrom diffusion_align.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['train', 'dpo', '--help'])\n"
        f"print('MODULES', len(sys.modules), [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    _, count, heavy = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert heavy == "[]" and int(count) < 400


def test_exit_codes_and_one_line(capsys, monkeypatch):
    def failing(error):
        def run(argv):
            raise error

        return run

    cases = [
        (ValueError("weights\nare odd"), 1, "error: weights are odd"),
        (FileNotFoundError(2, "No such file", "x.yaml"), 1, "x.yaml"),
        (RuntimeError("boom"), 1, "unexpected RuntimeError: boom (--traceback shows where)"),
        (KeyError(), 1, "unexpected KeyError: KeyError"),
        (KeyboardInterrupt("continue with X"), 130, "interrupted; continue with X"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ]
    for error, code, message in cases:
        monkeypatch.setattr(cli, "_run", failing(error))
        assert cli.main(["sample"]) == code
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1


def test_traceback_on_demand(monkeypatch):
    def run(argv):
        raise ValueError("deep")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(ValueError, match="deep"):
        cli.main(["sample", "--traceback"])
    monkeypatch.setenv("DIFFUSION_ALIGN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="deep"):
        cli.main(["sample"])
    monkeypatch.setenv("DIFFUSION_ALIGN_TRACEBACK", "0")
    assert cli.main(["sample"]) == 1


def test_overview_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {words} " in said for words in [*cli.VERBS, *cli.OTHER_VERBS])
    assert cli.main(["presets"]) == 0
    assert "train" not in capsys.readouterr().out


def test_train_help_names_the_presets(capsys):
    cli.main(["train", "dpo", "--help"])
    assert "presets: " + ", ".join(preset_names("train dpo")) in capsys.readouterr().out


def test_presets_ls_show_cp(capsys, tmp_path):
    assert cli.main(["presets", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == all_presets()
    assert cli.main(["presets", "show", "sd15-full"]) == 0
    shown, file = capsys.readouterr().out, preset_path("sd15-full", "train dpo").read_text()
    assert shown.startswith(file) and yaml.safe_load(shown) == yaml.safe_load(file)
    assert "pickapic_v2: none stated there" in shown.removeprefix(file)
    assert cli.main(["presets", "cp", "tiny", str(tmp_path)]) == 0
    assert (tmp_path / "tiny.yaml").read_text() == preset_path("tiny", "train dpo").read_text()
    capsys.readouterr()
    assert cli.main(["presets", "show", "dpo/tiny"]) == 0
    assert capsys.readouterr().out.startswith(preset_path("tiny", "train dpo").read_text())
    assert cli.main(["presets", "cp", "tiny", str(tmp_path)]) == 2
    assert "exists; give another name" in capsys.readouterr().err


def test_dry_run_of_sample_prints_the_options(capsys):
    assert cli.main(["sample", "--model=tiny", "--prompt=a", "--dry-run"]) == 0
    assert "guidance: 7.5" in capsys.readouterr().out
