"""Secrets are told from other settings by name and by form, in settings, texts and command lines."""

import copy
import pickle
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from posttrain import RobustDPOConfig, yaml_text
from posttrain.cli.train import _printable
from posttrain.errors import ConfigError
from posttrain.private import hide, hide_forms, hide_words, is_secret_name, remember, without_secrets
from posttrain.run import checkpoint_files
from posttrain.run.identity import differing
from posttrain.run.report import write_resolved_config
from posttrain.visible import visible
from tests.families import CONFIGS
from tests.recipe.in_process import RECIPES, settings_of, shipped

SECRETS = """
    token key hub_token HF_TOKEN hfToken api_key apikey X-Api-Key X-Amz-Signature X-Amz-Credential sig signature
    Authorization Proxy-Authorization password db_password PASSWD passphrase aws_secret_access_key AWSAccessKeyId
    use_auth_token push_to_hub_token WANDB_API_KEY openai_key client_secret private_key access_token session_token
    auth hub_token_2 judge_key cookie jwt webhook_url user_token oauth_token sshkey connection_string database_url
    passcode creds session_id sessionId psk wifi_psk privkey sastoken conn_str connStr mnemonic seed_phrase
    pw bind_pw cred db_cred pat github_pat PAT sas sas_token sasUrl presigned_url csrf XSRF-TOKEN kennwort mot_de_passe
    userpwd PHPSESSID amqp_url appkey
""".split()
NONE = """
    tokenizer tokenizer_name max_tokens num_tokens pad_token eos_token bos_token_id stop_token image_token tokens keys
    special_tokens kept_tokens max_new_tokens mean_token_accuracy token_type key_column gold_key sort_key keyword monkey
    author keep signal design forward_pass signature_columns logits_to_keep TOKENIZERS_PARALLELISM hub_model_id
    metric_for_best_model remove_unused_columns query_key_value attention.self.key projection_prng_key
    wandb_url path paths pattern patterns patience lora_target_modules target_modules password_file conv_pw log_pw
    credit sasrec patch patch_size compat power
""".split()


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", NONE)
def test_names_of_tokens_and_columns_are_no_secrets(name):
    assert not is_secret_name(name)


def test_tokens_and_keys_are_left_out_where_they_look_like_secrets():
    held = {"tokens": ["a1b2c3d4e5f6g7h8"], "keys": "a1b2c3d4e5f6g7h8"}
    assert without_secrets(held) == {}
    harmless = {"tokens": ["<|im_end|>", "a1b2c3d4e5f6g7h8"], "keys": ["prompt", "chosen"], "n": {"tokens": 5}}
    assert without_secrets(harmless) == harmless


def test_words_that_begin_as_tokens_do_are_none():
    for text in ("hf_oauth_url_handler api_org_name secret_sharing_protocols key-value sq0 digest x=1, y=2",):
        assert hide(text) == text


@pytest.mark.parametrize("name", ["a\u202eb", "a\x1b[31m", "\u2066é", "é"])
def test_resolved_settings_hold_no_character_that_steers_a_console(name):
    text = yaml_text.dump({"dataset": name, name: 1})
    assert visible(text) == text and yaml.safe_load(text) == {"dataset": name, name: 1}
    assert (name in text) is (name == "é")


def test_of_all_settings_the_hubs_token_alone_is_a_secret():
    sections = {type(part) for recipe in RECIPES for part in settings_of(recipe, "--config", str(shipped(recipe)))}
    for kind in sections.union(CONFIGS):
        assert {field.name for field in fields(kind) if is_secret_name(field.name)} <= {"hub_token"}


