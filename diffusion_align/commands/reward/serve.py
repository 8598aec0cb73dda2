"""`reward serve`: one reward over HTTP, for a training in another environment or on another machine.

`rewards/remote.py` describes the protocol. The server limits the size of bodies, the number and sides of pictures, time
and connections; decodes pictures strictly; compares the token in constant time, and requires one unless it listens on
this machine only. Web pages of other sites cannot send it JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from diffusion_align.commands.reward.request import BadRequest, read_request
from diffusion_align.options import UsageError
from diffusion_align.options.reward import RewardServe
from diffusion_align.rewards import Reward, load_reward, one_each
from diffusion_align.rewards.remote import LOOPBACK, PROTOCOL, TOKEN_VARIABLE

CONNECTIONS = 16  # at a time; each may have a body of the maximum size


def reward_serve(options: RewardServe) -> int:
    """Load a reward and serve it until Ctrl-C; see `RewardServe`."""
    o = options
    token = os.environ.get(TOKEN_VARIABLE, "")
    if o.host not in LOOPBACK and not token:
        raise UsageError(f"server.host {o.host} can be reached by others: set a token in {TOKEN_VARIABLE}")
    try:
        server = Server(o, token)  # first, so that a port in use is reported before weights load
    except OSError as error:
        raise OSError(f"cannot listen on {o.host}:{o.port}: {error.strerror}; choose another --port") from error
    with server:
        server.reward = load_reward(o.reward_spec, device=o.device, seed=o.seed)
        print(f"{o.reward} at {server.address}{' (with a token)' if token else ''}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0


class Server(ThreadingHTTPServer):
    """Serves `reward` to clients with `token` (to all if it is ""); scores one request at a time."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows it would share a port that is in use

    def __init__(self, options: RewardServe, token: str = "", reward: Reward | None = None):
        self.options, self.token, self.reward = options, token, reward
        self.turn = threading.Lock()  # the device's memory holds one batch
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((options.host, options.port), Handler)
        self.address = f"http://{options.host}:{self.socket.getsockname()[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show errors, except for a client that closed its connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte
    unread: int | None = None  # bytes of the body; None before reading begins
    server_version, sys_version = "diffusion-align", ""
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: prompts and addresses are private."""

    def do_GET(self) -> None:
        self._answer(self._about)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _answer(self, make: Any) -> None:
        if not self.server.free.acquire(blocking=False):
            return self._reply(503, {"error": f"more than {CONNECTIONS} requests at a time"})
        try:
            self._require_token()
            status, answer = 200, make()
        except BadRequest as refused:
            status, answer = refused.status, {"error": str(refused)}
            self._drain()
        except Exception as error:  # of the reward: the client gets one line, the server goes on
            status, answer = 500, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            self.server.free.release()
        self._reply(status, answer)

    def _require_token(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.token and not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise BadRequest(401, f"the token is missing or wrong; it is read from {TOKEN_VARIABLE}")

    def _about(self) -> dict[str, Any]:
        if self.path != "/":
            raise BadRequest(404, "there is GET / and POST /score")
        return {"name": self.server.options.reward, "protocol": PROTOCOL, "version": version("diffusion_align")}

    def _score(self) -> dict[str, Any]:
        if self.path != "/score":
            raise BadRequest(404, "there is GET / and POST /score")
        # A form in a web page can send a POST here, but not with this type.
        if self.headers.get_content_type() != "application/json":
            raise BadRequest(415, "the body is application/json")
        prompts, pictures = read_request(self._body(), self.server.options)
        assert self.server.reward is not None  # set before the first request is taken
        with self.server.turn:
            values = score_by_size(self.server.options.reward or "", self.server.reward, pictures, prompts)
        return {"scores": [value if math.isfinite(value) else None for value in values]}

    def _body(self) -> bytes:
        length, limit = self.headers.get("Content-Length", ""), self.server.options.max_megabytes * 1_000_000
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise BadRequest(411, "a length is required")
        if int(length) > limit:
            raise BadRequest(413, f"more than {limit} bytes (server.max_megabytes)")
        self.unread = 0
        return self.rfile.read(int(length))

    def _drain(self) -> None:
        """Read and drop the rest of a refused request, up to a limit: a client reads the answer only after sending."""
        length, limit = self.headers.get("Content-Length", ""), 4_000_000 * self.server.options.max_megabytes
        left = self.unread if self.unread is not None else min(int(length) if length.isdecimal() else 0, limit)
        while left > 0 and (some := self.rfile.read(min(left, 65_536))):
            left -= len(some)

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def score_by_size(name: str, reward: Reward, pictures: list[Tensor], prompts: list[str]) -> list[float]:
    """One score for each picture; pictures of one size are scored together."""
    values = [math.nan] * len(pictures)
    for shape in dict.fromkeys(picture.shape for picture in pictures):
        rows = [row for row, picture in enumerate(pictures) if picture.shape == shape]
        some = torch.stack([pictures[row] for row in rows]).float() / 255
        scores = one_each(reward(some, [prompts[row] for row in rows]), len(rows), f"reward {name}")
        for row, value in zip(rows, scores.tolist(), strict=True):
            values[row] = value
    return values
