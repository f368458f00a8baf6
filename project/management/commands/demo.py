from __future__ import annotations

import errno
import secrets
import signal
import socket
from contextlib import ExitStack, suppress
from typing import Any

import uvicorn
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from chatnest.models import Account
from project.offline import OfflineModel

OPERATOR = "operator"
READER_LIMIT = 3_000
TEXT = """
chatnest is running. Ctrl-C stops it.

  Chat page  {site}/
  Admin      {site}/admin/
  Log in as  {logins}
  Model      {model}

{advice}
"""
OFFLINE = "the built-in offline model (not an AI: it gives one and the same short answer)"
OFFLINE_ADVICE = """\
To reach a real model, stop this, set two variables (in the environment, or in .env beside manage.py),
and start it again:

  OPENAI_API_KEY   the key your provider gave you
  OPENAI_BASE_URL  the provider's address, such as https://api.openai.com/v1 (OpenAI's is the default)"""
REAL_ADVICE = """\
Each profile names the model it asks for: see Profiles in the admin."""


class Command(BaseCommand):
    requires_system_checks = ()  # "no key is set" is what the demo itself is about to explain
    help = "Try chatnest on this machine: makes the database and an operator, then serves the site."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
        parser.add_argument("--port", default=8000, type=int, help="port to listen on (default: %(default)s)")

    def handle(self, *args: Any, host: str, port: int, **options: Any) -> None:
        listener = listen(host, port)
        # A polite kill is a Ctrl-C: it must stop the offline model too, and is no reason for a traceback.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with listener, suppress(KeyboardInterrupt):
            self.run(listener)
        self.stdout.write("Stopped.")

    def run(self, listener: socket.socket) -> None:
        call_command("migrate", verbosity=0, interactive=False)
        logins = make_logins()
        # This thread is about to be the event loop's, which has no use for a database connection.
        connections.close_all()
        with ExitStack() as stack:
            model, advice = choose_model(stack)
            self.stdout.write(TEXT.format(site=address(listener), logins=logins, model=model, advice=advice))
            self.stdout.flush()
            serve(listener)


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else is done: if it is taken, nothing has been changed yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as exc:
        taken = isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
        reason = "it is taken" if taken else exc
        raise CommandError(f"Cannot listen on {host}, port {port}: {reason} (try another --port)") from exc


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_logins() -> str:
    """The operator and two who only chat; whoever was made by an earlier start is left as they are."""
    users = get_user_model()._default_manager
    if users.filter(username=OPERATOR).exists():
        reset = f"{'DEBUG=on ' if settings.DEBUG else ''}python manage.py changepassword {OPERATOR}"
        return f"{OPERATOR}, who exists already; to set a new password: {reset}"
    passwords = {name: secrets.token_urlsafe(12) for name in (OPERATOR, "writer", "reader")}
    users.create_superuser(OPERATOR, password=passwords[OPERATOR])
    users.create_user("writer", password=passwords["writer"])
    reader = users.create_user("reader", password=passwords["reader"])
    Account.objects.create(name=f"user:{reader.pk}", daily_token_limit=READER_LIMIT)
    whos = {
        OPERATOR: "has the admin",
        "writer": "only chats",
        "reader": f"only chats, with {READER_LIMIT:,} tokens a day",
    }
    lines = [f"{name}, password {passwords[name]} (shown only now): {who}" for name, who in whos.items()]
    return "\n             ".join(lines)


def choose_model(stack: ExitStack) -> tuple[str, str]:
    """Which model answers, and what to say about it; the offline one runs until the stack is closed."""
    chosen = settings.CHATNEST
    if chosen.get("OPENAI_API_KEY") or chosen.get("OPENAI_BASE_URL"):
        return chosen.get("OPENAI_BASE_URL") or "OpenAI", REAL_ADVICE
    offline = stack.enter_context(OfflineModel())
    settings.CHATNEST = {**chosen, "OPENAI_API_KEY": "offline", "OPENAI_BASE_URL": offline.url}
    return OFFLINE, OFFLINE_ADVICE


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends open answers as if their readers had left, so that each is settled and none is waited for."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


def serve(listener: socket.socket) -> None:
    config = uvicorn.Config(
        "project.asgi:application",
        lifespan="off",
        log_config=None,
        log_level="warning",
        # Nobody stands before the demo, so nobody may name another address than its own.
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    Server(config).run(sockets=[listener])
