"""Which Ollama template a tokenizer gets, and the small renderer of Go templates that decides it."""

import copy
import json

import pytest

from peftctl.artifacts.gotemplate import Template
from peftctl.artifacts.ollama import CONVERSATIONS, WITH_SYSTEM, choose, modelfile
from peftctl.artifacts.ollama_families import FAMILIES
from peftctl.data.templates import alpaca_prompt
from peftctl.errors import UsageError
from peftctl.models.aliases import is_fetched, resolve
from tests.data import styles
from tests.tiny import tiny_tokenizer

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
LLAMA31 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n'"
    " + 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' "
    "+ system + '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_V2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.first and system is defined %}{{ ' [INST] ' + system + '\n\n' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# They differ from a known family by one character: in the second turn, and in the frame of the system message.
NEARLY_CHATML = styles.CHATML.replace("'<|im_end|>\n'", "('<|im_end|> \n' if loop.index > 1 else '<|im_end|>\n')")
NEARLY_LLAMA2 = styles.LLAMA2.replace("<<SYS>>\n", "<<SYS>> ")

FAMILY = {
    "chatml": styles.CHATML,
    "llama3": styles.LLAMA3,
    "llama3.1": LLAMA31,
    "llama2": styles.LLAMA2,
    "mistral-v1": styles.MISTRAL_V1,
    "mistral-v2": MISTRAL_V2,
    "mistral-v3": styles.MISTRAL_V3,
    "gemma": styles.GEMMA,
    "gemma3": GEMMA3,
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>", "mistral-v1": "</s>", "gemma": "<end_of_turn>"}


def tokenizer_with(template, bos="<s>", eos="</s>"):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    return tokenizer


@pytest.mark.parametrize("make", [styles.byte_level, styles.metaspace])
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_of_a_template_is_found_and_renders_the_same(name, make):
    template = FAMILY[name]
    tokenizer = make(template) if template in styles.SPECIALS else tokenizer_with(template)
    choice = choose(tokenizer, "chat", "x")
    assert choice.family == name
    assert choice.stop[0] == END.get(name, choice.stop[0])
    refuses = any("refuses system messages" in line for line in choice.notices)
    assert refuses == (name in ("mistral-v1", "gemma"))
    for messages in CONVERSATIONS if refuses else (*CONVERSATIONS, *WITH_SYSTEM):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert Template(choice.template).render(messages) == text


def test_every_family_has_a_test():
    assert {family.name for family in FAMILIES} - FAMILY.keys() == {"mistral-v1-close", "mistral-v1-spaced"}


@pytest.mark.parametrize(
    ("answer", "family"),
    [("m.content + eos_token", "mistral-v1-close"), ("m.content + eos_token + ' '", "mistral-v1-spaced")],
)
def test_early_spellings_of_mistral(answer, family):
    template = styles.MISTRAL_V1.replace("' ' + m.content + eos_token", answer)
    assert choose(tokenizer_with(template), "chat", "x").family == family


def test_a_system_message_that_the_template_inserts_becomes_system():
    choice = choose(styles.byte_level(styles.CHATML_DEFAULT_SYSTEM), "chat", "x")
    assert (choice.family, choice.system) == ("chatml", "help")
    assert 'SYSTEM """help"""\n' in modelfile(choice, context=None, adapter=False, license=None)


def test_a_bos_before_chatml_is_written_and_one_that_opens_a_turn_is_not_doubled():
    assert choose(tokenizer_with("{{ bos_token }}" + styles.CHATML), "chat", "x").template.startswith("<s>{{ range")
    assert choose(tokenizer_with(styles.CHATML, bos="<|im_start|>"), "chat", "x").template.startswith("{{ range")


@pytest.mark.parametrize(
    ("template", "nearest", "place"),
    [
        (NEARLY_CHATML, "chatml", "a conversation of user, assistant, user"),
        (NEARLY_LLAMA2, "llama2", "a conversation of system, user, character 17"),
        (styles.R1, "chatml", "a conversation of user, character 9"),
        (styles.CHATML_BARE, "chatml", "expected '|im_end|>\\n', it writes '|im_end|>\\n<|im_start|>assistant\\n'"),
    ],
)
def test_a_template_that_no_family_writes_is_refused_with_the_first_difference(template, nearest, place):
    tokenizer = styles.byte_level(template) if template == styles.R1 else tokenizer_with(template)
    with pytest.raises(UsageError) as refused:
        choose(tokenizer, "chat", "runs/x")
    message = str(refused.value)
    assert message.startswith("runs/x: no known template") and "\n" not in message
    assert f"the nearest, {nearest}, differs" in message and place in message


def test_a_template_that_refuses_some_system_messages_only_is_refused():
    template = "{% if messages | length > 2 and messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(UsageError, match="its chat template refuses a conversation of system, user, assistant"):
        choose(tokenizer_with(template + styles.CHATML), "chat", "x")


@pytest.mark.skipif(not is_fetched("smollm2-135m"), reason="the demo model is not fetched")
def test_smollm2():
    from transformers import AutoTokenizer

    choice = choose(AutoTokenizer.from_pretrained(resolve("smollm2-135m")), "chat", "x")
    assert choice.family == "chatml" and choice.stop[0] == "<|im_end|>"
    assert choice.system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(("template", "expected"), [("alpaca", alpaca_prompt("c")), ("Q: {prompt}\nA:", "Q: c\nA:")])
def test_a_plain_template_frames_the_last_request_alone(template, expected, adds_bos):
    tokenizer = copy.deepcopy(styles.metaspace(styles.LLAMA2, adds_bos=adds_bos))
    choice = choose(tokenizer, template, "x")
    assert choice.family == "plain" and choice.bos == adds_bos and choice.stop == ("</s>",)
    assert Template(choice.template).render(ASKED) == expected
    assert "earlier messages are left out" in choice.notices[0]


def test_a_model_without_chat_template_takes_the_request_as_it_is():
    tokenizer = tokenizer_with(None)
    assert Template(choose(tokenizer, "chat", "x").template).render(ASKED) == "c"


@pytest.mark.parametrize(
    ("template", "message"),
    [("{a}: {b}", "takes a, b; expected one field"), ("{{{{ {prompt}", "which a Modelfile can't hold")],
)
def test_plain_templates_that_can_not_be_written(template, message):
    with pytest.raises(UsageError, match=message):
        choose(tokenizer_with(None), template, "x")


def test_the_modelfile():
    choice = choose(tokenizer_with(styles.CHATML), "chat", "x")
    text = modelfile(choice, context=2048, adapter=True, license="apache-2.0")
    assert text == (
        "# ollama create NAME -f Modelfile\nFROM ./model\nADAPTER ./adapter\n"
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>"\n'
        'PARAMETER num_ctx 2048\nLICENSE """apache-2.0"""\n'
    )
    assert "ADAPTER" not in modelfile(choice, context=None, adapter=False, license=None)
    with pytest.raises(UsageError, match="which a Modelfile can't"):
        modelfile(choice, context=None, adapter=False, license='"""')


# -- the renderer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ .System }}|", "s|"),
        ("{{ range .Messages }}{{ .Role }}:{{ .Content }};{{ end }}", "system:s;user:a;assistant:b;user:c;"),
        ('{{ range .Messages }}{{ if eq .Role "user" }}U{{ else }}-{{ end }}{{ end }}', "-U-U"),
        (
            '{{ range .Messages }}{{ if eq .Role "user" }}U{{ else if eq .Role "assistant" }}A{{ end }}{{ end }}',
            "UAU",
        ),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Content }}{{ $.System }} {{ end }}", "0ss 1as 2bs 3cs "),
        (
            "{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ .Content }}{{ end }}{{ end }}",
            "c",
        ),
        ('{{ if and .System (eq .System "s") }}yes{{ end }}', "yes"),
        ('{{ if and .System (eq .System "t") }}yes{{ else }}no{{ end }}', "no"),
        ("{ one } brace", "{ one } brace"),
    ],
)
def test_what_is_rendered(text, expected):
    assert Template(text).render(ASKED, system="s") == expected


def test_a_system_message_of_the_conversation_wins_and_several_are_joined():
    own = [{"role": "system", "content": "x"}, *ASKED, {"role": "system", "content": "y"}]
    assert Template("{{ .System }}").render(own, system="s") == "x\n\ny"
    assert Template("{{ if .System }}yes{{ else }}no{{ end }}").render(ASKED) == "no"


@pytest.mark.parametrize(
    "text",
    [
        "{{ .Tools }}", "{{ json .Messages }}", "{{- .System }}", "{{.System}}", "{{ if .System }}x", "{{ end }}",
        "{{ range .Tools }}{{ end }}", "{{ with .System }}{{ end }}", "{{ .System | trim }}", "a {{ b", "{{ $x := 1 }}",
        "{{ eq .Role (len }}", "{{ else }}", "{{ range .Messages }}{{ else }}{{ end }}",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(text):
    with pytest.raises(ValueError):
        Template(text)


def test_content_is_never_read_as_a_template():
    message = [{"role": "user", "content": "{{ .System }} {{ end }}"}]
    text = "{{ range .Messages }}{{ .Content }}{{ end }}"
    assert Template(text).render(message, system="s") == "s" + json.loads(json.dumps(message[0]["content"]))