@pytest.mark.parametrize(
    "value, kept",
    [
        ({"model_init_kwargs": {"token": "s3", "dtype": "x"}}, {"model_init_kwargs": {"dtype": "x"}}),
        ({"headers": [["Authorization", "Bearer abcdef"]]}, {"headers": [["Authorization", "***"]]}),
        ({"args": ["--api-key", "abc", "--n", "3"]}, {"args": ["--api-key", "***", "--n", "3"]}),
        ({"env": [{"name": "DB_PASSWORD", "value": "x"}]}, {"env": [{"name": "DB_PASSWORD"}]}),
        ({"env": [{"Name": "Authorization", "Value": "x"}]}, {"env": [{"Name": "Authorization"}]}),
        ({"fields": [{"name": "password", "default": "x"}]}, {"fields": [{"name": "password"}]}),
        ({"tokens": {"hf": "a1b2c3d4e5f6g7h8", "n": "a1b2c3d4e5f6g7h8"}, "n": 1}, {"n": 1}),
        ({"tokens": {"pad": "<pad>", "eos": "</s>"}, "path": "a1b2c3d4", "patience": 3, "pattern": "a1b2"},) * 2,
        ({"pw": "x", "creds": ["x"], "github_pat": "x", "sas_token": "x", "tokenizer": "x"}, {"tokenizer": "x"}),
        (["pw", "dense"], ["pw", "dense"]),
        ({"name": "eos_token", "default": "</s>"}, {"name": "eos_token", "default": "</s>"}),
        (Path("https://u:Zq7Xw9@h/x.jsonl"), Path("https:/***@h/x.jsonl")),
        ({b"hub_token": "x", "key": "X-Api-Key", "val": "y"}, {"key": "X-Api-Key"}),
        ((b"X-Api-Key", b"abc"), (b"X-Api-Key", "***")),
        (["X-Api-Key", "abcd1234", "Accept", "text"], ["X-Api-Key", "***", "Accept", "text"]),
        (["query_key_value", "dense"], ["query_key_value", "dense"]),
        (["key", "value"], ["key", "value"]),
        ({"key": 16, "attention.self.key": 8}, {"key": 16, "attention.self.key": 8}),
        (["--rewards=judge:score?key=a b", "x"], ["--rewards=judge:score?key=***", "x"]),
        ("judge:score?key=sk-live-123456&n=3&model=mine", "judge:score?key=***&n=3&model=***"),
        ("length?max_length=512&cache=128", "length?max_length=512&cache=128"),
        ("generated:arithmetic?n=64&digits=1-2", "generated:arithmetic?n=64&digits=1-2"),
        ("https://h/b?X-Amz-Signature=deadbeef&part=1", "https://h/b?X-Amz-Signature=***&part=1"),
        ("https://me:pw@host/x#access_token=abc", "https://***@host/x#access_token=***"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ", "***"),
        ("hf_" + "x" * 30, "***"),
        (Path("hf_" + "x" * 30), Path("***")),
        ({"token": True, "pad_token": "<pad>"}, {"token": True, "pad_token": "<pad>"}),
    ],
)  # fmt: skip
def test_settings_are_written_without_secrets_at_any_depth(value, kept):
    assert without_secrets(value) == kept


LEAKING = "judge:score?endpoint=https://u:Pw0rdUrl99@h/x&key=rqSecretA1"
HELD = "judge:score?endpoint=***&key=***"


@pytest.mark.parametrize(
    "value, kept",
    [
        ([LEAKING, "maths_answer"], [HELD, "maths_answer"]),
        ((LEAKING, "maths_answer"), (HELD, "maths_answer")),
        ([LEAKING, "maths_answer", "n"], [HELD, "maths_answer", "n"]),
        ({"a": [[LEAKING, "b"], ["x"]]}, {"a": [[HELD, "b"], ["x"]]}),
        ({"a": {"n": [LEAKING, 3]}}, {"a": {"n": [HELD, 3]}}),
        (["https://u:Pw0rd9988@h/secret", "b"], ["https://***@h/secret", "b"]),
        (["ghp_abcdefghijklmnop is my token", "x"], ["*** is my token", "x"]),
        (["Authorization: Bearer abcdef.ghi", "x"], ["Authorization: ***", "x"]),
        (["--token=ghp_abcdefghijklmnop", "x"], ["--token=***", "x"]),
        (["--https://u:Pw0rd9988@h/token", "x"], ["--https://***@h/token", "x"]),
    ],
)
def test_a_text_that_speaks_of_a_secret_is_no_name_and_hides_its_own(value, kept):
    assert without_secrets(value, instead="***") == kept


def test_an_entry_left_out_shows_no_secret_of_its_name():
    assert without_secrets({LEAKING: {"n": 1}}, instead="***") == {HELD: "***"}


@pytest.mark.parametrize(
    "text, shown",
    [
        ("AccountName=a;AccountKey=Zm9vYmFy==;EndpointSuffix=x", "AccountName=a;AccountKey=***;EndpointSuffix=x"),
        ("sent Basic dXNlcjpwYXNzd29yZA== there", "sent Basic *** there"),
        ("https://api.telegram.org/bot123456789:AA" + "x" * 33 + "/send", "https://api.telegram.org/bot***/send"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQOY\n-----END PGP PRIVATE KEY BLOCK-----", "***"),
        ("AGE-SECRET-KEY-1ABCDEF", "***"),
        ("hvs.CAESIabcdefgh dapi0123456789abcdef0123456789abcdef", "*** ***"),
        ("xai-abcdef0123456789 pplx-abcdef0123456789 ntn_abcdef012345", "*** *** ***"),
        ("GOCSPX-abcdefghijkl", "***"),
        ("https://h/x?access%5Ftoken=abc123&n=1", "https://h/x?access%5Ftoken=***&n=1"),
        ("to=https%3A%2F%2Fh%3Ftoken%3Dabc%26n%3D1", "to=https%3A%2F%2Fh%3Ftoken%3D***%26n%3D1"),
        ("https:/u:Zq7Xw9@h/x.jsonl of /proc/s3:/u:Zq@h/x", "https:/***@h/x.jsonl of /proc/s3:/***@h/x"),
        ("to=https%3A%2F%2Fme%3AZq7Xw9%40host%2Fx", "to=https%3A%2F%2F***%40host%2Fx"),
        ("https://hooks.zapier.com/hooks/catch/123/Zq7Xw9", "https://hooks.zapier.com/hooks/catch/***"),
        ("https://u:a/b@h/x https://u:a#b@h/x https://u:a?b@h/x", "https://***@h/x " * 2 + "https://***@h/x"),
        ("curl -u user:pw https://h", "curl -u user:*** https://h"),
        ("eyJhbGciOiJSU0Et.OKOaw.48V1.5eym8.XFBo", "***"),
        ("eyJhbGciOiJkaXIi..48V1.5eym8.XFBo", "***"),
        ("hf_oauth_" + "a" * 16 + " api_org_" + "aB" * 16 + " xapp-1-A012-345-abcdef", "*** *** ***"),
        ("whsec_abcdef1234567890ABCD secret_abcdefghijklmnop1234 figd_abcdefghijkl", "*** *** ***"),
        ("sq0atp-abcdefghijkl123 sq0csp-abcdefghijkl123 key-" + "0a" * 16, "*** *** ***"),
        ('Digest username="Mufasa", response="6629fa"', "Digest ***"),
        ("run with `--judge_api_key abc` and password: cardPw1122", "run with `--judge_api_key ***` and password: ***"),
    ],
)  # fmt: skip
def test_forms_of_services_and_urls_are_hidden_whole(text, shown):
    assert hide(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("hub_token is 'abcdef'; it must", "hub_token is '***'; it must"),
        ("{'token': 's 3', 'a': 1}", "{'token': '***', 'a': 1}"),
        ('{"a": {"password": "x y", "b": 2}}', '{"a": {"password": "***", "b": 2}}'),
        (r'"{\"token\": \"s 3\"}"', r'"{\"token\": \"***\"}"'),
        ("Set `hub_token: abcd`", "Set `hub_token: ***`"),
        ("Authorization: Basic dXNlcjpw\nnext", "Authorization: ***\nnext"),
        ("--hub-token abc --max_tokens 5", "--hub-token *** --max_tokens 5"),
        ("401 for https://h/x?sig=a%2Fb: no", "401 for https://h/x?sig=*** no"),
        ("password=hunter2, n=3", "password=***, n=3"),
        ("token => Zq7Xw9Lm, token -> Zq7Xw9Lm, token := Zq7Xw9Lm", "token => ***, token -> ***, token := ***"),
        ("token == Zq7Xw9Lm and TOKEN:'Zq7Xw9Lm'", "token == *** and TOKEN:'***'"),
        ("sent bearer Zq7Xw9Lm there", "sent bearer *** there"),
        ("password hunter2 was refused, secret tr0ub4dor&3 too", "password *** was refused, secret *** too"),
        ("passphrase correct!horse; credential 'abc-12345'", "passphrase ***; credential '***'"),
        ("the api key is Zq7Xw9, the access-key: Zq7Xw9", "the api key is ***, the access-key: ***"),
        ("token a1b2c3d4e5f6g7 expired, token\ta1b2c3d4e5f6g7", "token *** expired, token\t***"),
        (
            "<password>hunter</password><apiKey a='b'> Zq7X </apiKey>",
            "<password>***</password><apiKey a='b'> *** </apiKey>",
        ),
        ("<token>Zq7Xw9Lm2</token>", "<token>***</token>"),
        ("machine h login me password horse", "machine h login me password ***"),
        ("--hub-token:Zq7Xw9Lm", "--hub-token:***"),
    ],
)
def test_messages_hide_what_stands_behind_a_secrets_name(text, shown):
    assert hide(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "write settings as key=value, joined by &.",
        "the token: it may not write there (hub_token: c.yaml:4)",
        "pad_token='<pad>' max_tokens=5 keyword=x",
        "risk-taking, sk-learn and ask-me-anything; Token embeddings; hf_pairs.jsonl of hf_org/name",
        "write lines of `key: value`",
        'File "utils/_http.py", line 657, in hf_raise_for_status, called by hf_hub_download',
        "http://localhost:8080/a?mail=me@x.org, http://h:443/@user and https://[::1]:80/a@b",
        "Basic training of Basic Blocks12, in xai-explainable and hvs",
        "def get(hf_token: str): return call(hf_token=hf_token, wandb_url=url)",
        'login(token=os.environ["HF_TOKEN"]) or --hub_token $HF_TOKEN or --hub_token <your token>',
        "the secret is out: chmod -u a:b; password: see above",
        "the password was refused; password required! A password re-entered; secret-sharing of the password/secret",
        "token <|im_end|> and token llama3, token 151643 of 152064; Token 1.5e-05; the api key is missing",
        "<token>the</token><key>abcdef</key><answer>x1234567</answer>",
        "def key_of(hf_token: str) -> str; x -> y; a => b; (lambda token: token) == other; a bearer of news",
        "patience 12345678, path /a/b1c2d3e4f5, pattern => a1b2c3d4e5 and pat: see above",
    ],
)
def test_messages_without_secrets_stay_as_they_are(text):
    assert hide(text) == text


