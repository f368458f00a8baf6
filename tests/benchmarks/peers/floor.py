"""The floor: ASGI and aiohttp with nothing between them that a relay could do without. It forgives no failure."""

from __future__ import annotations

import json
import os
from typing import Any

import aiohttp

HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
sessions: list[aiohttp.ClientSession] = []


def frames(events: list[bytes]) -> bytes:
    written = []
    for event in events:
        if event.startswith(b"data: {"):
            choices = json.loads(event[6:])["choices"]
            if choices and (text := choices[0]["delta"].get("content")):
                written.append(f"event: token\ndata: {json.dumps(text)}\n\n".encode())
    return b"".join(written)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if not sessions:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    body = (await receive())["body"]
    await send(HEAD)
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    async with sessions[0].post(url, data=body) as answer:
        rest = b""
        while received := await answer.content.readany():
            *events, rest = (rest + received).split(b"\n\n")
            if written := frames(events):
                await send({"type": "http.response.body", "body": written, "more_body": True})
    await send({"type": "http.response.body", "body": b"event: done\ndata: \n\n"})
