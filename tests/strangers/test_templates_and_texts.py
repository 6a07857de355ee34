"""Templates, rows and texts of strangers: bounded, and shown as text."""

import gzip
import json
import logging

import pytest
from transformers import AutoTokenizer

from posttrain.cli import main
from posttrain.console import say_json
from posttrain.data import sources
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.processing import load_processing_class
from posttrain.data.rendering import bounds
from posttrain.data.sources import read_rows
from posttrain.data.tokens import render
from posttrain.errors import DataError
from posttrain.log import get_logger
from posttrain.tables import format_table
from posttrain.visible import one_line, visible

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text of loops": "{% for a in range(99999) %}{% for b in range(99999) %}yyyyyyy{% endfor %}{% endfor %}",
    "power": "{{ messages|length ** 0 + 99999 ** 99999 ** 9 }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "product": "{{ 'x' * 10**10 }}",
    "width": "{{ '%*d' % (2 * 10**9, 1) }}",
    "padding": "{{ 'a'|center(10**10) }}",
    "long text": "{{ 'x' * (2 * 1024 * 1024) }}",
}
BROKEN = (
    "{{ unclosed",
    "{{ raise_exception('no') }}",
    "{{ messages.__class__.__mro__[1].x.y }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)
TURNS = [{"role": "user", "content": "hi"}]


@pytest.fixture
def chat(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_a_sentence_and_the_process_goes_on(chat, monkeypatch, name):
    monkeypatch.setattr(bounds, "SECONDS", 0.2)
    chat.chat_template = ENDLESS[name]
    with pytest.raises(DataError, match="chat template (did not come to an end|asks for more than 1 GiB|made a text)"):
        render(TURNS, {}, chat, "row 1")
    chat.chat_template = "{{ messages[0].content }}"
    assert render(TURNS, {}, chat, "row 1") == chat("hi")["input_ids"]


@pytest.mark.parametrize(
    "template", ["{{ ('a ' * 999999)|wordwrap(1)|urlize }}", "{{ ('a' * 500000).rfind('ab' + 'a' * 300000) }}"]
)
def test_what_no_alarm_interrupts_is_given_no_long_texts(chat, template):
    chat.chat_template = template
    with pytest.raises(DataError, match="chat template (gives its filter wordwrap|looks for a text of 300,002)"):
        render(TURNS, {}, chat, "row 1")


def test_a_template_that_is_endless_as_it_is_compiled_takes_its_time_once(chat, monkeypatch):
    chat.chat_template = ENDLESS["power"].replace("9 }}", "8 }}")
    monkeypatch.setattr(bounds, "SECONDS", 0.2)
    with pytest.raises(DataError, match="chat template"):
        render(TURNS, {}, chat, "row 1")
    monkeypatch.setattr(bounds, "bounded", None)
    with pytest.raises(DataError, match="chat template"):
        render(TURNS, {}, chat, "row 1")


def test_a_text_may_be_as_long_as_what_is_rendered(chat, monkeypatch):
    monkeypatch.setattr(bounds, "MARGIN", 50)
    chat.chat_template = "{{ messages[0].content * 90 }}"
    assert len(render([{"role": "user", "content": "ab" * 50}], {}, chat, "row 1")) == 9000
    chat.chat_template = "{{ messages[0].content * 900 }}"
    with pytest.raises(DataError, match="made a text of 90,000 characters of a row of"):
        render([{"role": "user", "content": "ab" * 50}], {}, chat, "row 1")


@pytest.mark.parametrize(
    "most, message",
    [
        ({"ALL_SECONDS": -1.0, "SECONDS_EACH": 0.0, "SECONDS_CHARACTER": 0.0}, "took 0 s for 1 texts"),
        ({"ALL_CHARACTERS": 500, "CHARACTERS_EACH": 0, "TIMES_ALL": 0}, r"made \d+ characters of [\d,]+ in \d+ texts"),
    ],
)
def test_all_texts_of_a_template_are_bounded_together(chat, monkeypatch, most, message):
    for name, value in most.items():
        monkeypatch.setattr(bounds, name, value)
    # of this case alone: what a template took is counted for the whole process
    chat.chat_template = "{{ messages[0].content }}" + f"{{# {next(iter(most))} #}}"
    with pytest.raises(DataError, match=message):
        for _ in range(6):
            render([{"role": "user", "content": "x" * 100}], {}, chat, "row 1")


@pytest.mark.parametrize("template", BROKEN)
def test_a_broken_template_is_a_sentence(chat, template):
    chat.chat_template = template
    with pytest.raises(DataError, match="row 1: the row cannot be turned into tokens"):
        render(TURNS, {}, chat, "row 1")


def test_an_alarm_of_the_callers_own_rings_after_a_template(chat):
    import signal

    def mine(*_):
        raise AssertionError("no template of this test takes so long")

    before = signal.signal(signal.SIGALRM, mine)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        chat.chat_template = "{{ messages[0].content }}"
        render(TURNS, {}, chat, "row 1")
        assert signal.getsignal(signal.SIGALRM) is mine and signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_a_template_says_is_shown_as_text_on_one_line(chat):
    chat.chat_template = r"{{ raise_exception('\x1b[2Jno\nposttrain: all is well') }}"
    with pytest.raises(DataError) as caught:
        render(TURNS, {}, chat, "row 1")
    assert r"\x1b[2Jno\nposttrain: all is well" in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_template_file_of_many_megabytes_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "LONGEST_TEMPLATE", 100)
    (tmp_path / "chat_template.jinja").write_text("x" * 101)
    with pytest.raises(DataError, match="is no chat template"):
        load_processing_class(str(tmp_path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("content", [b"x" * 300, b"\xff" * 300])
def test_a_line_without_an_end_is_refused_by_its_number(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(sources, "LONGEST_LINE", 100)
    line = json.dumps({"prompt": "a"}).encode() + b"\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(line + content) if name.endswith("gz") else line + content)
    with pytest.raises(DataError, match=f"{name}, line 2: (longer than|not UTF-8)"):
        read_rows(str(path))


@pytest.mark.parametrize("text", ['["' + "x" * 100 + '"]', "[[],[],[],[],{}]"])
def test_a_json_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "LONGEST_JSON", 100)
    monkeypatch.setattr(sources, "MOST_OBJECTS", 5)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="rows.json has more than .* on each line of a .jsonl file"):
        read_rows(str(tmp_path / "rows.json"))


def test_a_name_of_a_column_forges_no_line(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"a\nposttrain: all is well": 1, "b\x1b[2J": "x"}) + "\n")
    assert main(["data", "inspect", str(rows)]) == 0
    with pytest.raises(DataError) as caught:
        load_preferences(str(rows))
    for text in (capsys.readouterr().out, str(caught.value)):
        assert r"a\nposttrain: all is well" in text and r"b\x1b[2J" in text and "\x1b" not in text


