"""The reward "people": a run learns from what was pressed, and asks nothing twice."""

import queue
import threading

import pytest
import torch
from test_annotate import Client
from test_online_command import _fresh_accelerate, argv, toys  # noqa: F401  (fixtures)

from diffusion_align import cli
from diffusion_align.commands.annotate import command
from diffusion_align.commands.annotate import people as people_module
from diffusion_align.commands.annotate.people import people
from diffusion_align.train import record


@pytest.fixture
def person(monkeypatch):
    """`person(answer)` sits down: answer(client, number of questions) is called for every page that opens."""
    servers = queue.Queue()

    class Watched(command.Server):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.put(self)

    monkeypatch.setattr(command, "Server", Watched)
    asked = []

    def sit(answer):
        def work():
            while (server := servers.get()) is not None:
                asked.append(len(server.session.questions) - server.session.decided())
                try:
                    answer(Client(server), len(server.session.questions))
                finally:  # a person who fell over must not keep the test waiting
                    server.stopped.set()

        threading.Thread(target=work, daemon=True).start()
        return asked

    yield sit
    servers.put(None)


def pictures(count):
    """No two alike, and such that their bytes are what they were."""
    return torch.arange(count * 3 * 8 * 8).remainder(256).view(count, 3, 8, 8).float() / 255 * 0.5 + torch.linspace(
        0, 0.5, count
    ).view(-1, 1, 1, 1)


def seen_as(client, at, folder):
    """Image numbers from left to right on a page."""
    content = {path.read_bytes(): int(path.stem[-2:]) for path in folder.glob(f"{at - 1:04d}-*.png")}
    return [content[data] for data in client.pictures(at)]


def test_scores_are_places_and_skips_are_left_out(tmp_path, person):
    """A full order, a first with a tie behind it, a tie of all, a skip."""
    order = {}

    def answer(client, questions):
        assert questions == 4
        (folder,) = tmp_path.iterdir()
        order.update({at: seen_as(client, at, folder) for at in (1, 2)})
        client.answer(1, "pick", 2, 0)
        client.answer(2, "pick", 1)
        client.answer(3, "tie")
        client.answer(4, "skip")

    person(answer)
    scores = people(tmp_path, 3, seed=0)(pictures(12), [f"prompt {i // 3}" for i in range(12)]).view(4, 3)
    for at, places in ((1, {2: 0, 0: -1, 1: -2}), (2, {1: 0, 0: -1, 2: -1})):
        assert {left: scores[at - 1, order[at][left]].item() for left in range(3)} == places
    assert scores[2].tolist() == [0, 0, 0] and bool(scores[3].isnan().all())


def test_questions_are_asked_once(tmp_path, person):
    asked = person(lambda client, questions: client.answer(2 if len(asked) == 2 else 1, "pick", 0))
    score, prompts = people(tmp_path, 2, seed=0), ["a", "a", "b", "b"]
    first = score(pictures(4), prompts).view(2, 2)
    assert bool(first[1].isnan().all()) and sorted(first[0].tolist()) == [-1, 0]
    second = people(tmp_path, 2, seed=0)(pictures(4), prompts).view(2, 2)
    assert torch.equal(second[0], first[0]) and sorted(second[1].tolist()) == [-1, 0]
    assert torch.equal(score(pictures(4), prompts).view(2, 2), second) and asked == [2, 1]
    other = score(pictures(4).flip(0), prompts)  # other pictures are another question
    assert asked == [2, 1, 2] and bool(other.isnan().any())


def test_a_run_learns_from_a_person_and_reuses_the_choices(toys, tmp_path, person, capsys):  # noqa: F811
    def answer(client, questions):
        for at in range(1, questions + 1):
            client.answer(at, "pick", 0)

    asked = person(answer)
    flags = argv(toys, "d3po", tmp_path / "run", "--reward", "people", "--num_rounds", "2")
    assert cli.main(flags) == 0
    assert asked == [2, 2] and "2 prompts wait for your choice" in capsys.readouterr().out
    rows = record.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["items"] for row in rows] == [2, 2] and rows[0]["reward_mean"] == -0.5
    assert cli.main([*flags, "--overwrite_output_dir"]) == 0  # the same pictures are drawn again
    assert asked == [2, 2] and record.read(tmp_path / "run" / "metrics.jsonl") == rows


def test_ctrl_c_at_the_page_ends_the_run_and_keeps_what_was_chosen(toys, tmp_path, monkeypatch, capsys):  # noqa: F811
    def one_choice_and_ctrl_c(session, shown, port):
        session.answer(0, "pick", [0], 1.0)
        return True

    monkeypatch.setattr(people_module, "serve", one_choice_and_ctrl_c)
    flags = argv(toys, "d3po", tmp_path / "run", "--reward", "people", "--num_rounds", "1")
    assert cli.main(flags) == 130
    output = capsys.readouterr()
    assert "2 prompts wait" in output.out and "choices made so far are kept" in output.err.splitlines()[-1]
    assert cli.main([*flags, "--resume_from_checkpoint", "auto"]) == 130  # no checkpoint yet, so from the start
    assert "\n1 prompts wait" in capsys.readouterr().out


def test_people_are_asked_about_groups_only(toys, tmp_path, capsys):  # noqa: F811
    assert cli.main(argv(toys, "spo", tmp_path / "run", "--reward", "people")) == 2
    assert "reward people chooses between finished pictures" in capsys.readouterr().err.splitlines()[-1]
