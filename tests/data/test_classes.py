"""Labelled texts and tagged words: classes found, tokens aligned, rows cut and refused."""

import pytest

from peftctl.data.cache import cache_file
from peftctl.data.classes import with_labels
from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all, fingerprint, overlap
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example, to_examples
from peftctl.data.pairs import encoder_of
from peftctl.data.preview import preview
from peftctl.data.sources import Row
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection, Source
from tests.tiny import tiny_tokenizer

WORDS = ["book", "a", "table", "at", "seven"]
TAGS = ["O", "O", "B-X", "O", "B-T"]


def framed_tokenizer():
    """The tiny tokenizer, with <|im_start|> before a text and <|im_end|> behind it, as BERT has [CLS] and [SEP]."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    plain = tiny_tokenizer()
    raw = plain.backend_tokenizer.__class__.from_str(plain.backend_tokenizer.to_str())
    ends = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    raw.post_processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )


def texts(*labels):
    return [Example(f"a.jsonl:{i}", text=f"text {i}", label=label) for i, label in enumerate(labels, 1)]


def section(fmt="labelled_text", **keys):
    return DataSection(train="a.jsonl", format=fmt, **keys)


def tagged(words=WORDS, tags=TAGS, where="a.jsonl:1"):
    return Example(where, tokens=list(words), tags=list(tags))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["pay", "book", "pay"], ["book", "pay"]),
        ([10, 9, 2], ["2", "9", "10"]),  # by value, not by letters
        (["10", "9"], ["9", "10"]),
        ([-1, 1, 0], ["-1", "0", "1"]),
        (["b", 3, "a"], ["3", "a", "b"]),
    ],
)
def test_labels_are_found_in_sorted_order(labels, expected):
    assert with_labels(section(), texts(*labels), []).labels == expected


def test_a_given_order_of_labels_is_kept():
    data = with_labels(section(labels=["pay", "book", "other"]), texts("book", "pay"), [])
    assert data.labels == ["pay", "book", "other"]
    row = encoder_of("seq_cls", tiny_tokenizer(), data).encode(texts("book")[0])[0]
    assert row.labels == [1]


def test_whole_numbers_count_into_given_names():
    data = with_labels(section("tokens_tags", labels=["O", "B-X", "B-T"]), [tagged(tags=[0, 0, 1, 0, 2])], [])
    row = encoder_of("token_cls", tiny_tokenizer(), data).encode(tagged(tags=[0, 0, 1, 0, 2]))[0]
    assert [label for label in row.labels if label >= 0] == [0, 0, 1, 0, 2]


@pytest.mark.parametrize("labels", [["book", "book"], [1, "1"]])
def test_one_single_label_is_an_error(labels):
    with pytest.raises(DataError, match=r"at least two classes, but all have '(book|1)'"):
        with_labels(section(), texts(*labels), [])


def test_an_unknown_held_out_label_names_row_label_and_known_ones():
    with pytest.raises(DataError, match=r"e.jsonl:4: label 'sing' is not one of book, pay"):
        with_labels(section(), texts("book", "pay"), [Example("e.jsonl:4", text="x", label="sing")])


def test_numbers_do_not_count_into_labels_that_were_found():
    with pytest.raises(DataError, match=r"e.jsonl:4: label 1 is not one of book, pay"):
        with_labels(section(), texts("book", "pay"), [Example("e.jsonl:4", text="x", label=1)])


@pytest.mark.parametrize("label", ["sing", 2, -1])
def test_a_label_outside_the_given_ones_is_an_error(label):
    with pytest.raises(DataError, match=rf"a.jsonl:3: label {label!r} is not one of book, pay.*data.labels"):
        with_labels(section(labels=["book", "pay"]), texts("book", "pay", label), [])


def test_a_row_without_label_is_an_error():
    rows = [Row({"text": "hello"}, "a.jsonl:1")]
    with pytest.raises(DataError, match=r"a.jsonl:1: field 'label' is missing"):
        to_examples(rows, section())
    with pytest.raises(DataError, match=r"field 'label': expected text or a whole number, got null"):
        to_examples([Row({"text": "hello", "label": None}, "a.jsonl:1")], section())


def test_tags_of_another_length_are_an_error():
    rows = [Row({"tokens": WORDS, "tags": ["O"]}, "a.jsonl:1")]
    with pytest.raises(DataError, match="as many tags as tokens, got 5 tokens and 1 tags"):
        to_examples(rows, section("tokens_tags"))


@pytest.mark.parametrize(("task", "fmt"), [("seq_cls", "tokens_tags"), ("token_cls", "messages")])
def test_another_tasks_format_is_an_error(task, fmt):
    with pytest.raises(DataError, match=rf"data.format: {fmt} does not fit model.task {task}"):
        encoder_of(task, tiny_tokenizer(), section(fmt, labels=["a", "b"]))


def test_without_labels_there_is_nothing_to_encode_to():
    with pytest.raises(DataError, match=r"data\.labels"):
        encoder_of("seq_cls", tiny_tokenizer(), section())


def test_a_text_has_its_class_alone_and_keeps_its_closing_token():
    tokenizer = framed_tokenizer()
    example = Example("a.jsonl:1", text="book a table at seven", label="pay")
    data = section(labels=["book", "pay"])
    whole = encoder_of("seq_cls", tokenizer, data).encode(example)[0]
    assert whole.input_ids == tokenizer("book a table at seven")["input_ids"]
    assert (whole.labels, whole.supervised, whole.truncated, whole.prompt_cut) == ([1], 1, False, False)
    cut = encoder_of("seq_cls", tokenizer, data.model_copy(update={"max_length": 4})).encode(example)[0]
    assert cut.input_ids == [*whole.input_ids[:3], 2]
    assert (cut.labels, cut.prompt_cut, cut.truncated) == ([1], True, False)


@pytest.mark.parametrize(("text", "length", "reason"), [(" \n", 9, "empty text"), ("hello", 2, "no room for text")])
def test_a_text_without_tokens_is_dropped(text, length, reason):
    data = section(labels=["a", "b"], max_length=length)
    row = encoder_of("seq_cls", framed_tokenizer(), data).encode(Example("a:1", text=text, label="a"))[0]
    assert row.dropped_reason is not None and row.dropped_reason.startswith(reason)


def test_tags_stand_at_the_first_piece_of_every_word():
    tokenizer = framed_tokenizer()
    data = section("tokens_tags", labels=["O", "B-X", "B-T"])
    words = ["tables", "allergyday", "é", "", "x"]
    row = encoder_of("token_cls", tokenizer, data).encode(tagged(words, ["O", "B-X", "B-T", "O", "B-X"]))[0]
    ids, labels = [1], [-100]
    for i, (word, label) in enumerate(zip(words, [0, 1, 2, -100, 1], strict=True)):
        pieces = tokenizer(" " * bool(i) + word, add_special_tokens=False)["input_ids"]
        # The space before a word may be a token of its own, and the empty word is nothing else.
        first = next((j for j, piece in enumerate(pieces) if tokenizer.decode([piece]).strip()), None)
        ids += pieces
        labels += [label if j == first else -100 for j in range(len(pieces))]
    assert any(len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 1 for word in words)
    assert [label for label in row.labels if label >= 0] == [0, 1, 2, 1]
    assert row.labels[0] == row.labels[-1] == -100
    assert len(row.labels) == len(row.input_ids)
    assert (row.input_ids, row.labels) == ([*ids, 2], [*labels, -100])


def test_the_alignment_is_that_of_word_ids_for_a_tokenizer_of_word_pieces():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "book", "##ing", "a", "table", "##s", "'", ",", "new", "york"]
    raw = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    words = ["Booking", "a", "table's", ",", "xyz", "New", "York"]
    labels = [str(i) for i in range(len(words))]
    data = section("tokens_tags", labels=labels)
    row = encoder_of("token_cls", tokenizer, data).encode(tagged(words, labels))[0]
    encoded = tokenizer(words, is_split_into_words=True)
    ids = encoded.word_ids()
    expected = [w if w is not None and w != ids[i - 1] else -100 for i, w in enumerate(ids)]
    assert (row.input_ids, row.labels) == (encoded["input_ids"], expected)


def test_words_that_do_not_fit_count_as_truncated():
    tokenizer = framed_tokenizer()
    data = section("tokens_tags", labels=["O", "B-X", "B-T"], max_length=5)
    row = encoder_of("token_cls", tokenizer, data).encode(tagged())[0]
    assert row.truncated and len(row.input_ids) == len(row.labels) == 5
    assert (row.input_ids[-1], row.labels[-1]) == (2, -100)
    whole = encoder_of("token_cls", tokenizer, data.model_copy(update={"max_length": 99})).encode(tagged())[0]
    assert (row.input_ids[:4], row.labels[:4]) == (whole.input_ids[:4], whole.labels[:4])
    assert not whole.truncated and whole.supervised == len(WORDS)


def test_a_row_without_words_is_dropped():
    data = section("tokens_tags", labels=["O", "B"])
    assert encoder_of("token_cls", framed_tokenizer(), data).encode(tagged([], []))[0].dropped_reason == "no words"


def test_a_slow_tokenizer_is_refused_for_tags():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="token_cls needs a fast tokenizer"):
        encoder_of("token_cls", Slow(), section("tokens_tags", labels=["O", "B"]))


def test_the_first_token_of_a_row_can_carry_a_class():
    row = EncodedRow([5, 6], [0, 1], "a:1", classes=True)
    assert (row.supervised, row.tokens) == (2, 2)
    assert EncodedRow([5, 6], [0, 1], "a:1").supervised == 1


def test_batches_pad_classes_apart():
    rows = [EncodedRow([5, 6, 7], [1], "a:1", classes=True), EncodedRow([5], [0], "a:2", classes=True)]
    batch = Collator(tiny_tokenizer())(rows)
    assert batch["labels"].tolist() == [[1], [0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    tags = [EncodedRow([5, 6, 7], [1, -100, 0], "a:1", classes=True), EncodedRow([5], [0], "a:2", classes=True)]
    assert Collator(tiny_tokenizer(), 4)(tags)["labels"].tolist() == [[1, -100, 0, -100], [0, -100, -100, -100]]


def test_the_report_counts_classes_and_says_nothing_of_end_tokens():
    data = with_labels(section(labels=["a", "b", "c"], max_dropped=0.5), texts("a", "b", "a"), [])
    examples = [*texts("a", "b", "a"), Example("a.jsonl:4", text="", label="b")]
    rows, report = encode_all(examples, tiny_tokenizer(), data, task="seq_cls")
    assert len(rows) == 3 and report.classes == {"a": 2, "b": 1, "c": 0}
    assert ["labels", "3 (a 2, b 1, c 0)"] in report.lines()
    assert not any("end token" in name or "trained on" in name for name, _ in report.lines())
    warnings = list(report.warnings())
    assert any("dropped (empty text)" in line for line in warnings)
    assert any("no row has the label c" in line for line in warnings)
    assert not any("end token" in line for line in warnings)


def test_a_cache_returns_the_same_rows_and_none_for_other_labels(tmp_path):
    tokenizer = framed_tokenizer()
    data = section("tokens_tags", labels=["O", "B-X", "B-T"])
    fresh, _ = encode_all([tagged()], tokenizer, data, tmp_path, "token_cls")
    again, _ = encode_all([tagged()], tokenizer, data, tmp_path, "token_cls")
    assert fresh == again and again[0].classes
    file = cache_file(tmp_path, [tagged()], tokenizer, data, "token_cls")
    assert file.is_file()
    assert file != cache_file(tmp_path, [tagged(tags=["O"] * 5)], tokenizer, data, "token_cls")
    swapped = data.model_copy(update={"labels": ["B-X", "O", "B-T"]})
    assert file != cache_file(tmp_path, [tagged()], tokenizer, swapped, "token_cls")
    other, _ = encode_all([tagged()], tokenizer, swapped, tmp_path, "token_cls")
    assert other[0].labels != fresh[0].labels and fingerprint(other) != fingerprint(fresh)


def test_a_row_overlaps_only_with_one_of_the_same_class():
    data = section(labels=["a", "b"])
    encoder = encoder_of("seq_cls", tiny_tokenizer(), data)
    rows = [encoder.encode(Example("x:1", text="hello", label=label))[0] for label in "ab"]
    assert overlap(rows[:1], rows) == 1


def test_sources_keep_their_classes():
    data = DataSection(
        sources=[Source(path="a.jsonl"), Source(path="b.jsonl")], format="labelled_text", labels=["a", "b"]
    )
    examples = [Example("a:1", text="x", label="a", source=0), Example("b:1", text="y", label="b", source=1)]
    rows, report = encode_all(examples, tiny_tokenizer(), data, task="seq_cls")
    assert [row.labels for row in rows] == [[0], [1]]
    assert [source.supervised_tokens for source in report.sources] == [1, 1]


def test_previews_show_the_class():
    tokenizer = framed_tokenizer()
    text = encoder_of("seq_cls", tokenizer, section(labels=["a", "b"])).encode(Example("x:1", text="hi you", label="b"))
    assert preview(text[0], tokenizer, ["a", "b"]) == [("<|im_start|>hi you<|im_end|>\n", False), ("b", True)]
    data = section("tokens_tags", labels=["O", "B"])
    words = encoder_of("token_cls", tokenizer, data).encode(tagged(["a", "b"], ["O", "B"]))
    pieces = preview(words[0], tokenizer, ["O", "B"])
    assert "".join(text for text, _ in pieces) == "<|im_start|>a b<|im_end|>"
    assert [text for text, supervised in pieces if supervised] == ["a", "b"]
