"""A relay as a Python developer writes it today: FastAPI, sse-starlette, the openai package. No accounting."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from openai import AsyncOpenAI
from sse_starlette import EventSourceResponse

app = FastAPI()
openai = AsyncOpenAI(api_key="sk-benchmarks")


@app.post("/api/chat")
async def chat(request: Request) -> EventSourceResponse:
    body = await request.json()
    messages = [{"role": message["role"], "content": message["content"]} for message in body["messages"]]

    async def frames() -> AsyncIterator[dict[str, Any]]:
        yield {"event": "start", "data": ""}
        answer = await openai.chat.completions.create(
            model="gpt-4o-mini",
            messages=messages,
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in answer:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield {"event": "token", "data": json.dumps(text)}
        yield {"event": "done", "data": ""}

    return EventSourceResponse(frames())
