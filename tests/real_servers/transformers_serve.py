# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers[serving]==5.24.0", "torch"]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# ///
"""``transformers serve`` with a model of random weights that is made here and is called FOLDER: ``PORT FOLDER``."""

import os
import sys
from pathlib import Path

port, folder = sys.argv[1:]
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 8192

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
tokenizer.train_from_iterator(["tell me a long story", "the quick brown fox"], trainer)
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
fast.model_max_length = CONTEXT
fast.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}<s>assistant: "
fast.save_pretrained(folder)

config = LlamaConfig(
    vocab_size=len(fast),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=CONTEXT,
    bos_token_id=0,
    eos_token_id=None,  # it never stops by itself
    pad_token_id=1,
)
LlamaForCausalLM(config).save_pretrained(folder)

command = ["serve", folder, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
os.execv(Path(sys.executable).with_name("transformers"), ["transformers", *command])
