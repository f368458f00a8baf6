# /// script
# requires-python = ">=3.11"
# dependencies = ["litellm[proxy]==1.108.7"]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# ///
"""LiteLLM's proxy, with answers and errors that it makes itself and before other servers: ``PORT KEY BEHIND DYING``.

``BEHIND`` and ``DYING`` are base URLs of servers with the same key, for the models of these names.
"""

import json
import os
import sys
import tempfile

port, key, behind, dying = sys.argv[1:]

MOCKS = {
    "mock": {"mock_response": "A gateway can answer by itself, in pieces of three letters."},
    "endless": {"mock_response": "word " * 2000},
    "context": {"mock_response": "litellm.ContextWindowExceededError"},
    "rate": {"mock_response": "litellm.RateLimitError"},
    "error": {"mock_response": "litellm.InternalServerError"},
    "timeout": {"mock_timeout": True, "timeout": 1.0},
}
SERVERS = {
    "behind": {"api_base": behind, "api_key": key},
    "behind-wrong-key": {"api_base": behind, "api_key": "sk-wrong"},
    "dying": {"api_base": dying, "api_key": key},
}
models = [
    {"model_name": name, "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "sk-unused", **params}}
    for name, params in (MOCKS | SERVERS).items()
]
config = {
    "model_list": models,
    "general_settings": {"master_key": key},
    "router_settings": {"num_retries": 0, "disable_cooldowns": True},
}

# Nothing is fetched from elsewhere, and the database of the tests is not LiteLLM's.
os.environ.pop("DATABASE_URL", None)
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", DISABLE_ADMIN_UI="True", HF_HUB_OFFLINE="1")

from litellm.proxy.proxy_cli import run_server

with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    json.dump(config, file)  # JSON is YAML
    file.flush()
    run_server(["--config", file.name, "--host", "127.0.0.1", "--port", port, "--telemetry", "False"])
