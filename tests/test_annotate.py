"""`data annotate`: what a person saw and pressed is stored and exported, and nobody else has access."""

import base64
import hashlib
import http.client
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import combinations, permutations

import pyarrow.parquet as pq
import pytest
import torch
from helpers_machine import HANG
from PIL import Image

from diffusion_align import cli
from diffusion_align.commands.annotate import asking as session
from diffusion_align.commands.annotate import command
from diffusion_align.commands.annotate.choices import append, comparisons, read, relevance, standing
from diffusion_align.commands.annotate.questions import make_questions, on_page, read_pictures
from diffusion_align.commands.annotate.server import BODY_LIMIT, Server
from diffusion_align.data import read_pairs
from diffusion_align.data.bad_rows import DataError
from diffusion_align.objectives.selection import win_counts

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"' onclick='x' &amp; &lt;b&gt;",
    "красный круг 🟥 한국어 שלום",
    "{base} ${at} %s \\u003c `x` \\",
]


def make_folder(folder, prompts, images=2):
    """What `sample` writes; every picture has a colour of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, prompt in enumerate(prompts):
        for image in range(images):
            name = f"{number:04d}-{image:02d}.png"
            Image.new("RGB", (16, 16), (number % 256, image * 20, number // 256)).save(folder / name)
            entries.append({"file": name, "prompt": prompt, "prompt_number": number, "image": image})
    (folder / "samples.json").write_text(json.dumps({"pictures": entries, "seed": 0}))
    return folder


class Client:
    """A browser of two methods: no proxy, no cookies, no script."""

    def __init__(self, server):
        self.server, self.base = server, server.address
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, where="", **headers):
        return self.open(urllib.request.Request(self.base + where, headers=headers))

    def post(self, where, body=None):
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        return json.loads(self.open(urllib.request.Request(self.base + where, data, method="POST")))

    def answer(self, at, choice, *picked, seconds=1.5):
        return self.post(str(at), {"choice": choice, "picked": picked, "seconds": seconds})["next"]

    def open(self, request):
        with self.opener.open(request, timeout=HANG) as reply:
            self.headers, self.address = reply.headers, reply.url
            return reply.read()

    def refused(self, *request):
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.get(*request) if len(request) == 1 else self.post(*request)
        with caught.value as reply:
            return reply.code, reply.read().decode()

    def pictures(self, at):
        """The contents of the pictures of a question from left to right, by the addresses in its page."""
        page = self.get(str(at)).decode()
        return [self.get(f"picture/{number}") for number in re.findall(r'src="[^"]*/picture/(\d+)"', page)]


@contextmanager
def serving(folder, mode="best", seed=0):
    """A session in a thread. Leaving it is a kill: nothing is exported or written any more."""
    pictures = read_pictures(folder)
    rows, _ = read(folder / "choices.jsonl", pictures)
    session = command.start_session(folder, pictures, rows, mode=mode, seed=seed)
    server = Server(session, pictures)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stored(folder):
    return [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]


def exported(folder):
    pictures = read_pictures(folder)
    command.export(folder, pictures, standing(read(folder / "choices.jsonl", pictures)[0]))
    return pq.read_table(folder / "pairs.parquet").to_pylist()


def lists(folder):
    return [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]


def test_the_left_picture_wins_when_1_is_pressed(tmp_path):
    folder = make_folder(tmp_path, [f"prompt {i}" for i in range(6)])
    with serving(folder) as client:
        assert b"<title>1 of 6</title>" in client.get() and client.address == client.base + "1"
        seen = [client.pictures(at) for at in range(1, 7)]
        # Left, right, left, right, then a tie and a skip.
        assert [client.answer(i + 1, "pick", i % 2, seconds=0.25 * i) for i in range(4)] == [2, 3, 4, 5]
        assert client.answer(5, "tie") == 6 and client.answer(6, "skip") == 7
        assert "Every question has an answer" in client.get().decode() and client.address == client.base + "7"
        assert client.post("stop")["stopped"] and client.server.stopped.wait(HANG)
    rows = stored(folder)
    assert [row["choice"] for row in rows] == ["winner"] * 4 + ["tie", "skip"]
    assert [row["seconds"] for row in rows[:4]] == [0, 0.25, 0.5, 0.75]
    assert all([(folder / file).read_bytes() for file in row["shown"]] == seen[i] for i, row in enumerate(rows))
    table = exported(folder)
    assert [row["caption"] for row in table] == [f"prompt {i}" for i in range(5)] and table[4]["label_0"] == 0.5
    pairs, counts = read_pairs(folder / "pairs.parquet")
    assert [(pair.winner.read(), pair.loser.read()) for pair in pairs] == [
        (seen[i][i % 2], seen[i][1 - i % 2]) for i in range(4)
    ]
    assert (counts.used, counts.ties, counts.broken) == (4, 1, 0)
    # The places of the winner in the file are those of the files, not always the first.
    assert {row["label_0"] for row in table[:4]} == {0.0, 1.0}
    assert [entry["relevance"] for entry in lists(folder)[:4]] == [
        [row["label_0"], row["label_1"]] for row in table[:4]
    ]
    assert lists(folder)[4] == {"prompt": "prompt 4", "images": ["0004-00.png", "0004-01.png"], "relevance": [0, 0]}


def test_a_killed_session_continues_and_rewrites_nothing(tmp_path):
    folder = make_folder(tmp_path, "abcd")
    file = folder / "choices.jsonl"
    with serving(folder) as client:
        client.answer(1, "pick", 0)
        client.answer(3, "tie")
    whole = file.read_bytes()
    with file.open("ab") as torn:
        torn.write(b'{"choice": "winner", "winner": "0001-0')
    before = file.read_bytes()
    with serving(folder) as client:
        client.get()
        assert client.address == client.base + "2"
        assert client.answer(2, "pick", 1) == 4
    after = file.read_bytes()
    assert after.startswith(before + b"\n") and before.startswith(whole) and after.endswith(b"}\n")
    pictures = read_pictures(folder)
    rows, torn = read(file, pictures)
    assert [row["prompt_number"] for row in rows] == [0, 2, 1] and torn == 1
    assert len({row["session"] for row in rows}) == 2
    assert rows[2]["winner"] == rows[2]["shown"][1]
    # A line that lost nothing but its end is whole.
    file.write_bytes(after[:-1])
    with serving(folder) as client:
        assert client.answer(4, "skip") == 5
    rows, torn = read(file, pictures)
    assert [row["prompt_number"] for row in rows] == [0, 2, 1, 3] and torn == 1


def test_undo_appends_and_restores_the_earlier_answer(tmp_path):
    folder = make_folder(tmp_path, "ab")
    with serving(folder) as client:
        assert client.post("undo") == {"message": "There is nothing to undo."}
        client.answer(1, "pick", 0)
        client.answer(2, "pick", 0)
        client.answer(1, "pick", 1)
        first = stored(folder)
    with serving(folder) as client:  # another session takes back what an earlier one chose
        assert client.post("undo") == {"next": 1}
        assert '<span class="won">✓</span></button><button' in client.get("1").decode()  # the left one again
        assert client.post("undo") == {"next": 2} and client.post("undo") == {"next": 1}
        assert client.post("undo") == {"message": "There is nothing to undo."}
    with serving(folder) as client:  # and what was taken back is open again
        client.get()
        assert client.address == client.base + "1"
        client.answer(1, "tie")
    rows = stored(folder)
    assert rows[:3] == first and [row["choice"] for row in rows[3:]] == ["undo"] * 3 + ["tie"]
    assert [row["prompt_number"] for row in rows[3:6]] == [0, 1, 0]
    assert standing(rows) == [rows[6]] and standing(rows[:4]) == rows[:2] and standing(rows[:5]) == rows[:1]
    assert [row["label_0"] for row in exported(folder)] == [0.5]


def test_files_are_empty_when_all_choices_were_taken_back(tmp_path, capsys):
    folder = make_folder(tmp_path, "a")
    with serving(folder) as client:
        client.answer(1, "pick", 0)
        assert len(exported(folder)) == 1
        client.post("undo")
    assert cli.main(["data", "annotate", str(folder), "--export"]) == 0
    assert pq.read_table(folder / "pairs.parquet").num_rows == 0 and lists(folder) == []
    assert "choices 0, ties 0, skips 0" in capsys.readouterr().out


def test_the_best_of_four_beats_the_others(tmp_path):
    folder = make_folder(tmp_path, "abc", images=4)
    with serving(folder) as client:
        seen = client.pictures(1)
        client.answer(1, "pick", 2)
        client.answer(2, "tie")
    table = exported(folder)
    of_a = [row for row in table if row["caption"] == "a"]
    assert len(of_a) == 3 and len(table) == 3 + 6
    for row in of_a:
        pictures = (row["jpg_0"], row["jpg_1"])
        assert pictures[0 if row["label_0"] == 1 else 1] == seen[2] and seen[2] in pictures
    assert {row["label_0"] for row in table[3:]} == {0.5}
    winner = stored(folder)[0]["winner"]
    entry = lists(folder)[0]
    assert entry["images"] == [f"0000-{i:02d}.png" for i in range(4)]
    assert entry["relevance"] == [float(file == winner) for file in entry["images"]]
    assert len(lists(folder)) == 2


def test_rankings_with_and_without_ties(tmp_path):
    folder = make_folder(tmp_path, "ab", images=4)
    with serving(folder, mode="rank") as client:
        shown = [[picture.file for picture in client.server.session.shown(at)] for at in range(2)]
        client.answer(1, "pick", 2, 0, 3)  # the last place is clear
        client.answer(2, "pick", 1)
        assert client.refused("2", {"choice": "pick", "picked": [1, 1], "seconds": 1})[0] == 400
        page = client.get("1").decode()
    order = [shown[0][i] for i in (2, 0, 3, 1)]
    rows = stored(folder)
    assert rows[0]["ranking"] == [[file] for file in order]
    assert rows[1]["ranking"][0] == [shown[1][1]] and sorted(rows[1]["ranking"][1]) == sorted(
        shown[1][i] for i in (0, 2, 3)
    )
    assert re.findall(r'class="won">(\d)<', page) == ["2", "4", "1", "3"]
    # Files differ in their content, so that each row of the table names its two files.
    name = {(folder / file).read_bytes(): file for group in shown for file in group}
    labels = {(name[row["jpg_0"]], name[row["jpg_1"]]): row["label_0"] for row in exported(folder)}
    assert len(labels) == 12
    for first, second in combinations(sorted(shown[0]), 2):
        assert labels[first, second] == float(order.index(first) < order.index(second))
    for first, second in combinations(sorted(shown[1]), 2):
        won = {shown[1][1]: 1}
        assert labels[first, second] == 0.5 + 0.5 * (won.get(first, 0) - won.get(second, 0))
    first, second = lists(folder)
    assert first["relevance"] == pytest.approx([(3 - order.index(file)) / 3 for file in first["images"]])
    assert second["relevance"] == [float(file == shown[1][1]) for file in second["images"]]


def test_pairs_have_a_fixed_order_and_visit_every_prompt_first(tmp_path):
    folder = make_folder(tmp_path, "abcde", images=4)
    pictures = read_pictures(folder)
    questions = make_questions(pictures, "pairs", seed=3)
    asked = [question.key for question in questions]
    assert asked == [question.key for question in make_questions(pictures, "pairs", seed=3)]
    every = {
        ("best", n, pair) for n in range(5) for pair in combinations([f"{n:04d}-{i:02d}.png" for i in range(4)], 2)
    }
    assert len(asked) == 30 and set(asked) == every
    assert [number for _, number, _ in asked] == list(range(5)) * 6
    assert len({tuple(files[-6:-4] for files in key[2]) for key in asked[:5]}) > 1  # not the same pair of each prompt
    assert asked != [question.key for question in make_questions(pictures, "pairs", seed=4)]
    with serving(folder, mode="pairs", seed=3) as client:
        seen = client.get("3")
        client.answer(1, "tie")
        client.answer(2, "tie")
    with serving(folder, mode="pairs", seed=3) as client:
        again = client.get()
        assert client.address == client.base + "3"
    shown = [re.findall(rb"picture/(\d+)\"><kbd>", page) for page in (seen, again)]
    assert shown[0] == shown[1] and len(shown[0]) == 2


def test_a_pair_is_one_question_in_every_mode(tmp_path):
    folder = make_folder(tmp_path, "abc")
    with serving(folder, mode="rank") as client:
        assert client.answer(1, "pick", 0) == 2
    with serving(folder, mode="pairs") as client:
        assert client.answer(2, "pick", 0) == 3
    with serving(folder, mode="best") as client:
        client.get()
        assert client.address == client.base + "3"


def compared_in_full(scores):
    files = range(len(scores))
    return [(str(i), str(j), 0.5 + 0.5 * ((scores[i] > scores[j]) - (scores[i] < scores[j]))) for i, j in
            combinations(files, 2)]  # fmt: skip


@pytest.mark.parametrize("scores", [*permutations((3.0, 2.0, 1.0)), (1.0, 1.0, 0.0, 2.0), (0.0, 0.0, 0.0)])
def test_relevance_is_that_of_rankdpo(scores):
    found = relevance(compared_in_full(scores))
    expected = win_counts(torch.tensor([[scores]], dtype=torch.float64))[0].tolist()
    assert found is not None and [found[str(i)] for i in range(len(scores))] == pytest.approx(expected)


def test_pictures_never_compared_make_no_list():
    assert relevance([]) is None
    assert relevance([("a", "b", 1.0), ("c", "d", 1.0)]) is None  # a and d differ, and nobody compared them
    assert relevance([("a", "b", 1.0), ("a", "c", 1.0)]) == {"a": 1, "b": 0, "c": 0}
    assert relevance([("a", "b", 1.0), ("b", "c", 1.0)]) is None
    assert relevance([("a", "b", 1.0), ("b", "c", 1.0), ("a", "c", 1.0)]) == {"a": 1, "b": 0.5, "c": 0}
    assert comparisons({"choice": "skip", "images": ["a", "b"]}) == []


def test_places_are_balanced_and_depend_on_seed_and_prompt(tmp_path):
    """A fair coin for 400 pairs: 200 and a standard deviation of 10; for 100 lists of 4, 25 and 4.3 in each place."""
    pictures = read_pictures(make_folder(tmp_path / "two", ["p"] * 400))
    questions = make_questions(pictures, "best", 0)
    left = [on_page(question, 0)[0].image for question in questions]
    assert abs(left.count(0) - 200) < 40
    other = [on_page(question, 1)[0].image for question in questions]
    assert abs(sum(a == b for a, b in zip(left, other, strict=True)) - 200) < 40
    assert [on_page(question, 0)[0].image for question in make_questions(pictures[200:], "best", 0)] == left[100:]
    four = make_questions(read_pictures(make_folder(tmp_path / "four", ["p"] * 100, images=4)), "best", 0)
    shown = [[picture.image for picture in on_page(question, 0)] for question in four]
    assert all(sorted(row) == [0, 1, 2, 3] for row in shown)
    for place in range(4):
        assert all(abs([row[place] for row in shown].count(image) - 25) < 18 for image in range(4))


class Page(HTMLParser):
    """Tags, attributes and the caption's text, as Python's own HTML parser reads them."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.caption, self.inside = [], [], "", False
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.inside = ("class", "caption") in attrs

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.caption += data * self.inside


