"""A reward over HTTP: our server and faulty servers, with short timeouts, on the loopback network."""

import base64
import io
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers_machine import HANG
from helpers_rewards import pictures
from PIL import Image

from diffusion_align.commands.reward import serve as reward_server
from diffusion_align.commands.reward.serve import Server, reward_serve
from diffusion_align.options import UsageError
from diffusion_align.options.reward import RewardServe
from diffusion_align.rewards import RewardError, http_reward, load_reward, to_uint8
from diffusion_align.rewards.remote import TOKEN_VARIABLE


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(reward, token="", **options):
    return running(Server(RewardServe(reward="mine", port=0, **options), token, reward))


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])


def post(address, body, **headers):
    """Status and answer of a request."""
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    request = urllib.request.Request(f"{address}/score", body, headers, method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=HANG) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def png(size=(8, 8), mode="RGB", form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def body(images, prompts):
    return json.dumps({"prompts": prompts, "images": images}).encode()


def test_a_remote_reward_gives_the_numbers_of_a_local_one():
    images, prompts = pictures(7, (24, 40)) * 1.2, ["", "a", "ünïcode 😀", "d", "e", "f", "g"]
    levels = to_uint8(images).float() / 255
    with serving(brightness) as server:
        reward = http_reward(server.address, chunk=3, retries=0)
        torch.testing.assert_close(reward(images, prompts), brightness(levels, prompts))
        assert reward(images[:0], []).shape == (0,)
        both = load_reward(f"2:{server.address},jpeg-large")(images, prompts)
    torch.testing.assert_close(both, 2 * brightness(levels, prompts) + load_reward("jpeg-large")(images, prompts))


def test_get_returns_name_and_protocol():
    with serving(brightness) as server:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{server.address}/", timeout=HANG
        ) as reply:
            said = json.loads(reply.read())
    assert said["name"] == "mine" and said["protocol"] == 1 and said["version"]


def test_missing_score_is_null_in_json_and_nan_in_the_client():
    def half(images, prompts):
        return torch.tensor([1.0, math.nan, math.inf])

    with serving(half) as server:
        status, said = post(server.address, body([png()] * 3, ["a"] * 3))
        scores = http_reward(server.address, retries=0)(pictures(3), ["a"] * 3)
    assert status == 200 and said == {"scores": [1.0, None, None]}
    assert scores[0] == 1 and scores[1:].isnan().all()


def test_pictures_of_several_sizes_in_one_request():
    shapes = []

    def spy(images, prompts):
        shapes.append(tuple(images.shape))
        return torch.tensor([float(prompt) for prompt in prompts])

    with serving(spy) as server:
        sizes = [(8, 8), (16, 8), (8, 8)]
        assert post(server.address, body([png(size) for size in sizes], ["1", "2", "3"]))[1] == {"scores": [1, 2, 3]}
    assert shapes == [(2, 3, 8, 8), (1, 3, 8, 16)]


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "prompts"),
        (b'{"prompts": ["a"], "images": []}', 400, "prompts"),
        (b'{"prompts": "a", "images": "b"}', 400, "prompts"),
        (body([png()], [3]), 400, "a prompt is a text"),
        (body([png()], ["x" * 10_001]), 400, "at most 10000"),
        (body([7], ["a"]), 400, "picture 0 is not a text"),
        (body(["%%"], ["a"]), 400, "picture 0 is not base64"),
        (body([base64.b64encode(b"cos\nsystem\n(S'x'\ntR.").decode()], ["a"]), 400, "not a PNG"),
        (body([png(form="JPEG")], ["a"]), 400, "not a PNG"),
        (body([png((8, 65))], ["a"]), 413, "more than 64 pixels"),
        (body([png((4, 8))], ["a"]), 400, "too small"),
        (body([base64.b64encode(base64.b64decode(png())[:44]).decode()], ["a"]), 400, "cannot be decoded"),
        (body([png()] * 3, ["a"] * 3), 413, "3 pictures; at most 2"),
        (body(["A" * 2_000_000], ["a"]), 413, "more than 1000000 bytes"),
    ],
)
def test_bad_requests_get_one_sentence_and_the_server_goes_on(sent, status, message):
    with serving(brightness, max_pictures=2, max_side=64, max_megabytes=1) as server:
        found, said = post(server.address, sent)
        assert (found, list(said)) == (status, ["error"]) and message in said["error"]
        assert post(server.address, body([png()], ["a"])) == (200, {"scores": [1.0]})


