import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from posttrain import quiet
from posttrain.cli import main
from posttrain.cli.data import token_view
from posttrain.data.corruption import flip_preferences
from posttrain.data.pairs.loading import load_preferences

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"prompt": f"Is {i} even?", "chosen": " yes" if i % 2 == 0 else " no", "rejected": " maybe", "score": i}
    for i in range(20)
]


def write(path, rows):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def data(capsys, monkeypatch):
    """Runs `posttrain data ...` here, and gives the exit code and what was printed."""
    # it would silence the libraries for the tests that follow, too
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)
    datasets.disable_progress_bars()

    def run(*arguments):
        code = main(["data", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run
    datasets.enable_progress_bars()


def command(*arguments, cwd=ROOT, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "posttrain", "data", *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_are_shown_as_training_sees_them_and_nothing_else(source, tiny_folder, data, fresh):
    given = "inspect", source, "--model", tiny_folder
    if fresh:
        done = command(*given)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = data(*given)
    assert (code, err) == (0, "")
    assert out == (
        f"{source}: 20 rows; columns prompt, chosen, rejected, score\n"
        "format: standard preference (columns prompt, chosen and rejected, of texts)\n"
        "\n"
        "row 1, chosen: 15 tokens, 5 of them supervised, with the end of turn '<|im_end|>'\n"
        "Is 0 even?[ ][y][e][s][<|im_end|>]\n"
        "\n"
        "row 1, rejected: 17 tokens, 7 of them supervised, with the end of turn '<|im_end|>'\n"
        "Is 0 even?[ ][m][a][y][b][e][<|im_end|>]\n"
        "\n"
        "Supervised tokens are in brackets.\n"
        "The chat template renders earlier messages alike whatever follows: yes.\n"
        "Its marks of what the assistant says take in the end of the turn: yes.\n"
    )


def test_broken_data_is_answered_with_one_line_and_code_3(tmp_path, data):
    path = write(tmp_path / "pairs.jsonl", json.dumps(ROWS[0]) + '\n{"prompt": "x", \n')
    code, out, err = data("stats", path, "--model", "embedded:tiny")
    assert (code, out) == (3, "")
    assert re.fullmatch(rf"posttrain data: error: {re.escape(path)}, line 2, column \d+: broken JSON: .*\.\n", err)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "\ud800", "chosen": "a", "rejected": "b"}, {"prompt": "a", "completion": "\udfff"}, {"\ud800": 1}],
)
def test_half_a_character_is_answered_with_its_line(tmp_path, data, logged, row):
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(each) + "\n" for each in (ROWS[0], row)))
    said = f"{path}, line 2: '.*' is half of a surrogate pair, and no character"
    for verb in ("inspect", "stats"):
        code, out, err = data(verb, path, "--model", "embedded:tiny")
        assert (code, out) == (3, "") and re.match(f"posttrain data: error: {said}", err)
    assert data("inspect", path)[0] == 0 and re.search(f"{said}.* Training refuses it", logged.text)


def test_half_a_character_in_a_columns_name_is_no_traceback_of_flip(tmp_path, data):
    path = write(tmp_path / "rows.jsonl", json.dumps(ROWS[0] | {"\ud800": 1}) + "\n")
    code, out, err = data("flip", path, str(tmp_path / "out.jsonl"), "--rate", "0.5")
    assert code == 3 and "line 1: '\\ud800' is half of a surrogate pair" in err


def test_a_missing_action_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data"])
    assert caught.value.code == 2
    assert "ACTION" in capsys.readouterr().err


