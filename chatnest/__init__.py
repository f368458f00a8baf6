"""A streaming AI chat endpoint for Django that cannot overspend.

The path of a request, in the order of the files to read:

    views      POST /api/chat: the body read, every failure answered in the wire's words
    accounts   who pays: user, address, site
    wires      what the client asked for
    policy     the operators' profile and account rows, in force
    limits     clamped by the code's HARD_CAPS, tightened by the request
    tokens     the most that the prompt can count
    batcher    the async door to the database: many requests, one transaction
    ledger     reserve: all budgets or none; later settle, once
    book       the rows of that transaction: locked in order, written once
    bulk       many rows in few statements, few statements in one round trip
    upstream   the provider: one call, retried only before its first byte
    connection HTTP/1.1 to it: kept alive, closed at once where an answer is left
    stream     its pieces to frames, heartbeats and deadlines, and one settlement however it ends

Beside the path: models, conf, errors, sse, threads, asgi, middleware, admin, checks, signals, audit, testing and
management/.
"""
