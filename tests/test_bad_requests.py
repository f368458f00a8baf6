"""What clients get wrong, or try: a clear JSON refusal, never a 500; nothing is charged or asked of the model."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import Client as DjangoClient

from chatnest.models import DailyUsage, RateWindow, Reservation
from chatnest.testing import FakeUpstream

from .client import HELLO, Answer, Client
from .conftest import Configure, on_sqlite

pytestmark = on_sqlite

JSON_RULE = "The request body must be valid JSON in UTF-8, without NaN or Infinity."
OBJECT_RULE = "The request body must be a JSON object."
COUNT_RULE = "messages must have 1 to 1000 items."
ITEM_RULE = "messages[0] must be an object with role and content."
ROLE_RULE = "messages[0].role must be one of user, assistant."
CONTENT_RULE = "messages[0].content must be a string."
NUL_RULE = "messages[0].content must not contain the NUL character."
BODY_RULE = "The request body may have at most 1048576 bytes."

MEDIA_RULE = "Send the request as Content-Type: application/json."


def limit_rule(name: str) -> str:
    return f"{name} must be a number above 0 and below 2^63."


@pytest.fixture(autouse=True)
def nothing_happens(client: Client, upstream: FakeUpstream) -> Iterator[None]:
    """The end of every story here."""
    yield
    assert upstream.requests == []
    for model in (Reservation, DailyUsage, RateWindow):
        assert not model.objects.exists()


def refused(answer: Answer, status: int, code: str, message: str) -> None:
    assert (answer.status, answer.json) == (status, {"error": message, "code": code, "retryable": False})
    assert answer.headers["cache-control"] == "no-store"
    assert "retry-after" not in answer.headers


def content(raw: str) -> bytes:
    return b'{"messages": [{"role": "user", "content": %b}]}' % raw.encode()


def hello(extra: str) -> bytes:
    return b'{"messages": [{"role": "user", "content": "Hello!"}], %b}' % extra.encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{}}",
        b"messages=hello",
        b"<xml/>",
        b"{'messages': []}",
        b'{"messages": [],}',
        b'{"messages": [{"role": "user", "content": "cut o',
        b'\xef\xbb\xbf{"messages": []}',
        json.dumps(HELLO).encode("utf-16"),
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "Hello!"}], "skipped": "\xff"}',
        content(r'"\x41"'),
        content('"a raw \n newline"'),
        content('"a raw \0 NUL"'),
        content("NaN"),
        b"NaN",
        content('{"a":' * 50_000 + "1" + "}" * 50_000),
        content("[" * 100_000 + "]" * 100_000),
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        hello('"skipped": ' + "[" * 100_000 + "]" * 100_000),
        *(
            hello(f'"{name}": {value}')
            for name in ("dailyTokenLimit", "maxTokensPerRequest")
            for value in ("NaN", "Infinity", "-Infinity", "nan", "+1", "01", "0x10", "1_000")
        ),
    ],
    ids=lambda body: repr(body[:60] + b"..." + body[-9:] if len(body) > 70 else body),
)
def test_what_is_not_json(client: Client, body: bytes) -> None:
    refused(client.chat(body), 400, "invalid_request", JSON_RULE)


@pytest.mark.parametrize(
    "body",
    [b"null", b"true", b"1", b'"messages"', b"[]", b"[" * 100_000, json.dumps([HELLO]).encode()],
    ids=lambda body: repr(body[:20]),
)
def test_json_that_is_not_an_object(client: Client, body: bytes) -> None:
    refused(client.chat(body), 400, "invalid_request", OBJECT_RULE)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"message": "Hello!"},
        *({"messages": value} for value in (None, "Hello!", 1, True, {}, {"0": HELLO})),
    ],
    ids=str,
)
def test_messages_that_are_missing_or_no_list(client: Client, body: object) -> None:
    refused(client.chat(body), 400, "invalid_messages", "Invalid messages payload")


@pytest.mark.parametrize("count", [0, 1001, 10_000])
def test_too_few_or_too_many_messages(client: Client, count: int) -> None:
    refused(client.chat({"messages": HELLO["messages"] * count}), 400, "invalid_request", COUNT_RULE)


@pytest.mark.parametrize("item", [None, "Hello!", 1, 1.5, True, [], ["user", "Hello!"]], ids=str)
def test_messages_that_are_no_objects(client: Client, item: object) -> None:
    refused(client.chat({"messages": [item]}), 400, "invalid_request", ITEM_RULE)


@pytest.mark.parametrize(
    "role",
    ["system", "developer", "tool", "function", "", "User", "user ", None, 1, True, [], ["user"], {}],
    ids=repr,
)
def test_roles_that_a_client_may_not_play(client: Client, role: object) -> None:
    body = {"messages": [{"role": role, "content": "Hello!"}]}
    refused(client.chat(body), 400, "invalid_request", ROLE_RULE)


def test_a_message_without_a_role_or_without_content(client: Client) -> None:
    refused(client.chat({"messages": [{"content": "Hello!"}]}), 400, "invalid_request", ROLE_RULE)
    refused(client.chat({"messages": [{"role": "user"}]}), 400, "invalid_request", CONTENT_RULE)


@pytest.mark.parametrize(
    "value",
    [None, 0, 1, 1.5, True, [], {}, ["Hello!"], [{"type": "text", "text": "Hello!"}], {"length": 0}],
    ids=repr,
)
def test_content_that_is_not_a_string(client: Client, value: object) -> None:
    """In the original, such a message slipped past the estimate of its tokens."""
    body = {"messages": [{"role": "user", "content": value}]}
    refused(client.chat(body), 400, "invalid_request", CONTENT_RULE)


@pytest.mark.parametrize("raw", [r'"\u0000"', r'"Hello\u0000!"'])
def test_content_with_a_nul_character(client: Client, raw: str) -> None:
    refused(client.chat(content(raw)), 400, "invalid_request", NUL_RULE)


def test_the_refusal_names_the_message_that_is_wrong(client: Client) -> None:
    items = [*HELLO["messages"], {"role": "assistant", "content": "Hi"}, {"role": "user", "content": 7}]
    refused(client.chat({"messages": items}), 400, "invalid_request", "messages[2].content must be a string.")


def test_a_message_that_the_model_would_not_see_must_be_right_too(client: Client) -> None:
    items = [{"role": "user", "content": 7}, *HELLO["messages"] * 20]
    refused(client.chat({"messages": items}), 400, "invalid_request", CONTENT_RULE)


@pytest.mark.parametrize("name", ["dailyTokenLimit", "maxTokensPerRequest"])
@pytest.mark.parametrize(
    "value",
    ["0", "-0", "-1", "-9223372036854775809", "-0.5", "1e308", "true", "false", '""', '"x"',
     '"2048"', '"NaN"', '"Infinity"', "[]", "[1]", "{}", str(2**63), str(2**64), "1" + "0" * 400, "-1" + "0" * 400],
    ids=lambda value: value[:25],
)  # fmt: skip
def test_limits_that_are_no_number_above_zero(client: Client, name: str, value: str) -> None:
    """In the original, "x" became NaN, every comparison with NaN is false, and the cap was gone."""
    answer = client.chat(hello(f'"{name}": {value}'))
    refused(answer, 400, "invalid_request", limit_rule(name))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 500 + ".5"], ids=lambda number: number[:9])
def test_numbers_that_no_float_can_hold(client: Client, number: str) -> None:
    for name in ("dailyTokenLimit", "maxTokensPerRequest"):
        rule = f"{name} holds a number that is out of range."
        refused(client.chat(hello(f'"{name}": {number}')), 400, "invalid_request", rule)
    rule = "messages[0][...] holds a number that is out of range."
    refused(client.chat(content(number)), 400, "invalid_request", rule)


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=x",
     "application/jsonp", "text/json", "application/json5", "json", "application/ld+json", "*/*"],
)  # fmt: skip
def test_bodies_that_are_not_said_to_be_json(client: Client, content_type: str) -> None:
    refused(client.chat(Content_Type=content_type), 415, "unsupported_media_type", MEDIA_RULE)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_methods_other_than_post(client: Client, method: str) -> None:
    answer = client.request(method, "/api/chat")
    refused(answer, 405, "method_not_allowed", "Use POST.")
    assert answer.headers["allow"] == "POST"


def test_head_is_no_chat_either(client: Client) -> None:
    answer = client.request("HEAD", "/api/chat")
    assert (answer.status, answer.text, answer.headers["allow"]) == (405, "", "POST")


def test_a_two_megabyte_string(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 2_000_000}]}
    refused(client.chat(body), 413, "body_too_large", BODY_RULE)


def test_a_body_larger_than_django_itself_takes(client: Client) -> None:
    refused(client.chat(b" " * 3_000_000), 413, "body_too_large", BODY_RULE)


def test_a_body_just_above_the_limit(client: Client, configure: Configure) -> None:
    body = json.dumps(HELLO).encode()
    configure(MAX_BODY_BYTES=len(body))
    message = f"The request body may have at most {len(body)} bytes."
    refused(client.chat(body + b" "), 413, "body_too_large", message)
    # Not one byte fewer: this is read, and refused for what it says.
    refused(client.chat(b"x" * len(body)), 400, "invalid_request", JSON_RULE)


def test_where_bodies_may_be_large_the_prompt_still_may_not(client: Client, configure: Configure) -> None:
    configure(MAX_BODY_BYTES=10_000_000)
    body = {"messages": [{"role": "user", "content": "word " * 400_000}]}
    refused(client.chat(body), 429, "request_too_large", "Request too large. Please shorten your message.")
    refused(
        client.chat(b" " * 3_000_000),
        413,
        "body_too_large",
        "The request body may have at most 10000000 bytes.",
    )


def exchange(port: int, sent: bytes) -> tuple[int, dict[str, Any]]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        answer = b""
        while received := connection.recv(65536):
            answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_large_body_of_undeclared_length(client: Client) -> None:
    head = "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunk = b"%x\r\n%b\r\n" % (100_000, b" " * 100_000)
    sent = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20 + b"0\r\n\r\n"
    assert exchange(client.port, sent) == (
        413,
        {"error": BODY_RULE, "code": "body_too_large", "retryable": False},
    )


def test_no_body_at_all(client: Client) -> None:
    head = "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\r\n"
    assert exchange(client.port, head.encode()) == (
        400,
        {"error": JSON_RULE, "code": "invalid_request", "retryable": False},
    )


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=\xff", b"x"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n',
        ),
        ("application/x-www-form-urlencoded", b"&".join(b"a=1" for _ in range(2000))),
        ("application/x-www-form-urlencoded", b"a=" + b"x" * 3_000_000),
        ("application/x-www-form-urlencoded; charset=latin-1", b"a=1"),
    ],
    ids=["no boundary", "bad boundary", "form", "too many fields", "too large", "not UTF-8"],
)
def test_a_users_browser_is_made_to_post_a_form(
    client: Client, django_user_model: Any, content_type: str, body: bytes
) -> None:
    """A foreign page can send forms with the user's cookie: the CSRF check, which reads them, must survive them."""
    browser = DjangoClient()
    browser.force_login(django_user_model.objects.create_user("ada"))
    cookie = f"sessionid={browser.cookies['sessionid'].value}; csrftoken={'a' * 32}"
    answer = client.chat(body, Content_Type=content_type, cookie=cookie)
    refused(answer, 403, "forbidden", "The page is out of date (CSRF check failed). Reload it and try again.")
    # With the right token it is looked at, and is no JSON.
    answer = client.chat(body, Content_Type=content_type, cookie=cookie, x_csrftoken="a" * 32)
    refused(answer, 415, "unsupported_media_type", MEDIA_RULE)


@pytest.mark.parametrize(
    "headers",
    [{"cookie": "sessionid=\xff; csrftoken=\t"}, {"x_forwarded_for": "\xff,,,"},
     {"authorization": "Bearer " + "x" * 5000}, {"accept": "nothing/at-all"}, {"accept_language": "\xff"}],
    ids=str,
)  # fmt: skip
def test_odd_headers_do_no_harm(client: Client, headers: dict[str, str], configure: Configure) -> None:
    """The request is refused for its body: with these headers it came that far."""
    configure(TRUSTED_PROXIES=1)
    refused(client.chat(b"{", **headers), 400, "invalid_request", JSON_RULE)
