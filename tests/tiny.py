"""Tiny models and tokenizers made on the spot: no download, the same on every machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = """Book a table for two people at seven on Friday evening, please, and tell the waiter about my allergy.
{"action": "book", "when": {"day": "friday", "hour": 19}, "people": 2, "note": null}
user assistant system tool true false null 0 1 2 3 4 5 6 7 8 9 answer the question with one word or a number"""


@cache
def tiny_tokenizer(template: str | None = CHATML):
    """Byte-level BPE of 400 tokens; eos <|im_end|>, bos and unk <|endoftext|>, pad <|pad|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    raw.train_from_iterator([_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(seed: int = 0, tie: bool = True, dtype: str = "float32"):
    """Llama-like, 4 layers, d 32, 4 heads over 2 key-value heads, no biases, RMSNorm."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie, bos_token_id=0,
        eos_token_id=2, pad_token_id=3, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def tiny_opt(seed: int = 0):
    """OPT-like, 2 layers, d 32: biases, LayerNorm, learned positions."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=400, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=2, pad_token_id=3,
        init_std=0.2, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def tiny_bloom(seed: int = 0):
    """BLOOM-like, 2 layers, d 32: query, key and value in one layer, ALiBi, no positions."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=400, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2, pad_token_id=3,
        initializer_range=0.2,
    )  # fmt: skip
    return BloomForCausalLM(config).eval()


def tiny_t5(seed: int = 0):
    """T5-like (v1.1), 2 + 2 layers, d 32: gated GELU, relative positions, tied; the decoder starts from padding."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=True,
        eos_token_id=2, pad_token_id=3, decoder_start_token_id=3,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_bart(seed: int = 0):
    """BART-like, 2 + 2 layers, d 32: biases, 64 learned positions on either side; the decoder starts from EOS."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=400, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        dropout=0.0, init_std=0.2, bos_token_id=0, eos_token_id=2, pad_token_id=3, decoder_start_token_id=2,
        forced_eos_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def tiny_bert(seed: int = 0, kind: str = "BertModel", **config):
    """BERT-like, 2 layers, d 32: biases, LayerNorm, learned positions, a pooler; bidirectional.

    Args:
        seed: Of the weights.
        kind: The library's class, e.g. BertForSequenceClassification; the bare encoder as a checkpoint has it.
        config: Keys of the configuration on top, e.g. num_labels.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": 3, "initializer_range": 0.2,
    }  # fmt: skip
    return getattr(transformers, kind)(transformers.BertConfig(**{**shape, **config})).eval()


def save_tiny(path: Path, model=None, template: str | None = CHATML) -> Path:
    """Write a tiny model with its tokenizer in the hub's layout."""
    (tiny_llama() if model is None else model).save_pretrained(path)
    tiny_tokenizer(template).save_pretrained(path)
    return path
