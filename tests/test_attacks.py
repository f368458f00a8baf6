"""Attacks on the budget and on the door: what they took from the first edition, and what they get now.

The provider keeps its own bill. Whatever it does, and whenever its readers leave, no payer is charged less than was
billed for it, and no account spends more than its day.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_network
from random import Random
from typing import Any

import pytest
import toktok
import uvicorn
from django.contrib.auth.models import User
from django.core.management import call_command

from chatnest.ledger import Stop
from chatnest.ledger.charges import IN_FLIGHT, most_received
from chatnest.models import DailyUsage, Reservation
from chatnest.testing import FakeUpstream, Reply
from chatnest.tokens import MOST_BYTES_PER_TOKEN, TokenCounter
from chatnest.wires import Message
from project.asgi import application

from . import billing
from .billing import AHEAD, BillingProvider, Count, Play
from .bookkeeping import do
from .client import Client
from .conftest import Configure, EditProfile, Settled, eventually, on_sqlite, port_of, served
from .leaving import AT_ONCE, PATIENCE_SECONDS, TO_THE_END, WORD, Reader, read_all
from .test_accounts import log_in, pause
from .vendors import openai_count, prompt_count

SITE = 20_000
EACH = 4_500
ALLOWANCE = 400
CAPS = {"rate_max_requests": 10_000, "max_concurrent_streams": 1_000}
AT_A_TIME = 25
ADDRESSES = ("192.0.2.1", "192.0.2.2", "192.0.2.3", "2a00:1450:4001:830::")
# No two tokenizers count these alike, and some grow when they are normalized.
TEXTS = ("Why is the sky blue?", "天空为什么是蓝色的" * 4, "\u0fb9" * 12, "\ufdfa" * 9, "🌈 " * 10, "-" * 300)

HELD = {"PROVIDERS": {"default": {"UNREPORTED": "held"}}}
DRAINED = {"ON_DISCONNECT": "drain"}
KNOWN = {"PROVIDERS": {"default": {"TOKENIZER": "o200k_base"}}}

Payers = dict[str, dict[str, str]]  # the headers that each sends
Script = Callable[[int], Coroutine[Any, Any, None]]  # what readers do at a port


def openai(messages: Sequence[Message]) -> int:
    """https://github.com/openai/openai-cookbook/blob/main/examples/How_to_count_tokens_with_tiktoken.ipynb"""
    return 3 + sum(4 + openai_count(message.content, "o200k_base") for message in messages)


qwen, llama, gpt_oss = (partial(prompt_count, vendor) for vendor in ("qwen3", "llama3", "gpt-oss"))


def with_a_long_template(messages: Sequence[Message]) -> int:
    return qwen(messages) + 300


@pytest.fixture
def payers(database: str) -> Payers:
    users = [User.objects.create_user(name) for name in ("ada", "grace", "joan", "mary")]
    return {
        **{f"user:{user.pk}": log_in(user) for user in users},
        **{f"ip:{address}": {"x_forwarded_for": address} for address in ADDRESSES},
    }


@pytest.fixture
def site(
    server: uvicorn.Server, database: str, configure: Configure, edit_profile: EditProfile, settled: Settled
) -> Callable[..., list[Reservation]]:
    """Tell a script to a site whose provider is this one; all reservations, once the last is settled."""
    for name in ("balanced", "expanded"):
        edit_profile(name, max_output_tokens=ALLOWANCE, daily_token_limit=EACH, **CAPS)

    def quiet(loop: asyncio.Runner) -> bool:
        loop.run(asyncio.sleep(0.01))  # what is drained goes on
        return not (server.server_state.connections or Reservation.objects.using(database).open().exists())

    def told(provider: BillingProvider, script: Script, **changes: Any) -> list[Reservation]:
        with asyncio.Runner() as loop:
            url = loop.run(provider.start())
            configure(
                HARD_CAPS=CAPS, SITE_DAILY_TOKEN_LIMIT=SITE, TRUSTED_PROXIES=1, SHOW_REASONING=True, OPENAI_BASE_URL=url
            )
            configure(**changes)
            loop.run(script(port_of(server)))
            Client(port_of(server)).request("GET", "/nothing")  # by its turn, the server has met them all
            eventually(partial(quiet, loop), PATIENCE_SECONDS)
            loop.run(provider.stop())
        return settled()

    return told