def test_a_secret_of_the_settings_or_the_environment_is_hidden_whoever_quotes_it(monkeypatch):
    monkeypatch.setattr("posttrain.private._remembered", set())
    remember({"model_init_kwargs": {"token": "Pr1vate/hub"}, "rewards": ["judge:score?api_key=Qu0ted-key"]})
    monkeypatch.setenv("SOME_SERVICE_PASSWORD", "c0rrect horse")
    said = "GET said no to Pr1vate/hub, Qu0ted-key and c0rrect horse"
    assert hide(said) == str(ConfigError(said)) == "GET said no to ***, *** and ***"


@pytest.mark.parametrize(
    "value", ["correcthorsebatterystaple", "/JalrXUtnFEMI1K7MDENGbPxRfiCYEXAMPLEKEY1", "hunterpass", "12345678"]
)
def test_a_known_secret_is_hidden_whatever_it_is_made_of(monkeypatch, value):
    monkeypatch.setattr("posttrain.private._remembered", set())
    monkeypatch.setenv("DB_PASSWORD", value)
    assert hide(f"GET said no to {value}.") == "GET said no to ***."
    monkeypatch.delenv("DB_PASSWORD")
    assert value in hide(f"GET said no to {value}.")
    remember(["judge:score?key=a long one&n=3"])
    assert hide("no: ['judge:score?key=a long one&n=3']") == "no: ['judge:score?key=***&n=3']"
    remember({"headers": [["Authorization", value]], "env": [{"name": "X_KEY", "value": "/of/an/entry"}]})
    assert hide(f"GET said no to {value} and /of/an/entry") == "GET said no to *** and ***"


