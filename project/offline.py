"""The offline model: an OpenAI-compatible server on loopback, to try the chat without a key or a network.

It is not an AI and says so. Every answer is the same few paragraphs around the last message, streamed at a
readable pace. A token here is a word with the space before it, in prompts and in answers alike.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

MODEL = "offline"
MAX_BODY_BYTES = 16 * 1024 * 1024
ECHO_CHARACTERS = 80
ANSWER = """\
I am the offline model that comes with this demo. I am not an AI: I cannot understand what you write, I only \
give this answer, one word at a time, so that you can watch it stream and try the Stop button.

The last thing you wrote was: “{echo}”

To talk to a real model, stop the demo with Ctrl-C, set these two variables, in the environment or in a file \
named .env beside manage.py, and start it again:

OPENAI_API_KEY: the key your provider gave you
OPENAI_BASE_URL: the provider's address, such as https://api.openai.com/v1

The rest is real: this text came to chatnest over HTTP, and its tokens (words, for me) were taken from \
today's budget, which you can follow on this page and in the admin."""


@dataclass(frozen=True)
class Completion:
    """What was asked for, and the answer to it."""

    model: str
    prompt_tokens: int
    pieces: list[str]
    finish_reason: str
    include_usage: bool

    @classmethod
    def of(cls, body: Any) -> Completion:
        if not isinstance(body, dict):
            raise refusal("The body must be a JSON object.")
        texts = contents(body.get("messages"))
        if body.get("stream") is not True:
            raise refusal('The offline model only streams: send "stream": true.')
        pieces = words(ANSWER.format(echo=shortened(texts[-1])))
        limit = max_tokens(body, default=len(pieces))
        options = body.get("stream_options")
        return cls(
            model=str(body.get("model") or MODEL),
            prompt_tokens=sum(len(words(text)) for text in texts),
            pieces=pieces[:limit],
            finish_reason="length" if limit < len(pieces) else "stop",
            include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        )

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Everything of a chunk that differs from the one before."""
        yield self.choice({"role": "assistant", "content": ""})
        for piece in self.pieces:
            yield self.choice({"content": piece})
        yield self.choice({}, self.finish_reason)
        if self.include_usage:
            yield {"choices": [], "usage": self.usage()}

    def choice(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, len(self.pieces)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def words(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= ECHO_CHARACTERS else line[:ECHO_CHARACTERS].rstrip() + "…"


def contents(messages: Any) -> list[str]:
    if not isinstance(messages, list) or not messages:
        raise refusal("messages must be a list with at least one message.")
    texts = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if not all(isinstance(text, str) for text in texts):
        raise refusal("Every message must be an object whose content is a string.")
    return [str(text) for text in texts]


def max_tokens(body: dict[str, Any], default: int) -> int:
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is None:
        return default
    if type(limit) is not int or limit < 1:
        raise refusal("max_tokens must be a whole number above 0.")
    return limit


def refusal(message: str) -> web.HTTPBadRequest:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return web.HTTPBadRequest(text=json.dumps({"error": error}), content_type="application/json")


class OfflineModel:
    """The server, in a thread of its own while the context lasts; ``url`` is its OPENAI_BASE_URL.

    >>> with OfflineModel() as model:
    ...     print(model.url)
    http://127.0.0.1:40321/v1
    """

    url: str

    def __init__(self, tokens_per_second: float = 30) -> None:
        self.pause = 1 / tokens_per_second

    def __enter__(self) -> OfflineModel:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        serve = self._serve(listener)
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(serve,), name="offline-model", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        # Cancelling the handler is what ends an answer at once when its reader leaves.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        await self._stop.wait()
        await runner.cleanup()

    async def models(self, request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "chatnest"}
        return web.json_response({"object": "list", "data": [model]})

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        try:
            completion = Completion.of(await request.json())
        except (ValueError, RecursionError):
            raise refusal("The body is not JSON.") from None
        same = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": completion.model,
        }
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for chunk in completion.chunks():
            await response.write(f"data: {json.dumps(same | chunk)}\n\n".encode())
            await asyncio.sleep(self.pause)
        await response.write(b"data: [DONE]\n\n")
        return response
