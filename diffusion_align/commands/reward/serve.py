"""`reward serve`: one reward behind HTTP, so that its environment or its machine need not be that of the training.

The protocol is in `rewards/remote.py`. What it guards against: requests without end (limits on body, count, sides, time
and connections), pictures that are none (strict decoding), strangers (a token, compared in constant time, and required
off this machine) and pages of other sites, which cannot send JSON here unasked.
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

from diffusion_align.commands.reward.request import Refused, read_request
from diffusion_align.options import UsageError
from diffusion_align.options.reward import RewardServe
from diffusion_align.rewards import Reward, load_reward, one_each
from diffusion_align.rewards.remote import LOOPBACK, PROTOCOL, TOKEN_VARIABLE
from diffusion_align.rewards.weight_files import place_of

CONNECTIONS = 16  # at a time; each may hold a body of the full size


def reward_serve(options: RewardServe) -> int:
    """Load a reward and serve it until Ctrl-C; see `RewardServe`."""
    o = options
    token = os.environ.get(TOKEN_VARIABLE, "")
    if o.host not in LOOPBACK and not token:
        raise UsageError(f"server.host {o.host} can be reached by others: set a token in {TOKEN_VARIABLE}")
    try:
        server = Server(o, token)  # before the weights are loaded: a port in use is told at once
    except OSError as error:
        raise OSError(f"cannot listen on {o.host}:{o.port}: {error.strerror}; choose another --port") from error
    with server:
        server.reward = load_reward(o.reward_spec, device=place_of(o.device), seed=o.seed)
        print(f"{o.reward} at {server.address}{' (with a token)' if token else ''}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0


class Server(ThreadingHTTPServer):
    """Serves `reward`, one request at a time on the device, to whoever has `token` (everybody where it is "")."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would share the port with whoever has it

    def __init__(self, options: RewardServe, token: str = "", reward: Reward | None = None):
        self.options, self.token, self.reward = options, token, reward
        self.turn = threading.Lock()  # a device has room for one batch
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((options.host, options.port), Handler)
        self.address = f"http://{options.host}:{self.socket.getsockname()[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is nobody's error; anything else is ours, and shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte
    unread: int | None = None  # bytes of the body; None before anything of it is read
    server_version, sys_version = "diffusion-align", ""
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: prompts and addresses are nobody's log."""

    def do_GET(self) -> None:
        self._answer(self._about)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _answer(self, make: Any) -> None:
        if not self.server.free.acquire(blocking=False):
            return self._reply(503, {"error": f"more than {CONNECTIONS} requests at a time"})
        try:
            self._require_token()
            status, said = 200, make()
        except Refused as refused:
            status, said = refused.status, {"error": str(refused)}
            self._drain()
        except Exception as error:  # the reward's own: the client is told in one line, the server goes on
            status, said = 500, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            self.server.free.release()
        self._reply(status, said)

    def _require_token(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.token and not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(401, f"the token is missing or wrong; it is read from {TOKEN_VARIABLE}")

    def _about(self) -> dict[str, Any]:
        if self.path != "/":
            raise Refused(404, "there is GET / and POST /score")
        return {"name": self.server.options.reward, "protocol": PROTOCOL, "version": version("diffusion_align")}

    def _score(self) -> dict[str, Any]:
        if self.path != "/score":
            raise Refused(404, "there is GET / and POST /score")
        # A form of another site's page can POST here, but not with this type.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the body is application/json")
        prompts, pictures = read_request(self._body(), self.server.options)
        assert self.server.reward is not None  # set before the first request is taken
        with self.server.turn:
            values = score_by_size(self.server.options.reward or "", self.server.reward, pictures, prompts)
        return {"scores": [value if math.isfinite(value) else None for value in values]}

    def _body(self) -> bytes:
        length, limit = self.headers.get("Content-Length", ""), self.server.options.max_megabytes * 1_000_000
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refused(411, "a length is required")
        if int(length) > limit:
            raise Refused(413, f"more than {limit} bytes (server.max_megabytes)")
        self.unread = 0
        return self.rfile.read(int(length))

    def _drain(self) -> None:
        """Throw away what a refused client still sends, within limits: it reads the answer only when it has sent."""
        length, limit = self.headers.get("Content-Length", ""), 4_000_000 * self.server.options.max_megabytes
        left = self.unread if self.unread is not None else min(int(length) if length.isdecimal() else 0, limit)
        while left > 0 and (some := self.rfile.read(min(left, 65_536))):
            left -= len(some)

    def _reply(self, status: int, said: dict[str, Any]) -> None:
        content = json.dumps(said, allow_nan=False).encode()
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
    """One score a picture; those of one size are scored together."""
    values = [math.nan] * len(pictures)
    for shape in dict.fromkeys(picture.shape for picture in pictures):
        rows = [row for row, picture in enumerate(pictures) if picture.shape == shape]
        some = torch.stack([pictures[row] for row in rows]).float() / 255
        said = one_each(reward(some, [prompts[row] for row in rows]), len(rows), f"reward {name}")
        for row, value in zip(rows, said.tolist(), strict=True):
            values[row] = value
    return values
