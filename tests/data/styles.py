"""Chat templates in the styles of well-known models, and tokenizers whose ids can be read off a list.

The vocabularies are written out: a token's id is its position in the list, so that tests can hold ids by hand.
"""

from __future__ import annotations

from functools import cache

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + (m.role if m.role != 'tool' else 'ipython') + '<|end_header_id|>\n\n' }}"
    '{% if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eom_id|>' }}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nhelp<|im_end|>\n' }}{% endif %}" + CHATML
)

# Knows no generation prompt.
CHATML_BARE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"

_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)

MISTRAL_V1 = (
    "{{ bos_token }}" + _ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)

# Tools stand before the last user message, and a system message is written only where the user spoke last.
MISTRAL_V3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools[0].name + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' + (m.tool_calls | tojson) + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _ALTERNATE
    + "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Takes the thoughts out of turns before the last question, and writes empty ones where the last answer has none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The generation prompt opens a thought, which written answers do not have.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# The last answer ends with a token of its own.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

# Has no special token at all.
NO_TOKENS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SPECIALS = {
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
    MISTRAL_V1: ["<s>", "</s>"],
    MISTRAL_V3: [
        "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
        "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    ],
    LLAMA2: ["<s>", "</s>"],
    GEMMA: ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    R1: ["<begin>", "<eos>", "<|User|>", "<|Assistant|>"],
    PHI3: ["<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
    ZEPHYR: ["<s>", "</s>"],
    HARMONY: ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
    NO_TOKENS: ["<s>", "</s>"],
}  # fmt: skip
BOS_EOS = {
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>"),
    MISTRAL_V1: ("<s>", "</s>"),
    MISTRAL_V3: ("<s>", "</s>"),
    LLAMA2: ("<s>", "</s>"),
    GEMMA: ("<bos>", "<eos>"),
    R1: ("<begin>", "<eos>"),
    PHI3: ("<s>", "<|endoftext|>"),
    ZEPHYR: ("<s>", "</s>"),
    HARMONY: (None, "<|return|>"),
    NO_TOKENS: ("<s>", "</s>"),
}
# The beginning of every vocabulary below: a token's id is its position here. Then come the same words behind a space
# (`user` is 4, ` user` is 22), the style's special tokens from 40 on in the order of `SPECIALS`, and letters or bytes.
FIRST = ["<unk>", "\n", "\n\n", " "]
WORDS = [
    "user", "assistant", "system", "model", "Hi", "Hello", "there", "How", "are", "you", "Fine", "thanks", "Bye",
    "help", "[INST]", "[/INST]", "<think>", "</think>",
]  # fmt: skip
FIRST_SPECIAL = len(FIRST) + 2 * len(WORDS)


@cache
def byte_level(template: str, *, trim_offsets: bool = False, adds_bos: bool = False):
    """Byte-level tokenizer that splits text as Llama 3's and Qwen's do; space is written Ġ, newline Ċ."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors

    splits = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s*[\r\n]+|\s+(?!\S)|\s+"), behavior="isolated")
    raw = Tokenizer(_unigram(template, "Ġ", "Ċ", sorted(pre_tokenizers.ByteLevel.alphabet())))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    if trim_offsets:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    return _wrapped(raw, template, adds_bos=adds_bos)


@cache
def metaspace(template: str, *, adds_bos: bool = False, legacy: bool = False):
    """SentencePiece-like tokenizer, as Mistral's and Gemma's; `legacy` begins every stretch of text with ▁."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    raw = Tokenizer(_unigram(template, "▁", "\n", [chr(code) for code in range(33, 127)]))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _wrapped(raw, template, adds_bos=adds_bos)


def _unigram(template: str, space: str, newline: str, letters: list[str]):
    """Whole words win: they score better than the letters that they are made of."""
    from tokenizers import models

    pieces = [piece.replace(" ", space).replace("\n", newline) for piece in [*FIRST, *WORDS, *(" " + w for w in WORDS)]]
    specials = _specials(template)
    rest = [letter for letter in letters if letter not in pieces]
    scored = [*((piece, -1.0) for piece in pieces), *((s, -1000.0) for s in specials), *((r, -5.0) for r in rest)]
    return models.Unigram([("<unk>", -100.0), *scored[1:]], unk_id=0)


def _specials(template: str) -> list[str]:
    return SPECIALS.get(template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def _wrapped(raw, template: str, *, adds_bos: bool):
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    bos, eos = BOS_EOS.get(template, ("<|endoftext|>", "<|im_end|>"))
    for token in _specials(template):
        raw.add_special_tokens([AddedToken(token, rstrip=template == PHI3, normalized=False, special=True)])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