def spent(database: str) -> dict[str, int]:
    """What each account has used of its day. Nothing is held any more, and all of it is proven."""
    call_command("chatnest_verify")
    usage = DailyUsage.objects.using(database)
    assert not usage.exclude(tokens_reserved=0).exists()
    return dict(usage.values_list("account", "tokens_used"))


def charges(rows: Sequence[Reservation]) -> Counter[str]:
    """The tokens of each payer."""
    sums: Counter[str] = Counter()
    for row in rows:
        sums[row.payer] += row.tokens_charged
    return sums


# 500 requests.


@dataclass(frozen=True)
class Attack:
    """50 of them. ``met``: the first one is read to its end, so that the model has reported before the others come.

    ``patience``: seconds that most readers have, at most. ``overrun``: tokens by which each of the answers that are
    open at once may pass a limit.
    """

    name: str
    play: Play
    count: Count
    settings: dict[str, Any] = field(default_factory=dict)
    met: bool = False
    patience: float = 0.15
    overrun: int = 0

    def readers(self, payers: Payers) -> list[Reader]:
        random = Random(self.name)
        weights = [1 if payer.startswith("ip:") else 3 for payer in payers]
        readers = []
        for number in range(50):
            (payer,) = random.choices([*payers], weights)
            some, soon = random.randint(1, ALLOWANCE // 2), random.uniform(0, self.patience)
            leaving = [(AT_ONCE, 60), (0, 60), (some, soon), (some, soon), (TO_THE_END, soon), (TO_THE_END, 60)]
            after, seconds = leaving[-1] if self.met and not number else random.choice(leaving)
            text = random.choice(TEXTS)
            readers.append(Reader(number, payer, payers[payer], text, leaves_after=after, seconds=seconds))
        return readers


# Of an answer that is cut: what DESIGN allows, the bytes by which that is seen late, what was on the way, and
# what may have been.
RUNAWAY = most_received(ALLOWANCE) - ALLOWANCE + TokenCounter.LEAST // len(WORD) + AHEAD + IN_FLIGHT
ATTACKS = [
    Attack("silent reasoning", billing.silent, gpt_oss),
    Attack("reasoning in the open", billing.in_the_open, qwen),
    Attack("finishes anyway, held", billing.finishing, llama, HELD),
    Attack("finishes anyway, drained", billing.finishing, llama, DRAINED),
    Attack("reasons unseen", billing.thinking, with_a_long_template, met=True),
    Attack("a reset, then an answer", billing.breaking, qwen, patience=1),
    Attack("a gateway's timeout", billing.out_of_time, qwen),
    Attack("a gateway's timeout after the work, held", billing.out_of_time_after_the_work, qwen, HELD),
    Attack("honest", billing.honest, openai, KNOWN, met=True),
    Attack("ignores max_tokens", billing.endless, qwen, overrun=RUNAWAY),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_whatever_is_billed_is_charged_and_within_the_day(
    attack: Attack, payers: Payers, site: Callable[..., list[Reservation]], database: str
) -> None:
    """240,640 were billed, and 1,120 charged."""
    readers = attack.readers(payers)
    provider = BillingProvider(attack.play, attack.count, readers)

    async def script(port: int) -> None:
        await read_all(readers[: attack.met], port, 1)
        await read_all(readers[attack.met :], port, AT_A_TIME)

    charged = charges(site(provider, script, **attack.settings))
    billed = provider.bills()
    print(f"\n{attack.name}: {billed.total()} billed, {charged.total()} charged, {len(provider.answers)} calls")
    assert billed.total() > 1000
    assert billed <= charged
    limits = {"site": SITE, "anonymous": SITE // 5}
    for account, used in spent(database).items():
        assert used <= limits.get(account, EACH) + AT_A_TIME * attack.overrun, account


def test_the_first_answers_of_a_model_may_miss_its_template_and_no_more(
    payers: Payers, site: Callable[..., list[Reservation]], database: str
) -> None:
    """Its reports teach it, so that who comes after them is held for all of it."""
    readers = [Reader(number, payer, payers[payer]) for number, payer in enumerate([*payers] * 6)]
    provider = BillingProvider(billing.honest, with_a_long_template, readers)

    async def script(port: int) -> None:
        await read_all(readers[:24], port, 24)
        await read_all(readers[24:], port, 24)

    rows = site(provider, script)
    first = [row for row in rows if row.tokens_charged > row.tokens]
    assert 0 < len(first) <= 24
    assert {row.pk for row in first} <= {row.pk for row in rows[:24]}
    assert all(row.tokens_charged - row.tokens <= 300 for row in first)
    assert provider.bills() <= charges(rows)
    limits = {"site": SITE, "anonymous": SITE // 5}
    for account, used in spent(database).items():
        missed = sum(row.tokens_charged - row.tokens for row in first if account in row.accounts)
        assert used <= limits.get(account, EACH) + missed, account


def test_an_honest_stop_pays_what_was_received(
    payers: Payers, site: Callable[..., list[Reservation]], database: str
) -> None:
    payer, headers = next(iter(payers.items()))
    readers = [
        Reader(number, payer, headers, leaves_after=after) for number, after in enumerate([TO_THE_END, 240, 320])
    ]
    provider = BillingProvider(billing.honest, openai, readers)
    whole, *stopped = site(provider, partial(read_all, readers, at_once=1), **KNOWN)
    assert whole.tokens_charged == provider.answers[0].bill
    for row, answer in zip(stopped, provider.answers[1:], strict=True):
        received = answer.prompt + answer.reader.seen
        assert received <= answer.bill <= row.tokens_charged <= 1.05 * received + IN_FLIGHT
    spent(database)


# A drained answer goes on unseen, and hears an operator all the same.


@pytest.mark.parametrize("how", ["pause", "stop"])
def test_a_drained_answer_hears_an_operator_within_a_renewal(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled, database: str, how: str
) -> None:
    """It was still open after 25 seconds."""
    lease = 1.5
    configure(ON_DISCONNECT="drain", LEASE_SECONDS=lease)
    upstream.replies(Reply.endless("word ", interval=0.01))
    with client.stream() as stream:
        stream.until("token")
    upstream.wait_for_pieces(upstream.pieces_sent + 20)
    assert not upstream.disconnects
    row = Reservation.objects.using(database).get()
    told = time.monotonic()
    if how == "pause":
        pause(database, "site")
    else:
        assert do(Stop(id=row.pk, day=row.day, accounts=row.accounts))
    assert upstream.wait_for_disconnect() - told < lease
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("stopped" if how == "stop" else "cancelled", "held")
    eventually(lambda: spent(database)["site"] == row.tokens_charged == row.tokens)


# Strangers at the door.


def test_three_addresses_take_a_fifth_of_the_day(
    payers: Payers, site: Callable[..., list[Reservation]], database: str
) -> None:
    """They took all of it in four seconds, with the largest profile that there is."""
    user, *_, one, two, three, _ = payers
    strangers = [
        Reader(number, payer, payers[payer], profile="expanded", seconds=0.03)
        for number, payer in enumerate([one, two, three] * 54, 1)
    ]
    reader = Reader(0, user, payers[user])
    provider = BillingProvider(billing.silent, gpt_oss, [reader, *strangers])

    async def script(port: int) -> None:
        await read_all(strangers, port, AT_A_TIME)
        await reader.read(port)

    rows = site(provider, script)
    used = spent(database)
    assert provider.bills() <= charges(rows)
    assert used["site"] - used[user] == used["anonymous"] <= SITE // 5
    assert {stranger.code for stranger in strangers} == {"", "daily_budget_exceeded"}
    assert reader.done


@on_sqlite
def test_a_thousand_addresses_hold_half_of_the_places(
    payers: Payers, site: Callable[..., list[Reservation]], database: str
) -> None:
    """Those of one IPv6 /54, a small provider's customer. They held all 2,000."""
    user = next(iter(payers))
    networks = [*ip_network("2a00:1450:4000::/54").subnets(new_prefix=64)][:1010]
    strangers = [
        Reader(number, "a stranger", {"x_forwarded_for": str(network[number])})
        for number, network in enumerate(networks, 1)
    ]
    users = [Reader(-number, user, payers[user]) for number in range(5)]

    async def play(answer: billing.Answer) -> None:
        if answer.reader.number <= 0:
            return await billing.honest(answer)
        await answer.head()
        await answer.write(4)
        return await answer.left()

    async def script(port: int) -> None:
        holding = asyncio.create_task(read_all(strangers[:10], port, at_once=10))
        await asyncio.gather(*(stranger.moved.wait() for stranger in strangers[:10]))
        await read_all([*strangers[10:], *users], port, at_once=60)
        holding.cancel()

    provider = BillingProvider(play, qwen, [*strangers, *users])
    lasting = {"GAP_SECONDS": 600, "MAX_STREAM_SECONDS": 600}  # the ten hold on however slowly the others are refused
    rows = site(provider, script, MAX_STREAMS_PER_PROCESS=20, SITE_DAILY_TOKEN_LIMIT=100_000, **lasting)
    assert Counter(row.payer == user for row in rows) == {False: 10, True: 5}
    assert {stranger.code for stranger in strangers[10:]} == {"overloaded"}
    assert all(reader.done for reader in users)
    spent(database)


# A million bytes of nothing.

MIB = 2**20
ROOM = MOST_BYTES_PER_TOKEN * (2048 - 400)  # bytes: what balanced has for a prompt
TOO_MUCH = {
    "dashes": ["-" * (MIB - 100)],
    "spaces": ["x" + " " * (MIB - 100)],
    "marks": ["a" + "\u0301\u0316" * (MIB // 4 - 100)],
    "grows when normalized": ["\ufdfa" * (MIB // 3 - 100)],
    "just above": ["-" * (ROOM + 1)],
    "many before it": ["-" * 900] * 999 + ["-" * (ROOM + 1)],
}
NO_CHAT = {
    "brackets": (b"[" * MIB, 400),
    "a deep turn": (b'{"messages": [' + b'{"a":' * (MIB // 6), 400),
    "half characters": (b'{"messages": "' + b"\\ud83d" * (MIB // 7) + b'"}', 400),
    "one byte too many": (b"-" * (MIB + 1), 413),
}


@pytest.fixture
def tokenized(database: str, upstream: FakeUpstream) -> Iterator[tuple[Client, list[str]]]:
    """A server of its own, and what its tokenizer is given, as Python's profiler sees it: nothing stands in for it."""
    seen: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is toktok.truncate.__code__:
            seen.append(frame.f_locals["text"])

    threading.setprofile(watch)
    with served(application) as server:
        client = Client(port_of(server))
        client.chat()
        assert "Hello!" in seen
        yield client, seen
    threading.setprofile(None)


def chat_of(turns: Sequence[str]) -> bytes:
    messages = [{"role": "user", "content": turn} for turn in turns]
    return json.dumps({"messages": messages}, ensure_ascii=False).encode()


@on_sqlite
def test_a_million_bytes_are_refused_and_no_token_is_counted(tokenized: tuple[Client, list[str]]) -> None:
    """They took 455 ms before any limit looked."""
    client, seen = tokenized
    rows = Reservation.objects.count()
    seen.clear()
    refusals = {name: client.chat(chat_of(turns)) for name, turns in TOO_MUCH.items()}
    assert {name: answer.json["code"] for name, answer in refusals.items()} == dict.fromkeys(
        TOO_MUCH, "request_too_large"
    )
    assert {name: client.chat(body).status for name, (body, _) in NO_CHAT.items()} == {
        name: status for name, (_, status) in NO_CHAT.items()
    }
    assert not any(seen)
    assert Reservation.objects.count() == rows


@on_sqlite
def test_of_a_long_history_only_what_may_fit_is_counted(tokenized: tuple[Client, list[str]]) -> None:
    """And once more for the bound that is held for it."""
    client, seen = tokenized
    seen.clear()
    answer = client.chat(chat_of(["-" * 50_000] * 20 + ["Hi"]))
    assert answer.data("usage")["droppedMessages"] == 19
    assert 50_000 < sum(map(len, seen)) < 2 * ROOM