def test_too_large_request_gets_an_answer():
    """The body exceeds any socket's buffer: if the server closed the connection, the client would get a broken pipe."""
    with serving(brightness, max_megabytes=8) as server:
        assert post(server.address, b"A" * 30_000_000) == (
            413,
            {"error": "more than 8000000 bytes (server.max_megabytes)"},
        )


def test_other_paths_types_and_methods_are_refused():
    with serving(brightness) as server:
        assert post(server.address, body([png()], ["a"]), Content_Type="text/plain")[0] == 415
        assert post(f"{server.address}/x", body([png()], ["a"]))[0] == 404
        with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=HANG) as line:
            line.sendall(b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\n\r\n")
            assert b" 411 " in line.recv(1000)


def test_error_of_the_reward_is_one_line_and_retries_end():
    def broken(images, prompts):
        raise RuntimeError("out of\nmemory")

    with serving(broken) as server:
        assert post(server.address, body([png()], ["a"])) == (500, {"error": "RuntimeError: out of memory"})
        with pytest.raises(RewardError, match=r"\(2 tries\): 500: RuntimeError: out of memory"):
            http_reward(server.address, retries=1, pause=0.01)(pictures(1), ["a"])
    with serving(lambda images, prompts: torch.zeros(1)) as server:
        assert "returned [1] for 2 pictures" in post(server.address, body([png()] * 2, ["a"] * 2))[1]["error"]


def test_a_token_is_required_where_one_is_set(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with serving(brightness, token="sésame") as server:
        for wrong in (None, "", "sesame", "sésam"):
            with pytest.raises(RewardError, match="401: the token is missing or wrong") as caught:
                http_reward(server.address, token=wrong, retries=3, pause=5)(pictures(1), ["a"])
            assert "sésame" not in str(caught.value) and "tries" not in str(caught.value)
    with serving(brightness, token="open") as server:
        assert http_reward(server.address, token="open")(pictures(1), ["a"]).isfinite().all()
        monkeypatch.setenv(TOKEN_VARIABLE, "open")
        assert http_reward(server.address)(pictures(1), ["a"]).isfinite().all()


@contextmanager
def saying(*replies):
    """A server that sends these replies, (status, bytes), and repeats the last one; None is silence until the end."""
    asked, over = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            reply = replies[min(len(asked), len(replies) - 1)]
            asked.append(self.path)
            if reply is None:
                over.wait(HANG)
            status, content = reply or (200, b'{"scores": [1]}')
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # the client closed the connection

        do_GET = do_POST

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            over.set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "the answer is not"),
        (b"", "the answer is not"),
        (b"\xff\xfe", "the answer is not"),
        (b"[1, 2]", "the answer is not"),
        (b'{"score": [1, 2]}', "the answer is not"),
        (b'{"scores": [1]}', "1 scores for 2 pictures"),
        (b'{"scores": [1, 2, 3]}', "3 scores for 2 pictures"),
        (b'{"scores": "12"}', "str scores for 2 pictures"),
        (b'{"scores": [1, NaN]}', "NaN is no number in JSON"),
        (b'{"scores": [1, Infinity]}', "Infinity is no number in JSON"),
        (b'{"scores": [1, 1e39]}', "not a number"),
        (b'{"scores": [1, 1e999]}', "not a number"),
        (b'{"scores": [1, "2"]}', "a score is '2', not a number"),
        (b'{"scores": [1, true]}', "a score is 'True', not a number"),
        (b'{"scores": [1, [2]]}', "not a number"),
        (b'{"scores": [' + b"1" * 5_000_000, "an answer of more than 4000000 bytes"),
    ],
)
def test_malformed_answers_are_not_retried(content, message):
    with saying((200, content)) as (url, asked):
        with pytest.raises(RewardError, match=message) as caught:
            http_reward(url, retries=3, pause=5)(pictures(2), ["a", "b"])
    assert len(asked) == 1 and url in str(caught.value) and len(str(caught.value)) < 300
    assert len(str(caught.value).splitlines()) == 1