def test_a_common_word_or_a_path_that_exists_stays_in_messages(monkeypatch, tmp_path):
    monkeypatch.setattr("posttrain.private._remembered", set())
    remember({"hub_token": "training", "ssh_key": str(tmp_path)})
    monkeypatch.setenv("PWD", "/removed/since")
    said = f"training in {tmp_path}, started in /removed/since"
    assert hide(said) == said


def test_command_lines_hide_flags_and_json():
    words = ["--model_init_kwargs", '{"token": "s3", "n": 1}', "--hub_token", "a", "--lora_r", "4", "--api-key=b"]
    assert hide_words(words) == [
        "--model_init_kwargs", '{"token": "***", "n": 1}', "--hub_token", "***", "--lora_r", "4", "--api-key=***",
    ]  # fmt: skip
    assert "s3" not in _printable(words) and "--lora_r 4" in _printable(words)


def test_hiding_a_form_leaves_prose_and_code_alone():
    prose = 'model = AutoModel.from_pretrained("me/run")  # token=None, key = value, password: see above'
    assert hide_forms(prose) == prose


@pytest.mark.core("sk-", "eyJ", "a->", "<token>x", "https:/a:b", "secret", "://")
@pytest.mark.parametrize(
    "unit",
    [
        "sk-",
        "eyJ",
        "'a': ",
        "://",
        "a:b?",
        "--a ",
        "\\",
        "{",
        "?a=",
        "a.",
        "curl -u=",
        "://a:",
        "?%",
        ";a",
        "%3Fa",
        "token:",
        "password ",
        "a->",
        "<a>",
        "<token>x",
        "https:/a:b",
        "%3A%2F%2F",
        "login a ",
        "secret\t",
    ],
)
def test_a_long_text_without_secrets_is_hidden_nothing_of(unit):
    assert hide(unit * 20_000) == unit * 20_000


