"""Go templates of the families of models that Ollama is given; which one a model needs, ollama.py finds by rendering.

Each stands for what the family's own chat template writes, as its publisher ships it with the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

_HEADER3 = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
_ANSWER3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_SYSTEM31 = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{{ .System }}<|eot_id|>"
)
_OTHERS31 = '{{ if eq .Role "system" }}{{ else }}' + _HEADER3 + "{{ end }}"
_STOP3 = ("<|eot_id|>", "<|eom_id|>")
FIRST = "(eq $i 1)"  # the first message after the system's
LAST = "(eq (len (slice $.Messages $i)) 1)"


@dataclass(frozen=True)
class Family:
    """How a family of models writes conversations.

    Args:
        name: Of the family.
        template: Go template, without a BOS that opens the whole text.
        stop: Texts at which an answer ends; the first is its end-of-turn token.
    """

    name: str
    template: str
    stop: tuple[str, ...]


def _turns(user: str, answer: str) -> str:
    """Return a template that writes user and assistant messages; a system message only where `user` does."""
    return (
        f'{{{{ range $i, $m := .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
    )


def _system(where: str, text: str) -> str:
    return f"{{{{ if and $.System {where} }}}}{text}{{{{ end }}}}"


_FIRST_SYSTEM = _system(FIRST, "{{ $.System }}\n\n")
_LAST_SYSTEM = _system(LAST, "{{ $.System }}\n\n")
_GEMMA_ANSWER = "<start_of_turn>model\n{{ .Content }}<end_of_turn>\n"
_INST_STOP = ("</s>", "[INST]")
# Families without a place for a system message come before those that differ by it alone.
FAMILIES = (
    Family(
        "chatml",
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ("<|im_end|>", "<|im_start|>"),
    ),
    Family("llama3", f"{{{{ range .Messages }}}}{_HEADER3}{{{{ end }}}}{_ANSWER3}", _STOP3),
    Family(
        "llama3.1",
        f"{_SYSTEM31}{{{{ range .Messages }}}}{_OTHERS31}{{{{ end }}}}{_ANSWER3}",
        _STOP3,
    ),
    Family(
        "llama2",
        _turns(
            "<s>[INST] " + _system(FIRST, "<<SYS>>\n{{ $.System }}\n<</SYS>>\n\n") + "{{ .Content }} [/INST]",
            " {{ .Content }} </s>",
        ),
        _INST_STOP,
    ),
    Family("mistral-v1", _turns("[INST] {{ .Content }} [/INST]", " {{ .Content }}</s>"), _INST_STOP),
    Family("mistral-v1-close", _turns("[INST] {{ .Content }} [/INST]", "{{ .Content }}</s>"), _INST_STOP),
    Family("mistral-v1-spaced", _turns("[INST] {{ .Content }} [/INST]", "{{ .Content }}</s> "), _INST_STOP),
    Family(
        "mistral-v2", _turns(f" [INST] {_FIRST_SYSTEM}{{{{ .Content }}}} [/INST]", " {{ .Content }}</s>"), _INST_STOP
    ),
    Family(
        "mistral-v3",
        _turns(f"[INST] {_LAST_SYSTEM}{{{{ .Content }}}}[/INST]", " {{ .Content }}</s>"),
        _INST_STOP,
    ),
    Family(
        "gemma",
        _turns("<start_of_turn>user\n{{ .Content }}<end_of_turn>\n", _GEMMA_ANSWER) + "<start_of_turn>model\n",
        ("<end_of_turn>", "<start_of_turn>"),
    ),
    Family(
        "gemma3",
        _turns(f"<start_of_turn>user\n{_FIRST_SYSTEM}{{{{ .Content }}}}<end_of_turn>\n", _GEMMA_ANSWER)
        + "<start_of_turn>model\n",
        ("<end_of_turn>", "<start_of_turn>"),
    ),
)
