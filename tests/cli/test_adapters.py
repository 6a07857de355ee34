"""`posttrain adapters merge | truncate | info` on saved folders."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import errors, quiet
from posttrain.cli import main

IDS = torch.arange(20, 44).view(2, 12)


@pytest.fixture(autouse=True)
def libraries_keep_their_voice(monkeypatch):
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    folders = []
    for seed, settings in enumerate((dict(r=4), dict(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"]))):
        config = LoraConfig(**dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
        generator = torch.Generator().manual_seed(seed)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data.normal_(std=0.1, generator=generator)
        folders.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(folders[-1])
    return list(map(str, folders))


@torch.no_grad()
def logits(base, folder, **more):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    for name, other in more.items():
        model.load_adapter(other, name)
    return model, model(IDS).logits


def test_a_merge_is_the_sum(adapters, tiny_folder, tmp_path, capsys):
    out = str(tmp_path / "new" / "sum")
    assert main(["adapters", "merge", *adapters, out, "--weights", "1", "-0.5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weights"] == [1.0, -0.5] and facts["relative_error"] < 1e-6 and facts["output"] == out
    part = next(one for path, one in facts["modules"].items() if path.endswith("0.self_attn.q_proj"))
    assert part["ranks"] == [4, 2] and part["exact_rank"] == part["rank"] == len(part["singular_values"]) == 6
    model, _ = logits(tiny_folder, adapters[0], b=adapters[1])
    model.add_weighted_adapter(["default", "b"], [1.0, -0.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    with torch.no_grad():
        torch.testing.assert_close(logits(tiny_folder, out)[1], model(IDS).logits, atol=2e-5, rtol=1e-4)


def test_a_truncation_tells_its_error(adapters, tmp_path, capsys):
    out = tmp_path / "cut"
    assert main(["adapters", "truncate", adapters[0], str(out), "--rank", "2", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "modules of rank 2, of an exact sum of rank 4." in said and "stored as bfloat16" in said
    assert "| largest errors" in said and json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert main(["adapters", "truncate", adapters[0], str(tmp_path / "most"), "--energy", "0.5"]) == 0
    assert "Relative error: 0." in capsys.readouterr().out


REFUSED = {
    "neither --rank nor --energy is given": (2, ["truncate", "A", "OUT"]),
    "rank is 2 and energy is 0.5; give one of them": (2, ["truncate", "A", "OUT", "--rank", "2", "--energy", "0.5"]),
    "energy=1.5 must be a number above 0 and at most 1": (2, ["truncate", "A", "OUT", "--energy", "1.5"]),
    "there are 1 weights for 2 adapters": (2, ["merge", "A", "B", "OUT", "--weights", "1"]),
    "weights has nan": (2, ["merge", "A", "B", "OUT", "--weights", "nan", "1"]),
    "all weights are 0": (2, ["merge", "A", "B", "OUT", "--weights", "0", "0"]),
    "output is .*A, which is not empty": (2, ["merge", "A", "B", "A"]),
    "base is ''; give the name": (2, ["merge", "A", "B", "OUT", "--base", ""]),
    "output is .*inside the adapter": (2, ["truncate", "A", "A/inside", "--rank", "1"]),
    "adapter is .*gone, which is no folder": (2, ["merge", "A", "gone", "OUT"]),
    "gone, which is no folder": (2, ["info", "gone"]),
    "adapter_model.safetensors is damaged": (3, ["info", "CUT"]),
    "damaged, or no safetensors file": (3, ["merge", "CUT", "A", "OUT"]),
    "--plot is x.pdf; its name must end in .png": (2, ["info", "A", "--plot", "x.pdf"]),
    "mine.png exists already. Name another file, or add --force": (2, ["info", "A", "--plot", "mine.png"]),
    "--plot is gone/a.png, and there is no folder gone": (2, ["info", "A", "--plot", "gone/a.png"]),
}


@pytest.mark.parametrize("said", REFUSED)
def test_mistakes_are_answered_and_nothing_is_written(said, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, folder in zip(("A", "B", "CUT"), (*adapters, adapters[0]), strict=True):
        shutil.copytree(folder, name)
    weights = tmp_path / "CUT" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (tmp_path / "mine.png").write_text("mine")
    code, words = REFUSED[said]
    before = sorted(tmp_path.rglob("*"))
    assert main(["adapters", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(said, captured.err) and captured.err.startswith("posttrain adapters: error: ")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "mine.png").read_text() == "mine"


def test_info_is_a_table_json_and_a_picture(adapters, tmp_path, capsys):
    picture = tmp_path / "pictures" / "spectra.png"
    picture.parent.mkdir()
    assert main(["adapters", "info", adapters[1], "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "LoRA r 2, alpha 8, of " in said and "4 modules; Frobenius norm of all changes" in said
    assert "| model.layers.0.mlp.up_proj" in said and "| effective |" in said
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list(picture.parent.iterdir())) == 1
    assert main(["adapters", "info", adapters[1], "--plot", str(picture)]) == 2
    assert main(["adapters", "info", adapters[1], "--plot", str(picture), "--force", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["r"] == 2 and facts["scheme"] is None and facts["more_than_a_and_b"] == []
    one = facts["modules"]["model.layers.0.mlp.up_proj"]
    assert one["scale"] == 4.0 and one["rank"] == len(one["singular_values"]) == 2
    assert one["largest"] == max(one["singular_values"]) and set(one["rank_for"]) == {"0.9", "0.99"}
    squares = sum(value**2 for module in facts["modules"].values() for value in module["singular_values"])
    assert facts["norm"] == pytest.approx(squares**0.5)


def test_a_picture_needs_matplotlib(adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert main(["adapters", "info", adapters[0], "--plot", str(tmp_path / "a.png")]) == 4
    assert 'pip install "posttrain[plots]"' in capsys.readouterr().err


def test_the_tokenizer_goes_with_the_adapters_where_they_have_the_same(adapters, tiny_folder, tmp_path, logged):
    folders = [shutil.copytree(folder, tmp_path / name) for folder, name in zip(adapters, "ab", strict=True)]
    for folder in folders:
        shutil.copy(f"{tiny_folder}/tokenizer.json", folder)
    command = ["adapters", "merge", *map(str, folders)]
    assert main([*command, str(tmp_path / "same")]) == 0
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (folders[0] / "tokenizer.json").read_bytes()
    (folders[1] / "tokenizer.json").write_text("{}")
    assert main([*command, str(tmp_path / "other")]) == 0
    assert not (tmp_path / "other" / "tokenizer.json").exists()
    assert "the adapters come with different tokenizers, so none is copied" in logged.text


def test_a_sum_of_zero_is_told(adapters, tmp_path, capsys):
    out = str(tmp_path / "zero")
    assert main(["adapters", "merge", adapters[0], adapters[0], out, "--weights", "1", "-1"]) == 0
    assert "The sum is zero in 4 of 4 modules" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (dict(target_modules=["k_proj"]), 3, "does not adapt"),
        (dict(target_modules=".*q_proj"), 3, "does not adapt"),
        (dict(exclude_modules=["v_proj"]), 3, "does not adapt"),
        (dict(layers_to_transform=[0]), 3, "does not adapt"),
        (dict(layers_to_transform="x"), 2, "layers_to_transform is"),
        (dict(layers_to_transform=[0, 1], layers_pattern=[3]), 2, "layers_pattern is"),
        (dict(layers_to_transform=[0, 1]), 0, ""),
    ],
)
def test_modules_of_the_file_are_those_of_the_config(change, code, said, adapters, tmp_path, capsys):
    folder = tmp_path / "edited"
    shutil.copytree(adapters[0], folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["adapters", "truncate", str(folder), str(tmp_path / "out"), "--rank", "2"]) == code
    assert said in capsys.readouterr().err and (tmp_path / "out").exists() == (code == 0)


def test_an_empty_name_is_no_folder(adapters, capsys):
    for words in (["info", ""], ["merge", adapters[0], " ", "sum"], ["truncate", "", "out", "--rank", "1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["adapters", *words])
        assert "it is empty; give the folder of an adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{bad", "posttrain_adapter.json"),
        ('{"scheme": 3}', "posttrain_adapter.json names no scheme: it is damaged"),
        ('{"scheme": "allora", "form": "gradient"}', "it must have the scheme allora, an eta from 0.0001 to 10000"),
        ('{"scheme": "allora", "eta": NaN, "form": "gradient"}', "posttrain_adapter.json"),
        ('{"scheme": "allora", "eta": 2.0, "form": "other"}', "and a form (gradient or update)"),
        ("[]", "posttrain_adapter.json"),
    ],
)
@pytest.mark.parametrize("verb", ["info", "truncate"])
def test_a_damaged_side_file_is_a_damaged_file(verb, text, said, adapters, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    (folder / "posttrain_adapter.json").write_text(text)
    rest = [str(tmp_path / "out"), "--rank", "2"] if verb == "truncate" else []
    assert main(["adapters", verb, str(folder), *rest]) == 3
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_info_tells_a_scheme_with_its_settings(adapters, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    (folder / "posttrain_adapter.json").write_text('{"scheme": "allora", "eta": 1.5, "form": "update"}')
    assert main(["adapters", "info", str(folder)]) == 0
    assert "trained as allora (eta 1.5, form update)" in capsys.readouterr().out
    assert main(["adapters", "info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["scheme"], facts["scheme_settings"]) == ("allora", {"eta": 1.5, "form": "update"})


def test_a_link_in_the_place_of_weights_says_how_to_copy(adapters, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(f"{adapters[0]}/adapter_model.safetensors")
    assert main(["adapters", "info", str(folder)]) == 2
    assert "copy it with `cp -rL`, or download with `hf download" in capsys.readouterr().err
