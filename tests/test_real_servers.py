"""The chat before servers that nobody here wrote: llama.cpp, LiteLLM's proxy, LiteLLM before llama.cpp, transformers.

Where a server cannot be installed its stories are skipped, but not in CI. transformers is told them only by
``python -m tests.real_servers``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from .benchmarks.processes import Serving, free_port
from .client import Client
from .conftest import Configure, EditProfile, Settled, eventually, on_sqlite, port_of
from .real_servers import KEY, PATIENCE, Meter, Real, installed, running

pytestmark = on_sqlite

STORY = {"messages": [{"role": "user", "content": "Tell me a long story."}]}
TOO_LONG = {"messages": [{"role": "user", "content": "hello " * 2400}]}
ANSWER, LONG_ANSWER = 24, 4000  # tokens; a long one takes minutes


def python_of(script: str) -> str:
    try:
        return installed(script)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{script} cannot be installed here: {error}\n{error.stderr or ''}")


@contextmanager
def llama_cpp(port: int) -> Iterator[tuple[Real, Serving]]:
    with running(python_of("llama_cpp.py"), "llama_cpp.py", port, KEY) as serving:
        server = Real(f"http://127.0.0.1:{port}/v1", "smollm2")
        # It answers 503 while it loads its model.
        eventually(lambda: "ok" in server.ask("GET", "/health"), PATIENCE)
        yield server, serving


@pytest.fixture(scope="session")
def llama() -> Iterator[Real]:
    with llama_cpp(free_port()) as (server, _):
        yield server


@pytest.fixture(scope="session")
def dying_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def gateway(llama: Real, dying_port: int) -> Iterator[str]:
    """The base URL of LiteLLM's proxy."""
    port = free_port()
    behind = (llama.url, f"http://127.0.0.1:{dying_port}/v1")
    with running(python_of("litellm_proxy.py"), "litellm_proxy.py", port, KEY, *behind):
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture(scope="session")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if not os.environ.get("ALL_REAL_SERVERS"):
        pytest.skip("5 GB of packages: python -m tests.real_servers")
    port, model = free_port(), str(tmp_path_factory.mktemp("model"))
    with running(python_of("transformers_serve.py"), "transformers_serve.py", port, model):
        yield Real(f"http://127.0.0.1:{port}/v1", model)


@pytest.fixture
def real(request: pytest.FixtureRequest) -> Real:
    """The server of a story: "llama.cpp", "transformers", or "LiteLLM: " and the name of one of its models."""
    match request.param.split(": "):
        case ["llama.cpp"]:
            return request.getfixturevalue("llama")
        case ["transformers"]:
            return request.getfixturevalue("transformers")
        case ["LiteLLM", model]:
            return Real(request.getfixturevalue("gateway"), model)
    raise AssertionError(request.param)