class TestInspect:
    @pytest.mark.parametrize(
        ("source", "shown"),
        [
            ("generated:arithmetic?n=3&operands=2-2", "gold: "),
            ("generated:modular_sum?n=3", "gold: "),
            ("gym:chain_sum?n=3", "gym_task: "),
            ("generated:reverse_list?n=3", "rejected: "),
        ],
    )
    def test_every_source_that_a_recipe_takes_is_inspected_and_measured(self, data, source, shown):
        code, out, _ = data("inspect", source)
        assert code == 0 and shown in out
        code, out, _ = data("stats", source, "--json")
        assert code == 0 and json.loads(out)["rows"] == 3

    def test_of_a_long_value_the_middle_is_left_out(self, tmp_path, data):
        path = write(tmp_path / "a.jsonl", [ROWS[0] | {"chosen": "a" * 50_000 + "b" * 50_000}])
        code, out, _ = data("inspect", path)
        assert code == 0 and len(out) < 4000
        assert f"{'a' * 1000}\n... 98000 characters left out ...\n{'b' * 1000}\n" in out

    def test_without_a_model_the_values_are_shown(self, source, data):
        code, out, _ = data("inspect", source, "--rows", 2)
        assert code == 0
        assert "row 2\n  prompt: Is 1 even?\n  chosen:  no\n  rejected:  maybe\n  score: 1\n" in out
        assert "row 3" not in out and "With --model MODEL" in out

    def test_messages_are_shown_a_turn_a_line(self, data):
        _, out, _ = data("inspect", "generated:reverse_list?n=2")
        assert "  prompt: \n    system: Reverse the list.\n    user: " in out

    def test_brackets_hold_what_is_supervised_and_nothing_else(self, data, tiny_folder):
        _, out, _ = data("inspect", "generated:reverse_list?n=3&seed=2", "--model", tiny_folder, "--rows", 3)
        rows = load_preferences("generated:reverse_list?n=3&seed=2")
        shown = re.findall(r"^row (\d), (chosen|rejected): .*\n((?:.*\n)*?)\n", out, re.M)
        assert len(shown) == 6
        for number, side, text in shown:
            row = rows[int(number) - 1]
            marked = "".join(re.findall(r"\[(.*?)\]", text))
            assert marked == row[side][0]["content"] + "<|im_end|>"
            plain = re.sub(r"\[.*?\]", "", text)
            assert row["prompt"][1]["content"] in plain and plain.endswith("<|im_start|>assistant\n\n")

    def test_json_holds_the_same(self, source, data, tiny_folder):
        report = json.loads(data("inspect", source, "--model", tiny_folder, "--json")[1])
        assert report["format"] == {
            "kind": "preference",
            "style": "standard",
            "why": "columns prompt, chosen and rejected, of texts",
        }
        chosen = report["examples"][0]
        assert (chosen["part"], chosen["tokens"], chosen["supervised"]) == ("chosen", 15, 5)
        assert "".join(piece["text"] for piece in chosen["pieces"]) == "Is 0 even? yes<|im_end|>"
        assert report["template"] == {"prefix_preserving": True, "stop_token_trained": True}
        assert json.loads(data("inspect", source, "--json")[1])["examples"] == [{"row": 1, "values": ROWS[0]}]

    @pytest.mark.parametrize(
        ("row", "kind", "shown"),
        [
            ({"prompt": "2+2=", "completion": "4"}, "standard prompt-completion", "2+2=[4][<|im_end|>]"),
            ({"text": "ab"}, "standard language modelling", "[a][b][<|im_end|>]"),
            ({"prompt": "ab"}, "standard prompt-only", "\nab\n"),
            (
                {"instruction": "Add.", "input": "", "output": "4"},
                "standard alpaca",
                "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n[4][<|im_end|>]",
            ),
            (
                {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
                "conversational sharegpt",
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Y][o][<|im_end|>]",
            ),
            ({"question": "Why?"}, "unknown", "question: Why?"),
        ],
    )
    def test_other_kinds_of_data_are_shown_too(self, tmp_path, data, tiny_folder, row, kind, shown):
        code, out, _ = data("inspect", write(tmp_path / "a.jsonl", [row]), "--model", tiny_folder)
        assert code == 0
        assert f"format: {kind} (" in out and shown in out

    def test_long_sequences_lose_their_middle_only_on_screen(self, tmp_path, data, tiny_folder):
        path = write(tmp_path / "a.jsonl", [{"prompt": "p" * 5000 + "!", "chosen": "a", "rejected": "b"}])
        _, out, _ = data("inspect", path, "--model", tiny_folder)
        assert "row 1, chosen: 5003 tokens" in out and "... 4403 tokens left out ..." in out
        assert "p![a][<|im_end|>]" in out and len(out) < 3000

    def test_letters_of_several_tokens_stay_whole(self, tmp_path, data, tiny_folder):
        path = write(tmp_path / "a.jsonl", [{"prompt": "Привет ", "chosen": "é日🙂", "rejected": "日"}])
        _, out, _ = data("inspect", path, "--model", tiny_folder)
        assert "Привет [é][日][🙂][<|im_end|>]" in out

    def test_text_cannot_steer_the_terminal(self, tmp_path, data, tiny_folder):
        path = write(tmp_path / "a.jsonl", [{"prompt": "\x1b[2J\u202e", "chosen": "a\x07\nb", "rejected": "[red]"}])
        for model in ([], ["--model", tiny_folder]):
            _, out, _ = data("inspect", path, *model)
            assert not set("\x1b\x07\u202e") & set(out)
            assert "\\x1b[2J\\u202e" in out
        assert "[a][\\x07][\\n][b]" in out and "[[][r][e][d][]]" in out

    def test_colours_are_for_terminals_that_want_them(self, source, data, tiny_folder, monkeypatch):
        monkeypatch.setattr(sys.stdout.__class__, "isatty", lambda self: True, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.delenv("NO_COLOR", raising=False)
        _, out, _ = data("inspect", source, "--model", tiny_folder)
        assert re.search(r"\x1b\[2mI.*\x1b\[32m \x1b\[0m\x1b\[1;92my\x1b\[0m\x1b\[32me\x1b\[0m", out)
        assert "Supervised tokens are green." in out
        monkeypatch.setenv("NO_COLOR", "1")
        _, out, _ = data("inspect", source, "--model", tiny_folder)
        assert "\x1b" not in out and "[ ][y][e][s][<|im_end|>]" in out


def test_a_space_that_depends_on_what_comes_before_is_kept():
    class Sentencepiece:
        words = {1: "\u2581Hello", 2: "\u2581wide", 3: "\u2581world"}

        def decode(self, ids, **kwargs):
            return "".join(self.words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    assert token_view.pieces([1, 2, 3], [0, 1, 1], Sentencepiece()) == [
        ("Hello", False),
        (" wide", True),
        (" world", True),
    ]


class TestStats:
    def test_roles_that_are_not_the_assistants_or_unknown_are_said(self, tmp_path, data):
        chosen, rejected = ([{"role": role, "content": text}] for role, text in (("user", "a"), ("assistant", "b")))
        row = {"prompt": [{"role": "use", "content": "q"}], "chosen": chosen, "rejected": rejected}
        path = write(tmp_path / "a.jsonl", [row, row])
        code, out, _ = data("stats", path)
        assert code == 0
        assert (
            f"2 of 2 pairs have an answer whose last message is not the assistant's (first: {path}, line 1). It is "
            "trained on all the same; mend its role."
        ) in out
        assert (
            "2 of 2 pairs have a message with another role than system, developer, user, assistant, tool (first: "
            f"{path}, line 1). A chat template may drop it; mend the role."
        ) in out

    def test_counts_lengths_and_advice(self, tmp_path, data, tiny_folder):
        rows = [*ROWS, ROWS[0] | {"rejected": " yes"}, ROWS[0] | {"chosen": ""}, ROWS[0] | {"prompt": "p" * 99}]
        path = write(tmp_path / "a.jsonl.gz", rows)
        code, out, _ = data("stats", path, "--model", tiny_folder, "--max-length", 99)
        assert code == 0
        assert "empty sides: 1 of 23 rows\nidentical sides: 1 of 23 rows" in out
        assert re.search(r"\| prompt +\| +10 \| +11 \| +99 \| +99 \|", out)
        assert "(first: " + path + ", line 22)" in out
        assert f"{path}: max_length 99 drops 1 of 23 rows, whose prompt alone is that long; max_length 100 keeps" in out
        assert "100.0% of the answers end with an end-of-turn token, mostly '<|im_end|>'" in out
        report = json.loads(data("stats", path, "--model", tiny_folder, "--max-length", 99, "--json")[1])
        assert (report["empty"], report["identical"], report["rows"]) == (1, 1, 23)
        assert report["lengths"]["prompt"] == {"50%": 10, "90%": 11, "99%": 99, "max": 99}
        assert report["report"]["lengths"]["dropped"] == 1 and report["report"]["lengths"]["keeps_99"] == 100

    def test_without_a_model_characters_are_counted(self, source, data):
        report = json.loads(data("stats", source, "--limit", 5, "--json")[1])
        assert report["unit"] == "characters" and report["rows"] == 5
        assert report["lengths"]["rejected"] == {"50%": 6, "90%": 6, "99%": 6, "max": 6}
        report = json.loads(data("stats", "generated:reverse_list?n=4", "--json")[1])
        assert report["lengths"]["prompt"]["50%"] > len("Reverse the list.")

    def test_kinds_that_are_no_pairs_are_measured(self, tmp_path, data, tiny_folder):
        path = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c" * n} for n in (1, 3)])
        report = json.loads(data("stats", path, "--model", tiny_folder, "--json")[1])
        assert report["lengths"]["completion"]["max"] == 2 + 3 + 1
        assert report["lengths"]["completion, supervised"]["max"] == 3 + 1
        path = write(tmp_path / "b.jsonl", [{"question": "abc"}])
        assert "the known columns are" in data("stats", path)[1]

    def test_pairs_that_are_tokens_already_are_counted_in_tokens(self, tmp_path, data):
        path = write(tmp_path / "a.jsonl", [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}])
        report = json.loads(data("stats", path, "--json")[1])
        assert (report["unit"], report["lengths"]["prompt_ids"]["max"]) == ("tokens", 2)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([ROWS[0], {"prompt": "p", "chosen": 3, "rejected": "b"}], r"line 2: chosen is a number \(3\)"),
            ([ROWS[0], {"prompt": "p", "chosen": "a", "rejected": None}], "line 2: rejected is null"),
            ([ROWS[0], {"prompt": "p", "chosen": "a"}], "line 2: rejected is null"),
            ([ROWS[0], {"chosen": "a", "rejected": "b"}], "line 2: prompt is null"),
            ([{"prompt": "p", "chosen": [["a"]], "rejected": "b"}], "line 1: chosen is a list whose item 1 is a list"),
            ([ROWS[0], {"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}],
             "line 2: chosen is a list of messages, and in .*line 1 it is a text"),
            ([{"prompt": "p", "chosen": "a", "rejected": "a"}] * 3, "all 3 pairs have identical sides"),
            ([{"prompt": "p", "chosen": "", "rejected": "a"}] * 3, "all 3 pairs have an empty side"),
            ([{"prompt": "p" * 2000, "chosen": "a", "rejected": "b"}], r"max_length is 1024, and every prompt .*2001"),
            (["a"], "line 1: a row must be an object, not a text"),
            ("", "a.jsonl holds no rows"),
            ("\n \n", "a.jsonl holds no rows"),
            ('{"prompt": "p", "chosen": "a", "rejected": "b"', r"line 1, column \d+: broken JSON"),
            ("[" * 100_000, "line 1: JSON that cannot be read: .*recursion"),
            ('{"chosen": ' + "9" * 5000 + "}", "line 1: JSON that cannot be read: Exceeds the limit"),
            ([{"prompt": "p", "chosen": "\ud800", "rejected": "b"}], "a.jsonl"),
        ],
    )  # fmt: skip
    def test_data_that_cannot_be_trained_on_ends_with_code_3_and_the_place(
        self, tmp_path, data, tiny_folder, rows, message
    ):
        code, out, err = data("stats", write(tmp_path / "a.jsonl", rows), "--model", tiny_folder)
        assert (code, out) == (3, "")
        assert re.fullmatch(rf"posttrain data: error: .*{message}.*\n", err, re.S), err

    def test_a_byte_order_mark_and_windows_line_ends_change_nothing(self, tmp_path, data):
        text = "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS)
        plain = json.loads(data("stats", write(tmp_path / "a.jsonl", ROWS), "--json")[1])
        marked = json.loads(data("stats", write(tmp_path / "b.jsonl", text), "--json")[1])
        assert marked["columns"] == plain["columns"] and marked["lengths"] == plain["lengths"]

    def test_huge_rows_are_measured(self, tmp_path, data, tiny_folder):
        path = write(tmp_path / "a.jsonl", [*ROWS, ROWS[0] | {"chosen": "é" * 100_000}])
        code, out, _ = data("stats", path, "--model", tiny_folder)
        assert code == 0 and " 200001 |" in out

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["stats", "gone.jsonl"], 3, "gone.jsonl does not exist (working folder: "),
            (["inspect", "rows.csv"], 3, "rows.csv does not exist"),
            (["stats", "generated:reverse_list?n=0"], 2, "n=0 must be at least 1"),
            (["stats", "generated:reverse_list", "--model", "no/such-model"], 4, "model 'no/such-model' is no fol"),
            (["stats", "generated:reverse_list", "--model", "embedded:x"], 2, "'embedded:x' is not known"),
            (["inspect", "generated:reverse_list", "--rows", 0], 2, "--rows is 0; it must be at least 1."),
            (["stats", "generated:reverse_list", "--max-length", -1], 2, "--max-length is -1; it must be at least 1."),
        ],
    )
    def test_wrong_arguments_have_their_codes(self, data, arguments, code, message):
        got, _, err = data(*arguments)
        assert got == code
        assert err.startswith("posttrain data: error: ") and message in err


