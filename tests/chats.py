"""A tokenizer and a chat template as those of Qwen 3.5."""

import json
from pathlib import Path

import tokenizers

# One split pattern, as published tokenizers have it: words, single digits, signs, line ends.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TURNS = """\
{#- Turns between special tokens. #}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""
# As Qwen 3.5 does it: what was reasoned is dropped but in answers to the last question, and these
# have an empty block where there was none.
REASONING = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- set content = m.content | trim -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.last -%}
      {%- set content = '<think>\\n' + thought.lstrip('\\n') + '\\n</think>\\n\\n' + content -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


def tokenizer_folder(folder: Path, template: str | None = None, **config) -> Path:
    """A byte-level tokenizer.json with the properties of Qwen 3.5's: NFC, no bos, two ends."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("w", "h"), ("Ġ", "i"), ("Ġi", "s"), ("u", "s"), ("e", "r"), ("us", "er")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>", "</think>"])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