def before(*servers: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("real", servers, indirect=True)


@pytest.fixture
def site(
    real: Real, server: uvicorn.Server, database: str, configure: Configure, edit_profile: EditProfile
) -> Iterator[Client]:
    """A client of a site before the real server."""
    configure(OPENAI_BASE_URL=real.url, OPENAI_API_KEY=KEY)
    edit_profile(**profile(real, ANSWER))
    yield Client(port_of(server))
    eventually(lambda: not server.server_state.tasks)


def profile(real: Real, tokens: int) -> dict[str, Any]:
    return {"model": real.model, "max_output_tokens": tokens, "max_tokens_per_request": 16_000, "temperature": 0}


def refused(site: Client, settled: Settled, body: object = STORY) -> dict[str, Any]:
    """The error that ends a chat before any token of it, for which nothing is charged."""
    answer = site.chat(body)
    assert [event for event in answer.events if event != "ping"] == ["start", "error"]
    assert {(row.outcome, row.tokens_charged) for row in settled()} == {("upstream_error", 0)}
    return answer.data("error")


@before("llama.cpp", "LiteLLM: mock", "LiteLLM: behind", "transformers")
def test_an_answer_streams_and_is_charged_as_the_server_reports(real: Real, site: Client, settled: Settled) -> None:
    answer = site.chat(STORY)
    assert answer.events.count("token") > 5
    assert answer.events[-2:] == ["usage", "done"]
    reported = real.reports(STORY, ANSWER)
    usage = answer.data("usage")
    assert usage["promptTokens"] == reported["prompt_tokens"]
    assert usage["completionTokens"] == reported["completion_tokens"]
    (row,) = settled()
    assert (row.outcome, row.usage_source, row.tokens_charged) == ("completed", "reported", reported["total_tokens"])
    assert row.tokens >= row.tokens_charged  # the hold


@before("llama.cpp", "LiteLLM: behind", "transformers")
def test_an_answer_that_its_allowance_ended_says_so(real: Real, site: Client) -> None:
    answer = site.chat(STORY)
    assert (answer.events[-1], answer.data("usage")["finishReason"]) == ("done", "length")


@before("LiteLLM: mock")
def test_an_answer_that_ended_by_itself_says_so(real: Real, site: Client) -> None:
    assert site.chat(STORY).data("usage")["finishReason"] == "stop"


@before("llama.cpp", "LiteLLM: mock", "transformers")
def test_chats_one_after_another_are_all_answered(real: Real, site: Client, settled: Settled) -> None:
    """llama.cpp says keep-alive and closes the connection after each stream."""
    for _ in range(5):
        assert site.chat(STORY).events[-1] == "done"
    assert [row.usage_source for row in settled()] == ["reported"] * 5


@before("llama.cpp")
def test_chats_at_once_are_charged_what_the_model_has_read_and_written(
    real: Real, site: Client, settled: Settled
) -> None:
    meter = Meter(real)
    before = meter.tokens()
    streams = [site.stream(STORY) for _ in range(4)]
    for stream in streams:
        assert stream.rest()[-1][0] == "done"
        stream.leave()
    assert sum(row.tokens_charged for row in settled()) == meter.tokens() - before


@before("llama.cpp", "LiteLLM: behind")
def test_who_leaves_stops_the_model_and_pays_what_it_has_done(
    real: Real, llama: Real, site: Client, settled: Settled, edit_profile: EditProfile
) -> None:
    meter = Meter(llama)
    tokens, predicted = meter.tokens(), meter["tokens_predicted_total"]
    edit_profile(**profile(real, LONG_ANSWER))
    with site.stream(STORY) as stream:
        for _ in range(10):
            stream.until("token")
    eventually(lambda: not meter["requests_processing"], PATIENCE)
    assert meter["tokens_predicted_total"] - predicted < 100
    (row,) = settled()
    assert row.outcome == "cancelled"
    assert row.tokens >= row.tokens_charged >= meter.tokens() - tokens


@before("llama.cpp", "LiteLLM: behind")
def test_who_leaves_while_the_prompt_is_read_pays_for_it(
    real: Real, llama: Real, site: Client, settled: Settled, edit_profile: EditProfile
) -> None:
    """llama.cpp reads it to the end for nobody, and LiteLLM has not even sent a header then."""
    meter = Meter(llama)
    tokens, predicted = meter.tokens(), meter["tokens_predicted_total"]
    unread = f"{real.model} says: " + "one two three four. " * 40
    with site.stream({"messages": [{"role": "user", "content": unread}]}):
        eventually(lambda: meter["requests_processing"], PATIENCE)
    eventually(lambda: not meter["requests_processing"], PATIENCE)
    assert meter["tokens_predicted_total"] - predicted < 10
    (row,) = settled()
    assert row.outcome == "cancelled"
    assert row.tokens >= row.tokens_charged >= meter.tokens() - tokens


@before("llama.cpp", "LiteLLM: behind")
def test_a_drained_answer_is_charged_what_the_model_has_read_and_written(
    real: Real, llama: Real, site: Client, settled: Settled, configure: Configure
) -> None:
    configure(ON_DISCONNECT="drain")
    meter = Meter(llama)
    tokens = meter.tokens()
    with site.stream(STORY) as stream:
        stream.until("token")
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("cancelled", "reported")
    assert row.tokens_charged == meter.tokens() - tokens


@before("transformers")
def test_who_leaves_lets_the_next_question_in(
    real: Real, site: Client, settled: Settled, edit_profile: EditProfile
) -> None:
    """It has no meter, but one thread in which one answer after another is made."""
    edit_profile(**profile(real, LONG_ANSWER))
    with site.stream(STORY) as stream:
        for _ in range(10):
            stream.until("token")
    prompt = real.reports(STORY, 1, seconds=10)["prompt_tokens"]
    (row,) = settled()
    assert row.outcome == "cancelled"
    assert row.tokens >= row.tokens_charged >= prompt + 10


@before("llama.cpp", "transformers")
def test_the_newer_name_of_the_allowance_is_kept_to(real: Real, site: Client, configure: Configure) -> None:
    configure(MAX_TOKENS_PARAMETER="max_completion_tokens")
    assert site.chat(STORY).data("usage")["completionTokens"] == ANSWER


@before("LiteLLM: endless")
def test_an_answer_that_ignores_its_allowance_is_cut(real: Real, site: Client, settled: Settled) -> None:
    answer = site.chat(STORY)
    assert (answer.events[-1], answer.data("usage")["finishReason"]) == ("done", "length")
    words = answer.answer.split()
    assert ANSWER <= len(words) < 100
    (row,) = settled()
    assert row.outcome == "completed"
    assert row.tokens_charged >= len(words)


@before("llama.cpp", "LiteLLM: context", "LiteLLM: behind")
def test_a_conversation_that_is_longer_than_the_model_takes(real: Real, site: Client, settled: Settled) -> None:
    error = refused(site, settled, TOO_LONG)
    assert (error["code"], error["retryable"]) == ("context_length_exceeded", False)


@before("LiteLLM: no-such-model", "transformers")
def test_a_model_that_the_server_does_not_know_is_its_operators_fault(
    real: Real, site: Client, settled: Settled, edit_profile: EditProfile
) -> None:
    edit_profile(model="no-such-model")
    error = refused(site, settled)
    assert (error["code"], error["retryable"]) == ("upstream_misconfigured", False)
    assert "no-such-model" not in error["message"]


@before("llama.cpp")
def test_llama_cpp_answers_by_any_name_of_a_model(
    real: Real, site: Client, settled: Settled, edit_profile: EditProfile
) -> None:
    """OpenAI's own tokenizer must not be trusted because a name is OpenAI's: the hold is enough all the same."""
    edit_profile(model="gpt-4o-mini", max_output_tokens=ANSWER, temperature=0)
    body = {"messages": [{"role": "user", "content": "私は学生です。" * 12}]}
    assert site.chat(body).events[-1] == "done"
    (row,) = settled()
    assert (row.model, row.usage_source) == ("gpt-4o-mini", "reported")
    assert row.tokens >= row.tokens_charged


@before("transformers")
def test_a_parameter_that_the_server_does_not_know_is_its_operators_fault(
    real: Real, site: Client, settled: Settled, configure: Configure
) -> None:
    provider = {"API_KEY": KEY, "BASE_URL": real.url, "EXTRA_BODY": {"frobnicate": 1}}
    configure(PROVIDERS={"default": provider})
    assert refused(site, settled)["code"] == "upstream_misconfigured"


@before("llama.cpp", "LiteLLM: mock")
def test_a_wrong_key_is_the_operators_fault(real: Real, site: Client, settled: Settled, configure: Configure) -> None:
    """LiteLLM without a database refuses a key that it does not know with 400, "No connected db."."""
    configure(OPENAI_API_KEY="sk-wrong")
    error = refused(site, settled)
    assert (error["code"], error["retryable"]) == ("upstream_misconfigured", False)


@before("LiteLLM: behind-wrong-key")
def test_a_gateways_own_wrong_key_is_the_operators_fault(real: Real, site: Client, settled: Settled) -> None:
    assert refused(site, settled)["code"] == "upstream_misconfigured"


@before("LiteLLM: rate")
def test_a_rate_limit_of_the_gateway(real: Real, site: Client, settled: Settled) -> None:
    error = refused(site, settled)
    assert (error["code"], error["retryable"]) == ("upstream_rate_limited", True)


@before("LiteLLM: error", "LiteLLM: dying")
def test_a_gateway_whose_server_is_broken_or_away(real: Real, site: Client, settled: Settled) -> None:
    error = refused(site, settled)
    assert (error["code"], error["retryable"]) == ("upstream_unavailable", True)


@before("LiteLLM: timeout")
def test_a_gateways_timeout_may_have_been_billed(real: Real, site: Client, settled: Settled) -> None:
    answer = site.chat(STORY)
    assert answer.events[-1] == "error"
    assert answer.data("error")["retryable"]
    assert all(row.tokens_charged > 0 for row in settled())


@before("llama.cpp", "LiteLLM: dying")
def test_a_model_that_dies_in_the_middle_is_no_complete_answer(
    real: Real, dying_port: int, site: Client, settled: Settled, configure: Configure, edit_profile: EditProfile
) -> None:
    """LiteLLM says so in the stream, as an event with an error in it, and ends the body as if all were well."""
    edit_profile(**profile(real, LONG_ANSWER))
    with llama_cpp(dying_port) as (dying, serving):
        if real.model != "dying":
            configure(OPENAI_BASE_URL=dying.url)
        with site.stream(STORY) as stream:
            for _ in range(10):
                stream.until("token")
            serving.process.kill()
            events = [event for event, _ in stream.rest()]
    assert events[-1] == "error"
    assert "done" not in events
    (row,) = settled()
    assert row.outcome == "upstream_error"
    assert row.tokens_charged > 10
