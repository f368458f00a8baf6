"""The provider: an OpenAI-compatible server, called through the openai package, and what it really says.

``clients`` configures it, ``call`` is one request, ``answer`` reads what it said, ``events`` its bytes,
``failures`` what its refusals mean.
"""
