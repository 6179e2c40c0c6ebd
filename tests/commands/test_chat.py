"""Chat: a conversation in the training template, its limits, and the read-answer loop."""

import pytest
import yaml

from peftctl.commands import chat
from peftctl.commands.chat import ChatSession, open_session, repl
from peftctl.errors import UsageError
from peftctl.evaluation.generation import generate
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
    with pytest.raises(UsageError, match="takes context, question; chat fills in one field only"):
        open_session(str(run_directory(tmp_path, template="{context}\n{question}")))


def test_a_model_without_a_chat_template_continues_the_text(tmp_path):
    talk = open_session(str(save_tiny(tmp_path / "base", template=None)), max_new_tokens=12)
    assert talk.answer("Book a table") == plain_answer("Book a table")


def test_a_target_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no such directory"):
        open_session(str(tmp_path / "none"))