@pytest.fixture
def args(tmp_path):
    return RobustDPOConfig(
        output_dir=str(tmp_path), use_cpu=True, hub_token="hf_" + "q" * 20,
        model_init_kwargs={"token": "s3cr3t-hub", "dtype": "float32"}, report_to="none",
    )  # fmt: skip


def test_what_is_pickled_shown_logged_or_resolved_of_a_config_holds_no_secret(args, tmp_path):
    write_resolved_config(args, tmp_path / "resolved_config.yaml", {"data": {"reward_funcs": ["j:s?key=s3cr3t-hub"]}})
    pickled = pickle.dumps(args)
    for text in (repr(args), str(args), args.to_json_string(), (tmp_path / "resolved_config.yaml").read_text()):
        assert "s3cr3t" not in text and "qqqq" not in text and "float32" in text
    assert b"s3cr3t" not in pickled and b"qqqq" not in pickled
    assert pickle.loads(pickled).model_init_kwargs == {"dtype": "float32"}
    assert yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())["data"]["reward_funcs"] == ["j:s?key=***"]


def test_copies_within_the_process_keep_the_secrets(args):
    for twin in (copy.copy(args), copy.deepcopy(args)):
        assert twin.hub_token == args.hub_token and twin.model_init_kwargs == args.model_init_kwargs


def test_a_marker_holds_no_secret_and_the_run_goes_on_from_it(tmp_path):
    identity = {"base": "https://me:pw@host/m", "extra": {"api_key": "abc"}, "beta": 0.1}
    checkpoint_files.mark(tmp_path, {"identity": identity})
    then = checkpoint_files.content_of(tmp_path / checkpoint_files.MARKER)["identity"]
    assert "pw" not in str(then) and "abc" not in str(then)
    assert differing(identity, then) == "" == differing(identity, identity)
    assert "beta" in differing(identity | {"beta": 0.2}, then)