class TestFlip:
    def flip(self, data, source, out, *arguments):
        code, printed, err = data("flip", source, out, "--rate", 0.3, *arguments)
        assert (code, err) == (0, "")
        opener = gzip.open if str(out).endswith(".gz") else open
        with opener(out, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file], printed

    @pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
    def test_the_copy_is_the_library_s_own_flip_row_by_row(self, source, data, tmp_path, name):
        rows, printed = self.flip(data, source, tmp_path / name, "--seed", 4)
        assert rows == flip_preferences(Dataset.from_list(ROWS), 0.3, 4).to_list()
        assert sum(row["flipped"] for row in rows) == 6
        assert printed == f"{tmp_path / name}: 20 rows, 6 of them with chosen and rejected swapped (seed 4)\n"
        assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", name}

    def test_equal_commands_give_equal_bytes(self, source, data, tmp_path):
        for folder in ("a", "b"):
            self.flip(data, source, tmp_path / folder / "out.jsonl.gz")
        first, second = ((tmp_path / folder / "out.jsonl.gz").read_bytes() for folder in ("a", "b"))
        assert first == second
        # the header holds no time
        assert first[4:8] == bytes(4)
        self.flip(data, source, tmp_path / "c.jsonl.gz", "--seed", 1)
        assert (tmp_path / "c.jsonl.gz").read_bytes() != first

    def test_every_value_comes_through_as_it_was(self, data, tmp_path):
        values = [None, 2**80, "é\u2028", {"a": [1, None]}, [], 0.1, "\ud800", False, {}]
        odd = [{"chosen": value, "rejected": [value], f"only_{i}": value, "id": i} for i, value in enumerate(values)]
        odd += [{"rejected": 1, "chosen": 2, "chosen_score": 3, "flipped": True}]
        path = write(tmp_path / "odd.json", json.dumps(odd))
        for seed in range(4):
            rows, _ = self.flip(data, path, tmp_path / f"{seed}.jsonl", f"--seed={seed}")
            for before, after in zip(odd, rows, strict=True):
                swapped = after["flipped"] != before.get("flipped", False)
                sides = [before["chosen"], before["rejected"]]
                assert [after["chosen"], after["rejected"]] == (sides[::-1] if swapped else sides)
                # the score of the other answer is not known
                changed = ("chosen", "rejected", "flipped", *(("chosen_score",) if swapped else ()))
                assert not swapped or after.get("chosen_score") is None
                assert {k: v for k, v in after.items() if k not in changed} == {
                    k: v for k, v in before.items() if k not in changed
                }

    def test_what_is_written_can_be_read_and_flipped_back(self, source, data, tmp_path):
        self.flip(data, source, tmp_path / "once.jsonl")
        assert len(load_preferences(str(tmp_path / "once.jsonl"))) == 20
        rows, _ = self.flip(data, tmp_path / "once.jsonl", tmp_path / "twice.jsonl")
        assert rows == [row | {"flipped": False} for row in ROWS]

    def test_an_existing_file_is_written_over_by_force_only_even_if_it_is_the_source(self, source, data):
        before = Path(source).read_bytes()
        code, _, err = data("flip", source, source, "--rate", 0.3)
        assert (code, err) == (
            2,
            f"posttrain data: error: {source} exists already. Name another file, or add --force.\n",
        )
        assert Path(source).read_bytes() == before
        rows, _ = self.flip(data, source, source, "--force", "--json")
        assert sum(row["flipped"] for row in rows) == 6

    @pytest.mark.parametrize("rate", [-0.1, 1.0, "nan"])
    def test_a_rate_that_cannot_be_is_refused(self, source, data, tmp_path, rate):
        code, _, err = data("flip", source, tmp_path / "out.jsonl", f"--rate={rate}")
        assert code == 2
        assert re.search(r"--rate is (-0\.1|1\.0|nan); it must lie in \[0, 1\)", err)
        assert not (tmp_path / "out.jsonl").exists()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([*ROWS, {"prompt": "p", "chosen": "a"}], r"line 21: 'rejected' missing; found \['prompt', 'chosen'\]"),
            ([{"text": "t"}], "line 1: 'chosen' and 'rejected' missing.*Only preference pairs can be flipped"),
            (
                [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}],
                "Convert these SHP rows first, with `posttrain data convert`",
            ),
            (
                [
                    {
                        "context": [{"role": "user", "content": "q"}],
                        "response1": "a",
                        "response2": "b",
                        "overall_preference": 1,
                    }
                ],
                "Convert these HelpSteer3 rows first, with `posttrain data convert`",
            ),
            ('{"chosen": 1,', "line 1, column .*broken JSON"),
            (
                '{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rejected": "b", "score": 1e400}',
                "line 2, column 'score' holds a value that JSON cannot: Out of range float values are not JSON",
            ),
            (
                '{"chosen": "a", "rejected": "b", "score": [NaN]}',
                "line 1, column 'score' holds a value that JSON cannot",
            ),
        ],
    )
    def test_rows_that_are_no_pairs_are_named_and_nothing_is_written(self, tmp_path, data, rows, message):
        code, _, err = data("flip", write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", "--rate", 0.3)
        assert code == 3
        assert re.search(message, err)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    def test_another_kind_of_file_is_refused(self, source, data, tmp_path):
        code, _, err = data("flip", source, tmp_path / "out.csv", "--rate", 0.3)
        assert code == 2 and "out.csv; its name must end in .jsonl or .jsonl.gz." in err

    def test_a_folder_that_cannot_be_written_to_is_an_issue_of_the_environment(self, source, data, tmp_path):
        (tmp_path / "file").touch()
        code, _, err = data("flip", source, tmp_path / "file" / "out.jsonl", "--rate", 0.3)
        assert code == 4
        assert "out.jsonl cannot be written (" in err

    def test_a_full_disk_leaves_the_old_file_and_no_rest(self, source, data, tmp_path, monkeypatch):
        (tmp_path / "out.jsonl").write_text("old")

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("posttrain.cli.data.os.fsync", full)
        code, _, err = data("flip", source, tmp_path / "out.jsonl", "--rate", 0.3, "--force")
        assert code == 4
        assert "out.jsonl cannot be written (No space left on device); nothing was left there." in err
        assert (tmp_path / "out.jsonl").read_text() == "old"
        assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "out.jsonl"}

    def test_parquet_and_generated_sources_are_read(self, data, tmp_path):
        Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
        rows, _ = self.flip(data, tmp_path / "a.parquet", tmp_path / "a.jsonl")
        assert rows == flip_preferences(Dataset.from_list(ROWS), 0.3, 0).to_list()
        rows, _ = self.flip(data, "generated:reverse_list?n=10", tmp_path / "b.jsonl")
        assert sum(row["flipped"] for row in rows) == 3


