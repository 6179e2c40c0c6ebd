"""Chat: a conversation in the training template, its limits, and the read-answer loop."""

import io
import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from peftctl import cli
from peftctl.artifacts.merge import merge
from peftctl.commands import chat
from peftctl.commands.chat import ChatSession, open_session, repl
from peftctl.errors import UsageError
from peftctl.evaluation.generation import generate
from tests.artifacts.helpers import lora_run
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


def session(**fields):
    return ChatSession(tiny_llama(), tiny_tokenizer(), **({"max_new_tokens": 12} | fields))


def expected_answer(messages, count=12):
    """The answer by the tokenizer's own chat template and plain generation."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    (ids,) = generate(tiny_llama(), tokenizer, [prompt], max_new_tokens=count, batch_size=1)
    return tokenizer.decode(ids, skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_conversation_is_remembered_and_reset():
    talk = session()
    first = talk.answer("Book a table")
    assert first == expected_answer([user("Book a table")]) and first
    second = talk.answer("for two")
    assert second == expected_answer([user("Book a table"), assistant(first), user("for two")])
    assert second != expected_answer([user("for two")])
    talk.reset()
    assert talk.answer("for two") == expected_answer([user("for two")])


def test_the_system_message_stays():
    talk = session(system="one word")
    system = {"role": "system", "content": "one word"}
    expected = expected_answer([system, user("tell")])
    assert talk.answer("tell") == expected != expected_answer([user("tell")])
    talk.reset()
    assert talk.answer("tell") == expected


def test_pieces_make_up_the_answer():
    talk = session()
    pieces = list(talk.stream("Book a table"))
    assert len(pieces) > 3 and "".join(pieces) == expected_answer([user("Book a table")])


def test_a_stopped_answer_is_remembered_as_far_as_it_came():
    talk = session()
    pieces = talk.stream("Book a table")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.answer("go on") == expected_answer([user("Book a table"), assistant(said), user("go on")])


def test_the_oldest_exchanges_make_room():
    talk, told = session(max_new_tokens=12), []
    talk.notify = told.append
    texts = ["people " * 120, "tell " * 120, "table " * 120]
    answers = []
    for text in texts:
        answers.append(talk.answer(text))
        assert not told
    last = talk.answer("two " * 100)
    assert told == ["the conversation is too long for 512 positions; its beginning was dropped"]
    kept = [part for i in (1, 2) for part in (user(texts[i]), assistant(answers[i]))]
    assert last == expected_answer([*kept, user("two " * 100)])
    assert len(talk.exchanges) == 3


def test_a_message_that_is_too_long_alone_costs_nothing():
    talk = session()
    first = talk.answer("Book a table")
    with pytest.raises(UsageError, match=r"this message has .* 512 positions; shorten it"):
        talk.answer("people " * 600)
    assert talk.answer("for two") == expected_answer([user("Book a table"), assistant(first), user("for two")])


@pytest.mark.parametrize("fields", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"system": "x", "frame": str}])
def test_settings_that_can_not_work(fields):
    with pytest.raises(UsageError):
        session(**fields)


# -- the loop ----------------------------------------------------------------------------------------------------


def run(lines, talk=None):
    """Feed lines (an exception is raised instead of returned) and return what was written after the greeting."""
    feed, written = iter(lines), []

    def read():
        line = next(feed, None)
        if isinstance(line, BaseException):
            raise line
        return line

    talk = talk or session()
    repl(talk, read, written.append)
    assert next(feed, "nothing left") == "nothing left"
    return "".join(written).partition("commands.\n")[2]


def test_answers_and_end_of_input():
    assert run([]) == ""
    assert run(["Book a table", "", "   "]) == expected_answer([user("Book a table")]) + "\n"


def test_reset_and_quit():
    answer = expected_answer([user("tell")])
    assert run(["tell", "/reset", "tell", "/quit"]) == f"{answer}\n(a new conversation)\n{answer}\n"


def test_help_and_unknown_commands():
    text = run(["/help", "/rest", "/quit"])
    assert all(command in text for command in chat.COMMANDS)
    assert "no command /rest; did you mean '/reset'?" in text
    assert run([" /etc/hosts"]) == expected_answer([user("/etc/hosts")]) + "\n"


def test_ctrl_c_stops_the_answer_and_not_the_program():
    talk, written = session(), []
    feed = iter(["Book a table", "tell"])

    def write(text):
        written.append(text)
        if len(written) == 3:  # the greeting, and two pieces of the first answer
            raise KeyboardInterrupt

    repl(talk, lambda: next(feed, None), write)
    said = written[1] + written[2]
    assert written[3] == " ...\n(stopped)\n"
    follow = expected_answer([user("Book a table"), assistant(said), user("tell")])
    assert "".join(written[4:]) == follow + "\n"


def test_ctrl_c_at_the_prompt_goes_on():
    assert run([KeyboardInterrupt(), "tell"]) == f"\n(/quit leaves)\n{expected_answer([user('tell')])}\n"


def test_known_errors_are_shown_and_the_talk_goes_on():
    text = run(["people " * 600, "tell"])
    assert text.startswith("error: this message has") and text.endswith(expected_answer([user("tell")]) + "\n")


def test_dropped_turns_are_told():
    text = run(["people " * 170, "tell " * 170, "table " * 170])
    assert "(the conversation is too long for 512 positions; its beginning was dropped)\n" in text


# -- targets -----------------------------------------------------------------------------------------------------


def run_directory(tmp_path, **data):
    """A finished run whose result is a whole model."""
    save_tiny(tmp_path / "model")
    content = {"model": {"name_or_path": "x"}, "data": {"train": "gone.jsonl"} | data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "model"


def plain_answer(prompt):
    tokenizer = tiny_tokenizer()
    (ids,) = generate(tiny_llama(), tokenizer, [tokenizer(prompt)["input_ids"]], max_new_tokens=12, batch_size=1)
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_open_a_model(tiny_dir):
    talk = open_session(str(tiny_dir), max_new_tokens=12)
    assert talk.answer("Book a table") == expected_answer([user("Book a table")])


def test_a_run_is_asked_in_its_own_template(tmp_path):
    target = run_directory(tmp_path, template="Q: {question}\nA: ")
    talk = open_session(str(target), max_new_tokens=12)
    expected = plain_answer("Q: tell me\nA: ")
    assert [talk.answer("tell me"), talk.answer("tell me")] == [expected, expected]  # each message stands alone


def test_alpaca(tmp_path):
    talk = open_session(str(run_directory(tmp_path, template="alpaca")), max_new_tokens=12)
    assert "### Instruction:\ntell me\n\n### Response:\n" in talk.frame("tell me")


def test_a_template_of_several_fields(tmp_path):
    with pytest.raises(UsageError, match="takes context, question; expected one field for a single request"):
        open_session(str(run_directory(tmp_path, template="{context}\n{question}")))


def test_a_model_without_a_chat_template_continues_the_text(tmp_path):
    talk = open_session(str(save_tiny(tmp_path / "base", template=None)), max_new_tokens=12)
    assert talk.answer("Book a table") == plain_answer("Book a table")


def test_a_target_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no such directory"):
        open_session(str(tmp_path / "none"))


def test_the_template_travels_with_an_adapter(tmp_path):
    run, _ = lora_run(tmp_path)
    alone = shutil.copytree(run.adapter, tmp_path / "elsewhere" / "copy")
    manifest = json.loads((alone / "peftctl.json").read_text())
    assert manifest["template"] == "chat"
    (alone / "peftctl.json").write_text(json.dumps(manifest | {"template": "alpaca"}))
    assert "### Response:\n" in open_session(str(alone)).frame("tell me")
    merge(str(alone), tmp_path / "merged")
    assert "### Response:\n" in open_session(str(tmp_path / "merged")).frame("tell me")


# -- several adapters --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one base; the second was trained in a plain template."""
    folder = tmp_path_factory.mktemp("voices")
    first, _ = lora_run(folder, std=0.3)
    second = shutil.copytree(first.path, folder / "other")
    file = second / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}, file)
    return str(first.path), str(second)