STEERING = "a\x1b[2J\x07\x00\x9b31m\u202egnp\u2066\u2028\ufeff\x7f\rb"


def test_what_steers_a_console_is_written_out_and_letters_are_not():
    shown = visible(STEERING)
    assert shown.isprintable() and shown.startswith(r"a\x1b[2J\x07\x00\x9b31m\u202egnp\u2066\u2028\ufeff\x7f\x0db")
    for text in ("héllo 你好 नमस्ते\n\tΩ", "می\u200cخواهم", "👩\u200d💻"):
        assert visible(text) == text
    assert one_line("a\nposttrain: fine\tx") == r"a\nposttrain: fine\tx"


def test_errors_notes_tables_and_json_show_control_characters_as_text(capsys):
    assert visible(STEERING) in str(DataError(f"{STEERING} is no row"))
    get_logger().warning("rows of %s", STEERING)
    say_json({"text": STEERING}, ensure_ascii=False)
    printed = capsys.readouterr()
    assert visible(STEERING) in printed.err
    assert json.loads(printed.out) == {"text": STEERING}
    for text in (printed.out, printed.err, format_table(("a", STEERING), [("x\ny", STEERING)])):
        assert not any(character in text for character in "\x1b\x07\x00\x9b\u202e\u2066\u2028\ufeff\x7f\r")


@pytest.mark.parametrize("value", [".*(q|v)_proj", "a|b|c", "a\\|b", "|", "a\nb|c", "x\\"])
def test_a_cell_of_a_table_stays_one_cell(value):
    import re

    row = format_table(("setting", "value"), [(value, value)]).splitlines()[2]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


def test_nothing_is_printed_past_the_console():
    import ast
    from pathlib import Path

    import posttrain

    root = Path(posttrain.__file__).parent
    bare = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        if path.name not in ("console.py", "models.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert bare == []


def test_the_table_of_completions_shows_control_characters_as_text(capsys):
    from trl.trainer import grpo_trainer

    from posttrain.trainers.policy_gradient.completion_log import printed_as_text

    upstream = grpo_trainer.print_prompt_completions_sample
    with printed_as_text():
        grpo_trainer.print_prompt_completions_sample(
            [[{"role": "user", "content": "p\x1b[2J"}]], ["c\x1b]0;title\x07\u202e"], {"r": [1.0]}, [0.5], 1
        )
    assert grpo_trainer.print_prompt_completions_sample is upstream
    printed = capsys.readouterr().out
    assert "\\x1b" in printed and not any(character in printed for character in "\x1b\x07\u202e")


def test_log_records_of_exceptions_hide_secrets(capsys):
    try:
        raise ValueError("401 for https://me:pw@host/x")
    except ValueError:
        get_logger().log(logging.WARNING, "no", exc_info=True)
    assert "https://***@host" in capsys.readouterr().err
