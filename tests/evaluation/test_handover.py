"""A small run of stress_handover.py, and that it detects damage."""

import importlib.util
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def stress():
    path = Path(__file__).parent.parent.parent / "scripts" / "stress_handover.py"
    spec = importlib.util.spec_from_file_location("stress_handover", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_commands_leave_complete_folders(stress, capsys):
    assert stress.main(["--prompts", "24", "--kills", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["dpg: 3 kills", "compbench: 3 kills"]
    assert all("0 not whole; at the end 0 of 24 bad" in line for line in lines)


def test_unfinished_and_missing_files_are_counted(stress, monkeypatch, tmp_path):
    def sloppy(drawn, out, layout):
        (out / layout).mkdir(parents=True, exist_ok=True)
        for place in range(len(drawn.rows) - 1):
            (out / layout / f"vrd{place}.png").write_bytes(b"\x89PNG")
            yield out
        time.sleep(0.3)  # so that most kills find it alive; the others do not count

    monkeypatch.setattr(stress, "arrange", sloppy)
    hits, seen, broken, wrong = stress.killed(tmp_path, "dpg", 12, 4, 0)
    assert hits == 4 and seen == broken > 0 and wrong > 0
