"""The provider: an OpenAI-compatible server, called through the openai package, and what it really says.

``clients`` makes the package's client for each provider, over ``http``. ``call`` is one request, ``answer`` reads what
comes (``events`` its bytes, ``chunks`` one event), ``failures`` what went wrong.
"""