class TestTasks:
    TASKS = (
        {"prompt": "2 + 2?", "gold": "4"},
        {"question": "2 + 2?", "answer": "2 and 2 make 4.\n#### 4"},
        {"problem": "2 + 2?", "solution": "It is \\boxed{4}."},
        {"problem": "2 + 2?", "solution": "It is 4.", "answer": "4", "level": 1},
    )

    @pytest.mark.parametrize("row", TASKS)
    def test_a_task_is_shown_as_the_recipes_render_it(self, row, tmp_path, data, tiny_folder):
        from posttrain.data.processing import load_processing_class
        from posttrain.data.tasks.loading import load_demonstrations
        from posttrain.data.tokens import render

        path = write(tmp_path / "a.jsonl", [row])
        code, out, err = data("inspect", path, "--model", tiny_folder, "--json")
        assert (code, err) == (0, "")
        told = json.loads(out)
        assert told["converted"]["to"] == "tasks"
        assert "a user's turn (conversational: true)" in told["converted"]["why"]
        task = load_demonstrations(path, need_demonstrations=False)[0]
        tokenizer = load_processing_class(tiny_folder)
        ids = render(task["prompt"], {}, tokenizer, "row", add_generation_prompt=True)
        assert "".join(piece["text"] for piece in told["examples"][0]["pieces"]) == tokenizer.decode(ids)
        code, out, _ = data("inspect", path)
        assert code == 0 and "unknown" not in out and "user: 2 + 2?" in out
        code, out, _ = data("stats", path, "--model", tiny_folder)
        assert code == 0 and "converted to tasks" in out

    def test_as_it_is_a_prompt_is_its_text_and_that_is_said(self, tmp_path, data, tiny_folder):
        path = write(tmp_path / "a.jsonl", [{"prompt": "2 + 2?"}])
        code, out, _ = data("inspect", path, "--model", tiny_folder)
        assert code == 0 and "\n2 + 2?\n" in out
        assert "make a user's turn of each, unless conversational is false" in out
        path = write(tmp_path / "b.jsonl", [self.TASKS[0]])
        code, out, _ = data("inspect", path, "--model", tiny_folder, "--as-is")
        assert code == 0 and "\n2 + 2?\n" in out

    def test_a_question_without_a_marked_answer_is_shown_as_it_is_with_the_reason(self, tmp_path, data):
        path = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "Because."}])
        code, out, err = data("inspect", path)
        assert code == 0 and "format: unknown" in out
        assert "cannot be read as tasks" in err and "gold answer" in err

    def test_a_prompt_with_the_template_applied_begins_once(self, tmp_path, data, tiny_folder):
        from tokenizers.processors import TemplateProcessing

        from posttrain.models import byte_tokenizer

        tokenizer = byte_tokenizer("<|pad|>")
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        begin = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
        tokenizer.save_pretrained(tmp_path / "model")
        path = write(tmp_path / "a.jsonl", [{"prompt": "<s>user: 2 + 2?"}])
        code, out, _ = data("inspect", path, "--model", str(tmp_path / "model"))
        assert code == 0 and out.count("<s>") == 1
