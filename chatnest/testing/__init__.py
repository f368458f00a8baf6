"""For the tests of a site: a provider that says what a test scripts, and a ledger inside the test's transaction.

upstream    FakeUpstream, a real HTTP server on loopback, and its Replies
inline      inline_ledger, for a plain TestCase, and both together: ChatTestMixin, scripted_chat
fixtures    the same for pytest: ``chat_upstream``
guard       real_provider: without it, no test asks one
"""

from .guard import real_provider
from .inline import ChatTestMixin, inline_ledger, scripted_chat
from .upstream import CHUNK, SECRET, FakeUpstream, Piece, ReceivedRequest, Reply, Script

__all__ = [
    "CHUNK",
    "SECRET",
    "ChatTestMixin",
    "FakeUpstream",
    "Piece",
    "ReceivedRequest",
    "Reply",
    "Script",
    "inline_ledger",
    "real_provider",
    "scripted_chat",
]