def test_hostile_captions_are_shown_and_do_nothing(tmp_path):
    folder = make_folder(tmp_path, HOSTILE)
    plain = make_folder(tmp_path / "plain", "a" * len(HOSTILE))
    with serving(plain) as client:
        tags = Page(client.get("1").decode()).tags
    with serving(folder) as client:
        for at, prompt in enumerate(HOSTILE, start=1):
            page = Page(client.get(str(at)).decode())
            assert page.caption == prompt and page.tags == tags
            assert not any(key.startswith("on") or key == "style" for _, key, _ in page.attributes)
            assert all(value.startswith("/") for _, key, value in page.attributes if key in ("src", "href"))
            client.answer(at, "pick", 0)
    assert [row["prompt"] for row in stored(folder)] == HOSTILE
    assert [row["caption"] for row in exported(folder)] == HOSTILE
    assert [entry["prompt"] for entry in lists(folder)] == HOSTILE


def test_the_policy_allows_only_this_page(tmp_path):
    with serving(make_folder(tmp_path, "a")) as client:
        page = client.get("1").decode()
        headers = client.headers
        client.get("picture/0")
        assert client.headers["Content-Security-Policy"] == headers["Content-Security-Policy"]
        assert client.headers["Content-Type"] == "image/png"
        token = client.server.token
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["img-src"] == policy["connect-src"] == "'self'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["form-action"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert "http" not in page and "url(" not in page and "@import" not in page and len(token) >= 32


def raw(server, method, path, headers, body=b""):
    """A request as it is spelled; returns (status, content)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_requests_need_the_token_and_name_no_paths(tmp_path):
    folder = make_folder(tmp_path / "pictures", "ab")
    (tmp_path / "secret.png").write_bytes(b"secret")
    answer = {"choice": "pick", "picked": [0], "seconds": 1}
    with serving(folder) as client:
        server, home = client.server, client.base
        assert server.server_address[0] == "127.0.0.1"
        path, host = f"/{server.token}/", f"127.0.0.1:{server.port}"
        good = [("Host", host)]
        sized = [*good, ("Content-Length", str(len(json.dumps(answer))))]
        body = json.dumps(answer).encode()

        # The token, for everything.
        for wrong in (
            "x" * len(server.token),
            "",
            server.token[:-1],
            server.token + "x",
            server.token.swapcase(),
        ):
            client.base = f"http://{host}/{wrong}/"
            assert client.refused("1")[0] == 403 and client.refused("picture/0")[0] == 403
            assert client.refused("1", answer)[0] == 403 and client.refused("stop", {})[0] == 403
        client.base = home
        # The name under which we were called.
        for name in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", f"127.0.0.1:{server.port + 1}", ""):
            assert raw(server, "GET", path + "1", [("Host", name)])[0] == 403
            assert raw(server, "POST", path + "1", [("Host", name), *sized[1:]], body)[0] == 403
        assert raw(server, "GET", path + "1", [])[0] == 403
        assert raw(server, "GET", path + "1", [*good, ("Host", "evil.example")])[0] == 403
        assert raw(server, "GET", path + "1", [("Host", f"localhost:{server.port}")])[0] == 200

        # Addresses that mean to be paths.
        for tail in (
            "../secret.png", "..%2fsecret.png", "picture/../../secret.png", "picture/%2e%2e/secret.png", "picture/-1",
            "picture//etc/passwd", "picture/0000-00.png", "samples.json", "choices.jsonl", "picture/4", "picture/",
            "picture/%D9%A3", "0", "4", "1/", "1?x=1", "undo", "stop", "1%00", "picture/0#x", "999999999999999999999",
        ):  # fmt: skip
            status, said = raw(server, "GET", path + tail, good)
            assert status == 404 and b"secret" not in said, tail
        for target in ("/", "/etc/passwd", "//evil.example/", f"http://{host}{path}1", "*"):
            assert raw(server, "GET", target, good)[0] in (403, 404), target
        assert raw(server, "PUT", path + "1", sized, body)[0] == raw(server, "DELETE", path + "1", good)[0] == 501

        # Bodies.
        assert raw(server, "POST", path + "1", good)[0] == 411
        assert raw(server, "POST", path + "1", [*good, ("Content-Length", "-1")])[0] == 411
        assert raw(server, "POST", path + "1", [*good, ("Content-Length", str(BODY_LIMIT + 1))])[0] == 413
        for bad in (b"{", b"\xff", b"[" * 9000, b"[]", b"1"):
            assert client.refused("1", bad)[0] == 400
        for change in (
            {"choice": "win"}, {"choice": None}, {"choice": ["pick"]}, {"picked": [2]}, {"picked": [-1]},
            {"picked": []}, {"picked": [0, 1]}, {"picked": [0, 0]}, {"picked": [True]}, {"picked": [0.0]},
            {"picked": "0"}, {"picked": None}, {"seconds": -1}, {"seconds": None},
            {"seconds": float("nan")}, {"seconds": 1e400},
            {"seconds": 10**400}, {"seconds": "1"}, {"choice": "tie"}, {"choice": "skip"},
        ):  # fmt: skip
            assert client.refused("1", answer | change)[0] == 400, change
        for nowhere in ("3", "0", "picture/0", "", "end"):
            assert client.refused(nowhere, answer)[0] == 404
        assert stored(folder) == [] and not server.stopped.is_set()
        assert raw(server, "POST", path + "1", sized, body)[0] == 200 and len(stored(folder)) == 1


def test_an_answer_that_cannot_be_stored_does_not_count(tmp_path, monkeypatch):
    def full(path, row):
        raise OSError(28, "No space left on device", str(path))

    folder = make_folder(tmp_path, "ab")
    with serving(folder) as client:
        client.answer(1, "pick", 0)
        monkeypatch.setattr(session, "append", full)
        code, said = client.refused("2", {"choice": "tie", "picked": [], "seconds": 1})
        assert code == 500 and "Not stored" in said and "No space left" in said
        assert client.refused("undo", {})[0] == 500
        monkeypatch.undo()
        client.get()
        assert client.address == client.base + "2"
        assert client.post("undo") == {"next": 1}
    assert [row["choice"] for row in stored(folder)] == ["winner", "undo"]


def test_a_short_write_is_an_error_and_the_next_row_starts_a_line(tmp_path, monkeypatch):
    path = tmp_path / "choices.jsonl"
    append(path, {"a": 1})
    real = open

    def short(*arguments, **options):
        file = real(*arguments, **options)

        class Short:
            def __enter__(self):
                return self

            def __exit__(self, *ignored):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                return file.write(data[:4])

        return Short()

    monkeypatch.setattr("builtins.open", short)
    with pytest.raises(OSError, match="only part of a row"):
        append(path, {"b": 2})
    monkeypatch.undo()
    append(path, {"c": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"b"\n{"c": 3}\n'


def test_choices_about_other_pictures_are_refused(tmp_path):
    folder = make_folder(tmp_path, "ab")
    with serving(folder) as client:
        client.answer(1, "pick", 0)
        Image.new("RGB", (16, 16), (9, 9, 9)).save(folder / "0000-01.png")
        assert client.refused("picture/1")[0] == 410 and client.get("picture/0")
    pictures = read_pictures(folder)
    with pytest.raises(DataError, match="line 1 is a choice between other pictures"):
        read(folder / "choices.jsonl", pictures)
    reworded = make_folder(folder, "xb")
    with pytest.raises(DataError, match="line 1 is a choice between other pictures"):
        read(reworded / "choices.jsonl", read_pictures(reworded))
    make_folder(folder, "ab", images=3)  # more pictures of the same prompts change nothing about the two
    assert len(read(folder / "choices.jsonl", read_pictures(folder))[0]) == 1
    assert len(exported(folder)) == 1


def edit(change):
    """A mistake in samples.json."""

    def make(folder):
        path = folder / "samples.json"
        about = json.loads(path.read_text())
        change(about["pictures"])
        path.write_text(json.dumps(about))

    return make


BAD = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no list": (lambda f: (f / "samples.json").unlink(), "holds no samples.json"),
    "no JSON": (lambda f: (f / "samples.json").write_text("{"), "is not what sample writes"),
    "no pictures": (lambda f: (f / "samples.json").write_text("[1]"), "is not what sample writes"),
    "odd pictures": (lambda f: (f / "samples.json").write_text('{"pictures": 1}'), "pictures is int, not a list"),
    "odd entry": (edit(lambda p: p.append(3)), "picture 4 is int"),
    "no number": (edit(lambda p: p[1].pop("prompt_number")), "prompt_number is NoneType, not int"),
    "no text": (edit(lambda p: p[1].update(prompt="\ud800")), "lone surrogate"),
    "two prompts": (edit(lambda p: p[1].update(prompt="x")), "prompt_number 0 has two prompts"),
    "twice": (edit(lambda p: p[1].update(file="0000-00.png")), "'0000-00.png' is listed twice"),
    "same image": (edit(lambda p: p[1].update(image=0)), "'0000-01.png' is listed twice"),
    "outside": (edit(lambda p: p[1].update(file="../x.png")), "'../x.png' leads outside"),
    "null byte": (edit(lambda p: p[1].update(file="a\0b.png")), "cannot be read"),
    "no picture": (edit(lambda p: p[1].update(file="samples.json")), "'samples.json' is none of .png"),
    "gone": (lambda f: (f / "0000-01.png").unlink(), "'0000-01.png' cannot be read (No such file"),
    "cut": (
        lambda f: (f / "0001-00.png").write_bytes((f / "0001-00.png").read_bytes()[:50]),
        "'0001-00.png' cannot be",
    ),
    "alone": (edit(lambda p: p.__delitem__(slice(1, 3))), "no prompt has two pictures"),
    "not writable": (lambda f: (f / "choices.jsonl").symlink_to(f / "nowhere" / "x"), "cannot be written (No such"),
    "no choice": (lambda f: (f / "choices.jsonl").write_text('{"choice": "win"}\n'), "line 1 is not a choice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(tmp_path, capsys, monkeypatch, name):
    spoil, said = BAD[name]
    monkeypatch.setattr(command, "serve", lambda *arguments: pytest.fail("it serves"))
    folder = make_folder(tmp_path / "pictures", "ab")
    (tmp_path / "x.png").write_bytes((folder / "0000-00.png").read_bytes())
    spoil(folder)
    assert cli.main(["data", "annotate", str(folder)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line and captured.out == ""


def test_a_taken_port_and_nothing_to_export(tmp_path, capsys):
    folder = make_folder(tmp_path, "a")
    with serving(folder) as client:
        assert cli.main(["data", "annotate", str(folder), "--port", str(client.server.port)]) == 1
        assert f"port {client.server.port} of 127.0.0.1 is not free" in capsys.readouterr().err
    assert cli.main(["data", "annotate", str(folder), "--export"]) == 1
    assert "holds no choice to export" in capsys.readouterr().err
    assert cli.main(["data", "annotate"]) == 2 and "which pictures" in capsys.readouterr().err


def test_the_command_serves_until_ctrl_c_and_exports(tmp_path, capsys, monkeypatch):
    """The command in this thread, the person in another, who ends it with the signal that Ctrl-C sends."""
    folder = make_folder(tmp_path, "abc")
    about = json.loads((folder / "samples.json").read_text())
    about["pictures"].pop()  # prompt c has one picture
    (folder / "samples.json").write_text(json.dumps(about))
    started, failed = queue.Queue(), []

    class Watched(Server):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.put(self)

    def person():
        try:
            client = Client(started.get(timeout=HANG))
            client.get()
            client.answer(1, "pick", 0)
            client.answer(2, "tie")
        except BaseException as error:
            failed.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "Server", Watched)
    thread = threading.Thread(target=person)
    thread.start()
    assert cli.main(["data", "annotate", str(folder), "--mode", "pairs"]) == 0
    thread.join()
    assert not failed
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 prompts have one picture and are left out" and lines[2].startswith("open http://127.0.0.1:")
    assert lines[-1] == (
        f"choices 1, ties 1, skips 0 in {folder / 'choices.jsonl'}; pairs 2, of them ties 1, in "
        f"{folder / 'pairs.parquet'}; lists 2 in {folder / 'rankings.jsonl'}"
    )
    assert read_pairs(folder / "pairs.parquet")[1].used == 1


STAGE = """
const sent = [], listeners = {}, gone = [];
const tile = () => ({on: {}, classList: {toggle() {}}, won: {}, querySelector() { return this.won; },
  addEventListener(kind, act) { this.on[kind] = act; }});
const shelf = Array.from({length: Number(process.argv[2])}, tile), button = tile(), words = {};
let now = 0, reply = {ok: true, json: async () => ({next: 8})};
globalThis.performance = {now: () => now};
globalThis.document = {body: {dataset: {base: "/T/", at: "3", questions: "9", mode: process.argv[3], ahead: "5 6"}},
  images: [], querySelectorAll: () => shelf, getElementById: id => id === "stop" ? button : words,
  addEventListener: (kind, act) => listeners[kind] = act};
globalThis.window = {addEventListener: (kind, act) => listeners[kind] = act};
globalThis.location = {assign: where => gone.push(where), reload() {}};
globalThis.Image = class { set src(where) { gone.push("ahead " + where); } };
globalThis.fetch = async (where, {body}) => { sent.push([where, JSON.parse(body)]); return reply; };
const press = async (key, more = {}) => {
  listeners.keydown({key, code: "", preventDefault() {}, ...more});
  await new Promise(resolve => setTimeout(resolve, 1));
};
"""


def in_node(page, tiles, mode, steps):
    """The page's script on a stage of three objects; returns (what it sent, where it went, its message, its marks)."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    end = "console.log(JSON.stringify([sent, gone, words.textContent || '', shelf.map(t => t.won.textContent || '')]));"
    program = f"{STAGE}{script}\n(async () => {{ {steps}; {end} }})();"
    run = subprocess.run(["node", "-", str(tiles), mode], input=program, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script is tried where node is installed")
def test_the_keys(tmp_path):
    with serving(make_folder(tmp_path, "a")) as client:
        page = client.get("1").decode()
    load = "listeners.load(); now = 2500"
    early = in_node(page, 2, "best", "await press('1'); await press('t')")
    assert early[0] == []  # before the pictures are there, nothing is chosen
    sent = in_node(page, 3, "rank", f"await press('1'); {load}; await press('2'); await press('3')")[0]
    assert sent[0][1]["picked"] == [1, 2]
    sent, gone, _, _ = in_node(page, 2, "best", f"{load}; await press('2'); await press('1')")
    assert sent == [["/T/3", {"choice": "pick", "picked": [1], "seconds": 2.5}]]  # once, whatever is pressed after
    assert gone == ["ahead /T/picture/5", "ahead /T/picture/6", "/T/8"]
    sent = in_node(page, 2, "best", f"{load}; await press('3'); await press('1', {{repeat: true}}); await press('T')")[
        0
    ]
    assert sent == [["/T/3", {"choice": "tie", "picked": [], "seconds": 2.5}]]
    assert in_node(page, 2, "best", f"{load}; await press('&', {{code: 'Digit1'}})")[0][0][1]["picked"] == [0]
    assert in_node(page, 2, "best", f"{load}; await press('1', {{ctrlKey: true}})")[0] == []
    sent = in_node(page, 2, "best", f"{load}; await press('s'); await press('t'); await press('u')")[0]
    assert [body["choice"] for _, body in sent] == ["skip"]
    for key in ("u", "Backspace"):
        assert in_node(page, 2, "best", f"{load}; await press('{key}')")[0] == [["/T/undo", {}]]
    moves = f"{load}; await press('ArrowLeft'); await press('ArrowRight')"
    assert in_node(page, 2, "best", moves)[1][-2:] == ["/T/2", "/T/4"]
    assert in_node(page, 2, "best", f"{load}; shelf[1].on.click()")[0][0][1]["picked"] == [1]
    assert in_node(page, 2, "best", f"{load}; button.on.click()")[0] == [["/T/stop", {}]]
    # A ranking is sent when one picture is left; u takes back the last key, t ties the rest.
    sent = in_node(page, 4, "rank", f"{load}; await press('3'); await press('1'); await press('u'); await press('4');"
                                    "await press('3'); await press('2')")[0]  # fmt: skip
    assert [body["picked"] for _, body in sent] == [[2, 3, 1]]
    assert in_node(page, 4, "rank", f"{load}; await press('3'); await press('1')")[3] == [2, "", 1, ""]
    assert in_node(page, 4, "rank", f"{load}; await press('2'); await press('t')")[0][0][1]["picked"] == [1]
    assert in_node(page, 4, "rank", f"{load}; await press('t')")[0][0][1]["choice"] == "tie"
    # The page says what could not be stored, and takes another press.
    failing = "reply = {ok: false, json: async () => ({message: 'Not stored: full.'})}"
    sent, gone, message, won = in_node(page, 2, "best", f"{load}; {failing}; await press('1'); await press('2')")
    assert message == "Not stored: full." and [body["picked"] for _, body in sent] == [[0], [1]] and won == ["", ""]
    dead = "globalThis.fetch = async () => { throw new Error('gone'); }"
    assert "does not answer" in in_node(page, 2, "best", f"{load}; {dead}; await press('1')")[2]
