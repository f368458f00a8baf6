"""The demo's chat page in a real browser: what a visitor sees, from the first question to a spent budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from django.contrib.auth.models import User
from playwright.sync_api import Browser, Page, expect

from chatnest.models import Account
from chatnest.testing import SECRET, FakeUpstream, Reply

from .client import Client
from .conftest import Configure, EditProfile, Settled, on_sqlite

pytestmark = on_sqlite

Visit = Callable[[], Page]


@pytest.fixture
def page(browser: Browser, client: Client) -> Iterator[Page]:
    """The page, loaded; and at the end, that nothing went wrong in it which nobody showed."""
    context = browser.new_context()
    context.set_default_timeout(10_000)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.goto(f"http://127.0.0.1:{client.port}/")
    yield page
    context.close()
    # A refusal is in the browser's console whatever the page does with it.
    assert [line for line in complaints if not line.startswith("Failed to load resource")] == []


def send(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()


def answer(page: Page, text: str) -> None:
    expect(page.locator(".message.assistant p").last).to_have_text(text)


def error(page: Page, text: str) -> None:
    expect(page.get_by_role("alert")).to_have_text(text)


def left(page: Page, text: str) -> None:
    expect(page.locator("#remaining")).to_contain_text(text)


def test_an_answer_appears_piece_by_piece(page: Page, upstream: FakeUpstream, settled: Settled) -> None:
    expect(page).to_have_title("chatnest")
    upstream.replies(Reply("Hello", ", world", gate_after=1))
    send(page, "Hi!")
    expect(page.locator(".message.user p")).to_have_text("Hi!")
    answer(page, "Hello")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    expect(page.get_by_label("Your message")).to_have_value("")
    upstream.release()
    answer(page, "Hello, world")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert settled()[0].outcome == "completed"


def test_what_is_left_of_the_day_is_shown_and_goes_down(page: Page, upstream: FakeUpstream) -> None:
    left(page, "70,000 of 70,000 tokens left today (resets at ")
    upstream.replies(Reply("Hi", usage=(1000, 234)))
    send(page, "Hi!")
    left(page, "68,766 of 70,000 tokens left today")
    expect(page.locator("#last")).to_have_text("Last answer used 1,234 tokens")


def test_stop_ends_the_answer_and_the_upstream(page: Page, upstream: FakeUpstream, settled: Settled) -> None:
    upstream.replies(Reply("Once", " upon", gate_after=1), Reply("Well."))
    send(page, "Tell me a story.")
    answer(page, "Once")
    page.get_by_role("button", name="Stop").click()
    upstream.wait_for_disconnect()
    expect(page.locator(".message.assistant small")).to_have_text("stopped")
    expect(page.get_by_role("alert")).to_be_hidden()
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("cancelled", "counted")
    # What was held for the rest of the answer is seen to come back.
    left(page, f"{70_000 - row.tokens_charged:,} of 70,000")
    # The conversation goes on from what was said.
    send(page, "Go on.")
    answer(page, "Well.")
    contents = [message["content"] for message in upstream.requests[1].json["messages"]]
    assert contents == ["Tell me a story.", "Once", "Go on."]


def test_closing_the_tab_ends_the_answer_too(page: Page, upstream: FakeUpstream, settled: Settled) -> None:
    upstream.replies(Reply("Once", gate_after=1))
    send(page, "Tell me a story.")
    answer(page, "Once")
    page.close()
    upstream.wait_for_disconnect()
    assert settled()[0].outcome == "cancelled"


def test_the_conversation_is_sent_whole(page: Page, upstream: FakeUpstream) -> None:
    upstream.replies(Reply("First."), Reply("Second."))
    send(page, "one")
    answer(page, "First.")
    send(page, "two")
    answer(page, "Second.")
    assert upstream.requests[1].json["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "two"},
    ]


def test_the_profile_is_the_readers_choice(page: Page, upstream: FakeUpstream) -> None:
    page.get_by_label("Profile").select_option("constrained")
    left(page, "30,000 of 30,000")
    send(page, "Hi!")
    answer(page, "Hello world")
    assert upstream.requests[0].json["max_tokens"] == 150


def test_a_provider_that_refuses_is_a_sentence_and_the_question_is_not_lost(page: Page, upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(401), Reply("Here I am."))
    send(page, "Are you there?")
    error(page, "The chat is not set up correctly. Its operator has been told.")
    assert SECRET not in page.content()
    expect(page.get_by_label("Your message")).to_have_value("Are you there?")
    expect(page.locator(".message.user small")).to_have_text("not answered")
    page.get_by_role("button", name="Send").click()
    answer(page, "Here I am.")
    expect(page.get_by_role("alert")).to_be_hidden()
    # It was asked once, as far as the model knows.
    assert len(upstream.requests[1].json["messages"]) == 1


def test_an_answer_that_breaks_off_stays_with_a_sentence_below(page: Page, upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Half of", {"error": {"message": SECRET}}))
    send(page, "Hi!")
    answer(page, "Half of")
    error(page, "The AI model's answer broke off. Please try again.")
    expect(page.locator(".message.assistant small")).to_have_text("incomplete")
    assert SECRET not in page.content()


def test_a_spent_budget_is_a_sentence_that_says_when_to_come_back(
    page: Page, upstream: FakeUpstream, configure: Configure
) -> None:
    configure(SITE_DAILY_TOKEN_LIMIT=80, ANONYMOUS_DAILY_TOKEN_LIMIT=80)
    send(page, "Hi!")
    answer(page, "Hello world")
    left(page, "66 of 70,000 tokens left today")
    send(page, "More!")
    sentence = "Daily AI budget exceeded. Try again tomorrow. You can try again in "
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.get_by_label("Your message")).to_have_value("More!")
    assert len(upstream.requests) == 1


def test_a_message_that_is_too_long_is_a_sentence(page: Page, upstream: FakeUpstream) -> None:
    send(page, "word " * 3000)
    error(page, "Request too large. Please shorten your message.")
    assert upstream.requests == []


def test_too_many_questions_are_a_sentence(page: Page, edit_profile: EditProfile) -> None:
    edit_profile(rate_max_requests=1)
    send(page, "one")
    answer(page, "Hello world")
    send(page, "two")
    sentence = "Rate limit exceeded. Please slow down. You can try again in "
    expect(page.get_by_role("alert")).to_contain_text(sentence)


def test_an_operators_pause_is_a_sentence(page: Page) -> None:
    Account.objects.update_or_create(name="site", defaults={"paused": True})
    send(page, "Hi!")
    error(page, "The chat is paused by its operator. Please try again later. You can try again in 60 seconds.")


def test_text_is_shown_as_text(page: Page, upstream: FakeUpstream) -> None:
    markup = "<img src=x onerror=\"document.title='owned'\"> <b>&amp;</b> </p>\n\n\u2028line 😀"
    upstream.replies(Reply(*markup))
    send(page, "<script>document.title = 'owned'</script>")
    expect(page.locator(".message.assistant p")).to_have_text(markup, use_inner_text=False)
    expect(page.locator(".message.user p")).to_have_text("<script>document.title = 'owned'</script>")
    expect(page.locator(".message img, .message b, .message script")).to_have_count(0)
    expect(page).to_have_title("chatnest")


def test_enter_sends_and_shift_enter_begins_a_line(page: Page, upstream: FakeUpstream) -> None:
    box = page.get_by_label("Your message")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    box.press("Enter")
    answer(page, "Hello world")
    assert upstream.requests[0].json["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_an_empty_question_is_not_sent(page: Page, upstream: FakeUpstream) -> None:
    send(page, " \n ")
    send(page, "Hi!")
    answer(page, "Hello world")
    assert len(upstream.requests) == 1


def test_a_visitor_who_may_not_chat_finds_the_way_in_and_chats(
    page: Page, client: Client, configure: Configure, settled: Settled
) -> None:
    """With the session and the CSRF token of a real login."""
    grace = User.objects.create_superuser("grace", password="hopper")
    configure(ALLOW_ANONYMOUS=False)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Please log in to use the chat.")
    page.get_by_role("alert").get_by_role("link", name="Log in").click()
    page.get_by_label("Username").fill("grace")
    page.get_by_label("Password").fill("hopper")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("link", name="Admin")).to_be_visible()
    left(page, "70,000 of 70,000")
    send(page, "Hi!")
    answer(page, "Hello world")
    assert settled()[0].payer == f"user:{grace.pk}"
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("navigation").get_by_role("link", name="Log in")).to_be_visible()


def test_a_wrong_password_is_a_sentence(page: Page) -> None:
    page.get_by_role("link", name="Log in").click()
    page.get_by_label("Username").fill("grace")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("Please enter a correct username and password")


def test_a_server_that_is_gone_is_a_sentence(page: Page, upstream: FakeUpstream) -> None:
    page.context.set_offline(True)
    send(page, "Hi!")
    error(page, "The server cannot be reached. Please check your connection and try again.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Send").click()
    answer(page, "Hello world")


def test_heartbeats_are_nothing_to_see(page: Page, upstream: FakeUpstream, configure: Configure) -> None:
    configure(HEARTBEAT_SECONDS=0.05)
    upstream.replies(Reply("Hello", pause_before=0.5))
    send(page, "Hi!")
    answer(page, "Hello")
    expect(page.locator(".message")).to_have_count(2)