def framed(run, place, template):
    copy = shutil.copytree(run, place)
    file = copy / "adapter" / "peftctl.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"template": template}))
    return str(copy)


def alone(target, text):
    return open_session(target, max_new_tokens=12).answer(text)


def test_adapters_are_switched_in_place_and_the_conversation_stays(runs, monkeypatch):
    talk = open_session(runs, max_new_tokens=12)
    monkeypatch.setattr("peftctl.artifacts.load.load_model", None)  # nothing is loaded again
    text = run(["tell", "/use other", "/use", "/reset", "tell", "/use base", "/reset", "tell", "/quit"], talk)
    monkeypatch.undo()
    answers = [alone(target, "tell") for target in runs]
    assert answers[0] != answers[1]
    assert text == (
        "(answering: [run] other base; /use NAME switches)\n"
        f"run: {answers[0]}\n"
        "(answering: run [other] base; /use NAME switches)\n"
        "(answering: run [other] base; /use NAME switches)\n"
        f"(a new conversation)\nother: {answers[1]}\n"
        "(answering: run other [base]; /use NAME switches)\n"
        f"(a new conversation)\nbase: {expected_answer([user('tell')])}\n"
    )


def test_the_next_adapter_sees_what_was_said(runs):
    talk = open_session(runs, max_new_tokens=12)
    first = talk.answer("tell")
    talk.use("other")
    second = open_session(runs[1], max_new_tokens=12)
    second.exchanges.append((chat.Message("user", "tell"), chat.Message("assistant", first)))
    assert talk.answer("Book a table") == second.answer("Book a table")


