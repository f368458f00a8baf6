"""What the README's figures were measured with. Nothing here is a test; run it from the repository's root:

python -m tests.benchmarks.relay     chatnest's relay beside an Express and a FastAPI one, and a bare ASGI floor
python -m tests.benchmarks.ledger    reservations a second: group commit beside one transaction each

``processes``, ``crowd`` and ``upstream`` serve the tests of scale too.
"""
