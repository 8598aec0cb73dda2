"""A small run of the stress program that hands pictures over, and that it detects damage."""

import time

from stress import handover


def test_killed_commands_leave_complete_folders(capsys):
    assert handover.main(["--prompts", "24", "--kills", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["dpg: 3 kills", "compbench: 3 kills"]
    assert all("0 not whole; at the end 0 of 24 bad" in line for line in lines)


def test_unfinished_and_missing_files_are_counted(monkeypatch, tmp_path):
    def sloppy(drawn, out, layout):
        (out / layout).mkdir(parents=True, exist_ok=True)
        for place in range(len(drawn.rows) - 1):
            (out / layout / f"vrd{place}.png").write_bytes(b"\x89PNG")
            yield out
        time.sleep(0.3)  # so that most kills find it alive; the others do not count

    monkeypatch.setattr(handover, "arrange", sloppy)
    hits, seen, broken, wrong = handover.killed(tmp_path, "dpg", 12, 4, 0)
    assert hits == 4 and seen == broken > 0 and wrong > 0
