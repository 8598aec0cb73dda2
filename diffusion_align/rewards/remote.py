"""A reward over HTTP, from another environment or machine. Requests and answers are JSON; nothing is unpickled.

    GET  /        -> {"name": "pickscore", "protocol": 1, "version": "0.1.0"}
    POST /score   {"prompts": [B texts], "images": [B PNGs in base64]} -> {"scores": [B numbers, or null for no score]}

Errors are {"error": "one sentence"} with a status. If the server wants a token, it goes in the header
`Authorization: Bearer TOKEN`. The server is `diffusion-align reward serve`, or any other with this protocol.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from .interface import Reward, RewardError, of_levels, to_pil

PROTOCOL = 1
TOKEN_VARIABLE = "DIFFUSION_ALIGN_REWARD_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REPLY_LIMIT = 4_000_000  # bytes; a score takes about 20
RETRIED = (429, 500, 502, 503, 504)  # statuses of errors that may pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would turn the POST into a GET and send the token to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def http_reward(
    url: str,
    *,
    timeout: float = 60.0,
    retries: int = 3,
    pause: float = 0.5,
    chunk: int = 16,
    token: str | None = None,
) -> Reward:
    """The reward served at `url`; one request has `chunk` pictures.

    Pictures are sent as 8-bit PNG, so a remote reward gives the numbers of a local one. After a failed connection,
    `timeout` seconds of silence or a status in RETRIED, the request is sent up to `retries` times more, after `pause`,
    2 `pause`, 4 `pause`, ... seconds. After any other error, or a malformed answer, it is not sent again.

    Args:
        token: the bearer token; by default the variable DIFFUSION_ALIGN_REWARD_TOKEN, if it is set.

    Raises:
        ValueError: not an http address.
        RewardError: when it scores: the request failed, or the answer is malformed; in one line.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a reward: http://HOST:PORT or https://...")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"reward at {parts.hostname}: no user, query or fragment; a token goes in {TOKEN_VARIABLE}")
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    # A proxy that the environment names is not used for an address of this machine.
    proxies = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
    opener = urllib.request.build_opener(_NoRedirect, *proxies)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    address = f"{url.rstrip('/')}/score"

    def send(body: bytes) -> bytes:
        request = urllib.request.Request(address, body, headers, method="POST")
        try:
            with opener.open(request, timeout=timeout) as reply:
                return reply.read(REPLY_LIMIT + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise _Failed(f"{error.code}: {_error_message(error)}", error.code in RETRIED) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", error)
            raise _Failed(f"{type(reason).__name__}: {reason}", True) from None

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        values: list[float] = []
        for i in range(0, len(prompts), chunk):
            some = prompts[i : i + chunk]
            reply = _with_retries(partial(send, request_body(levels[i : i + chunk], some)), url, retries, pause)
            values += read_reply(reply, len(some), url)
        return torch.tensor(values)

    return of_levels(score)


def request_body(levels: Tensor, prompts: list[str]) -> bytes:
    """The body of POST /score for 8-bit levels [B,3,H,W]."""
    return json.dumps({"prompts": prompts, "images": [_png(picture) for picture in to_pil(levels)]}).encode()


def read_reply(body: bytes, count: int, url: str) -> list[float]:
    """The scores of a reply; null becomes NaN, a picture without a score.

    Raises:
        RewardError: not JSON, or not `count` numbers. NaN and Infinity are not JSON.
    """
    if len(body) > REPLY_LIMIT:
        raise RewardError(f"reward at {url}: an answer of more than {REPLY_LIMIT} bytes")
    try:
        scores = json.loads(body, parse_constant=_reject_constant)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RewardError(f'reward at {url}: the answer is not {{"scores": [...]}} ({error}): {body[:60]!r}') from error
    if not isinstance(scores, list) or len(scores) != count:
        found = len(scores) if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"reward at {url}: {found} scores for {count} pictures")
    values = [math.nan if score is None else score for score in scores]
    for value in values:
        # A number beyond float32 would become infinity.
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > torch.finfo(torch.float32).max:
            raise RewardError(f"reward at {url}: a score is {str(value)[:60]!r}, not a number")
    return [float(value) for value in values]


class _Failed(Exception):
    """One request failed; if `temporary`, another one may succeed."""

    def __init__(self, why: str, temporary: bool):
        super().__init__(" ".join(why.split())[:200])
        self.temporary = temporary


def _with_retries(send: Callable[[], bytes], url: str, retries: int, pause: float) -> bytes:
    for attempt in range(retries + 1):
        try:
            return send()
        except _Failed as error:
            if error.temporary and attempt < retries:
                time.sleep(pause * 2**attempt)
                continue
            tries = f" ({attempt + 1} tries)" if attempt else ""
            raise RewardError(f"reward at {url}{tries}: {error}") from error
    raise AssertionError("unreachable: the last try returns or raises")


def _error_message(error: urllib.error.HTTPError) -> str:
    """The server's error message, or the standard words of the status."""
    try:
        return str(json.loads(error.read(2000))["error"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return error.reason


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is no number in JSON")


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)  # a local network is faster than more compression
    return base64.b64encode(buffer.getvalue()).decode()
