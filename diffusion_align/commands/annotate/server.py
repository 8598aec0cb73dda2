"""Serves the page on which a person chooses, to this machine only, and only with the token in its address.

It listens on 127.0.0.1 only. The token protects against other users of this machine and pages of other sites. The check
of the Host header protects against foreign host names that resolve to 127.0.0.1. The Content-Security-Policy prevents
that captions run as scripts. Limits on size and time stop endless requests. Addresses hold no file paths; pictures have
numbers.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from diffusion_align.commands.annotate.asking import Session
from diffusion_align.commands.annotate.page import POLICY, last_page, question_page
from diffusion_align.commands.annotate.questions import Picture, picture_bytes

BODY_LIMIT = 16_384  # bytes
MAX_SECONDS = 1e6
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ADDRESS = re.compile(r"/([\w-]{1,100})/(?:|(\d{1,9})|picture/(\d{1,9})|undo|stop)", re.ASCII)


class _Refused(Exception):
    """Raised to refuse a request, with the HTTP status and the reason in one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Server(ThreadingTCPServer):
    """Serves one session at `address`; the page's button sets `stopped`."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere two servers would share one port

    def __init__(self, session: Session, pictures: list[Picture], port: int = 0):
        self.session, self.pictures = session, pictures
        self.stopped = threading.Event()
        self.token = secrets.token_urlsafe(24)
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.socket.getsockname()[1]
        self.hosts = {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}
        self.address = f"http://127.0.0.1:{self.port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show errors, except those of a browser that hung up."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte
    server_version, sys_version = "diffusion-align", ""
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal belongs to the command."""

    def do_GET(self) -> None:
        try:
            self._get(self._rest())
        except _Refused as refused:
            self._reply(refused.status, "text/plain; charset=utf-8", f"{refused}\n".encode())

    def do_POST(self) -> None:
        try:
            status, reply = 200, self._post(self._rest(), self._body())
        except _Refused as refused:
            status, reply = refused.status, {"message": f"Not stored: {refused}."}
        self._reply(status, "application/json", json.dumps(reply).encode())
        if reply.get("stopped"):  # after the reply, so that the process does not end before it is sent
            self.server.stopped.set()

    def _rest(self) -> re.Match[str]:
        """The parsed address. Raises _Refused for another host, a wrong token or an unknown address."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise _Refused(403, "this page is served to 127.0.0.1 only")
        token = self.path.removeprefix("/").partition("/")[0]
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(403, "this is another session's address; open the one that the command printed")
        match = _ADDRESS.fullmatch(self.path)
        if match is None:
            raise _Refused(404, "no such page")
        return match

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length):
            raise _Refused(411, "a length is required")
        if int(length) > BODY_LIMIT:
            raise _Refused(413, f"more than {BODY_LIMIT} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(400, "not JSON") from None
        if not isinstance(body, dict):
            raise _Refused(400, "not an object")
        return body

    def _get(self, match: re.Match[str]) -> None:
        session, base = self.server.session, f"/{self.server.token}/"
        _, at, picture = match.groups()
        if picture is not None:
            return self._picture(int(picture))
        if at is None:
            if not match.string.endswith("/"):
                raise _Refused(404, "no such page")
            return self._reply(303, "text/plain", b"", {"Location": f"{base}{session.next_open() + 1}"})
        count = len(session.questions)
        place = self._place(at, count + 1)
        if place == count:
            page = last_page(base, count, session.decided())
        else:
            question, follow = session.questions[place], session.next_open(place)
            ahead = session.shown(follow) if follow < count else []
            page = question_page(
                base, place + 1, count, session.decided(), question.mode, session.shown(place),
                session.answer_to(place), ahead,
            )  # fmt: skip
        self._reply(200, "text/html; charset=utf-8", page.encode())

    def _place(self, number: str, count: int) -> int:
        if not 1 <= int(number) <= count:
            raise _Refused(404, "no such question")
        return int(number) - 1

    def _picture(self, number: int) -> None:
        if number >= len(self.server.pictures):
            raise _Refused(404, "no such picture")
        picture = self.server.pictures[number]
        try:
            data = picture_bytes(picture)
        except (OSError, ValueError) as error:
            raise _Refused(410, str(error)) from error
        self._reply(200, picture.media_type, data, {"Cache-Control": "private, max-age=3600"})

    def _post(self, match: re.Match[str], body: dict[str, Any]) -> dict[str, Any]:
        session, where = self.server.session, match.string.rpartition("/")[2]
        try:
            if where == "stop":
                return {"stopped": True, "message": "Stored. The command ends; this page can be closed."}
            if where == "undo":
                at = session.undo()
                return {"next": at + 1} if at is not None else {"message": "There is nothing to undo."}
            if match[2] is None:
                raise _Refused(404, "no such page")
            at = self._place(match[2], len(session.questions))
            return {"next": session.answer(at, *_answer(body)) + 1}
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        except OSError as error:
            raise _Refused(500, str(error)) from error

    def _reply(self, status: int, kind: str, content: bytes, headers: Mapping[str, str] = HEADERS) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _answer(body: dict[str, Any]) -> tuple[str, list[int], float]:
    choice, picked, seconds = (body.get(name) for name in ("choice", "picked", "seconds"))
    if not (isinstance(choice, str) and isinstance(picked, list) and isinstance(seconds, int | float)):
        raise ValueError("an answer needs choice, picked and seconds")
    if not all(type(place) is int for place in picked):
        raise ValueError("picked must be a list of picture numbers, counted from 0")
    if not 0 <= seconds <= MAX_SECONDS:  # nan, too
        raise ValueError(f"seconds must lie in 0 to {MAX_SECONDS:g}")
    return choice, picked, float(seconds)
