"""Vendors' own vocabularies, from wheels: what a provider that is not OpenAI may count a prompt with.

OpenAI's come from bpe-openai, which agreed with tiktoken on every one of two million texts. The others come from
splintr, which agreed with SentencePiece on Mistral's and with tiktoken on Llama 3's and Qwen's, on sixty thousand.
"""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import sentencepiece
import splintr

from chatnest.wires import Message

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it reads its files the old way
    import bpe_openai

    _OPENAI: Final = {name: bpe_openai.get_encoding(name) for name in ("o200k_base", "cl100k_base")}

UNIGRAM: Final = "unigram_nfkc"
VENDORS: Final = (
    "llama2", "llama3", "qwen3", "gemma3", "mistral_v1", "mistral_v3", "deepseek_v3", "glm4", "kimi_k2", "phi4",
    "olmo2", "gpt-oss", UNIGRAM,
)  # fmt: skip


def openai_count(text: str, encoding: str) -> int:
    return len(_OPENAI[encoding].encode_ordinary(text))


def count(vendor: str, text: str) -> int:
    """The tokens of a text that was typed: marks like ``<|im_end|>`` in it are text."""
    return len(_encode(vendor)(text))


def prompt_count(vendor: str, messages: Sequence[Message]) -> int:
    """The tokens of a conversation in the model's published chat template, marks counted as one each."""
    rendered = TEMPLATES[vendor](messages)
    return len(_vocabulary(vendor).encode_with_special(_normalized(vendor, rendered)))


def streamed(vendor: str, text: str) -> list[str]:
    """``text`` as a server streams it, a token at a time: a piece ends where a character does."""
    decoder = _vocabulary(vendor).streaming_decoder()
    pieces = [decoder.add_token(token) for token in _vocabulary(vendor).encode_ordinary(_normalized(vendor, text))]
    return [piece for piece in [*pieces, decoder.flush()] if piece]


@cache
def _encode(vendor: str) -> Callable[[str], Sequence[int]]:
    if vendor == UNIGRAM:
        return _unigram().encode
    ordinary = _vocabulary(vendor).encode_ordinary
    return lambda text: ordinary(_normalized(vendor, text))


def _normalized(vendor: str, text: str) -> str:
    return unicodedata.normalize("NFC", text) if vendor == "qwen3" else text  # Qwen's own tokenizer begins so


@cache
def _vocabulary(vendor: str) -> Any:
    return splintr.Tokenizer.from_pretrained(vendor)


@cache
def _unigram() -> Any:
    """SentencePiece's defaults, as T5, XGLM and many smaller models have them, and bytes for what it never saw."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "0123456789 hello world"] * 50),
        model_writer=model,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        byte_fallback=True,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _chatml(messages: Sequence[Message]) -> str:
    given = messages[0].role == "system"
    default = Message("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
    turns = messages if given else [default, *messages]
    return "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in turns) + "<|im_start|>assistant\n"


def _llama3(messages: Sequence[Message]) -> str:
    given = messages[0].content if messages[0].role == "system" else ""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    turns = [Message("system", dates + given), *(m for m in messages if m.role != "system")]
    said = "".join(f"<|start_header_id|>{m.role}<|end_header_id|>\n\n{m.content}<|eot_id|>" for m in turns)
    return f"<|begin_of_text|>{said}<|start_header_id|>assistant<|end_header_id|>\n\n"


def _llama2(messages: Sequence[Message]) -> str:
    system = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n" if messages[0].role == "system" else ""
    rendered = ""
    for message in messages:
        if message.role == "user":
            rendered += f"<s>[INST] {system}{message.content} [/INST]"
            system = ""
        elif message.role == "assistant":
            rendered += f" {message.content} </s>"
    return rendered


def _harmony(messages: Sequence[Message]) -> str:
    head = (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-11-25\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
    )
    roles = {
        "system": "developer<|message|># Instructions\n\n",
        "user": "user<|message|>",
        "assistant": "assistant<|channel|>final<|message|>",
    }
    return head + "".join(f"<|start|>{roles[m.role]}{m.content}<|end|>" for m in messages) + "<|start|>assistant"


def _gemma(messages: Sequence[Message]) -> str:
    system = f"{messages[0].content}\n\n" if messages[0].role == "system" else ""
    rendered = "<bos>"
    for message in messages:
        if message.role != "system":
            role = "model" if message.role == "assistant" else "user"
            rendered += f"<start_of_turn>{role}\n{system}{message.content}<end_of_turn>\n"
            system = ""
    return rendered + "<start_of_turn>model\n"


TEMPLATES: Final[dict[str, Callable[[Sequence[Message]], str]]] = {
    "qwen3": _chatml,
    "llama3": _llama3,
    "llama2": _llama2,
    "mistral_v1": _llama2,
    "gpt-oss": _harmony,
    "gemma3": _gemma,
}