def test_temporary_errors_are_retried_with_growing_pauses(monkeypatch):
    good, pauses = (200, b'{"scores": [1.5]}'), []
    with monkeypatch.context() as patched, saying((500, b"{}"), (503, b'{"error": "busy"}'), good) as (url, asked):
        patched.setattr(time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
        assert http_reward(url, retries=2, pause=0.1)(pictures(1), ["a"]).tolist() == [1.5]
    assert len(asked) == 3 and pauses == [0.1, 0.2]
    with saying((500, b'{"error": "no memory"}'), (500, b'{"error": "no memory"}'), good) as (url, asked):
        with pytest.raises(RewardError, match=r"\(2 tries\): 500: no memory"):
            http_reward(url, retries=1, pause=0.01)(pictures(1), ["a"])
    with saying((400, b'{"error": "no"}'), good) as (url, asked):
        with pytest.raises(RewardError, match="400: no"):
            http_reward(url, retries=3, pause=5)(pictures(1), ["a"])
    assert len(asked) == 1


def test_timeout_and_refused_connection_raise():
    with saying(None) as (url, _), pytest.raises(RewardError, match=r"\(2 tries\): .*timed out"):
        http_reward(url, timeout=0.2, retries=1, pause=0.01)(pictures(1), ["a"])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(RewardError, match="ConnectionRefusedError"):
            http_reward(f"http://127.0.0.1:{closed.getsockname()[1]}", retries=0)(pictures(1), ["a"])


def test_timeout_is_retried(monkeypatch):
    """The first request raises a timeout at once; the second has enough time."""
    real, given = urllib.request.OpenerDirector.open, []

    def silent_once(opener, request, data=None, timeout=None):
        given.append(timeout)
        if len(given) == 1:
            raise TimeoutError("timed out")
        return real(opener, request, data, timeout)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", silent_once)
    with saying((200, b'{"scores": [3]}')) as (url, asked):
        assert http_reward(url, timeout=HANG, retries=1, pause=0.01)(pictures(1), ["a"]).tolist() == [3]
    assert given == [HANG, HANG] and len(asked) == 1


def test_a_redirect_is_not_followed():
    with saying((302, b""), (200, b'{"scores": [1]}')) as (url, asked):
        with pytest.raises(RewardError, match="302"):
            http_reward(url, retries=3, pause=5)(pictures(1), ["a"])
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["http://", "ftp://a", "http://u:secret@a", "http://a/?token=secret", "a:8000"])
def test_invalid_addresses_are_refused(url):
    with pytest.raises(ValueError) as caught:
        http_reward(url)
    assert "secret" not in str(caught.value)


def test_serve_requires_a_token_and_reports_a_port_in_use(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=f"can be reached by others: set a token in {TOKEN_VARIABLE}"):
        reward_serve(RewardServe(reward="jpeg-small", host="0.0.0.0", port=0))
    monkeypatch.setattr(reward_server, "load_reward", lambda *args, **kw: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot listen on 127.0.0.1:.*choose another --port"):
            reward_serve(RewardServe(reward="jpeg-small", port=taken.getsockname()[1]))


def test_number_of_concurrent_requests_is_limited(monkeypatch):
    monkeypatch.setattr(reward_server, "CONNECTIONS", 1)
    inside, leave = threading.Event(), threading.Event()

    def slow(images, prompts):
        inside.set()
        leave.wait(HANG)
        return torch.zeros(1)

    with serving(slow) as server:
        first = threading.Thread(target=post, args=(server.address, body([png()], ["a"])))
        first.start()
        assert inside.wait(HANG)
        assert post(server.address, body([png()], ["a"]))[0] == 503
        leave.set()
        first.join()
        assert post(server.address, body([png()], ["a"]))[0] == 200