def test_every_adapter_is_asked_in_its_own_template(runs, tmp_path):
    plain = framed(runs[1], tmp_path / "plain", "Q: {question}\nA: ")
    talk = open_session([runs[0], plain], max_new_tokens=12)
    talk.use(plain)  # by the target too
    assert talk.speaker == "plain" and talk.answer("tell") == alone(plain, "tell") != alone(runs[1], "tell")
    talk.use("run")
    assert talk.frame is None and talk.answer("tell") == alone(runs[0], "tell")
    with pytest.raises(UsageError, match="--system"):
        open_session([runs[0], plain], system="short")


def test_one_prompt_goes_to_each_adapter(runs):
    written = []
    chat.answer_once(open_session(runs, max_new_tokens=12), "tell", written.append)
    assert "".join(written) == f"run: {alone(runs[0], 'tell')}\nother: {alone(runs[1], 'tell')}\n"
    written.clear()
    chat.answer_once(session(), "tell", written.append)
    assert "".join(written) == expected_answer([user("tell")]) + "\n"


def test_switching_to_what_is_not_there(runs):
    talk = open_session(runs, max_new_tokens=12)
    text = run(["/use othr", "/reset now", "tell"], talk).splitlines()
    assert text[1] == "(no adapter 'othr'; did you mean 'other'?)"
    assert text[2] == "(/reset takes nothing after it. A message may begin with / after a space)"
    assert talk.speaker == "run"
    assert run(["/use x"]) == "(there is one model; start with several adapters to switch: peftctl chat A B)\n"


def test_a_whole_model_among_several(runs, tiny_dir):
    with pytest.raises(UsageError, match="only adapters of one base can be loaded together"):
        open_session([runs[0], str(tiny_dir)])


def test_chat_of_two_runs_from_the_command_line(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("tell\n/use other\n/quit\n"))
    assert cli.run(["chat", *runs, "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    assert f"run: {alone(runs[0], 'tell')}\n" in shown and "run [other] base" in shown
