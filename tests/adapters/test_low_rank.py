"""Saved LoRA adapters added and truncated: what PEFT loads has the sum's logits, and what has no sum is refused."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import struct

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file

from posttrain.adapters import SIDE_FILE, lora_settings, saved_lora
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.adapters.low_rank import merge_adapters, spectra, truncate_adapter
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.models import tiny_model

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_model(num_hidden_layers=2)


def adapted(base, seed=0, kind=LoraConfig, **settings):
    given = dict(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(copy.deepcopy(base), kind(**given | settings))
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.1, generator=generator)
    return model.eval()


def saved(base, folder, seed=0, **settings):
    adapted(base, seed, **settings).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def loaded(base, folder):
    # a warning, as of keys that are missing, is an error
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def summed(base, folders, weights):
    """The base with the weighted changes of all adapters in its weights."""
    whole = copy.deepcopy(base)
    for folder, weight in zip(folders, weights, strict=True):
        for path, layer in loaded(base, folder).named_modules():
            if isinstance(layer, LoraLayer):
                module = whole.get_submodule(path.removeprefix("base_model.model."))
                module.weight.data += weight * layer.get_delta_weight("default")
    return whole.eval()


PAIRS = {
    "ranks": (dict(r=4), dict(r=2, lora_alpha=16)),
    "modules": (dict(), dict(target_modules=["k_proj", "q_proj", "down_proj"], r=3)),
    "patterns": (
        dict(rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 5}, alpha_pattern={"v_proj": 3}),
        dict(use_rslora=True, rank_pattern={"v_proj": 6}),
    ),
    "all-linear": (dict(target_modules="all-linear", r=2), dict(target_modules=r".*\.(up|down)_proj", r=3)),
    "some layers": (dict(layers_to_transform=[1], layers_pattern="layers"), dict()),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_plain_peft_loads_the_sum_with_its_logits(pair, base, tmp_path):
    folders = [saved(base, tmp_path / str(place), place, **given) for place, given in enumerate(PAIRS[pair])]
    weights = [0.7, -0.4]
    made = merge_adapters(folders, weights)
    made.save(tmp_path / "sum")
    assert made.relative_error < 1e-6
    found = logits(loaded(base, tmp_path / "sum"))
    torch.testing.assert_close(found, logits(summed(base, folders, weights)), atol=2e-5, rtol=1e-4)
    # the signs of the weights count
    assert (found - logits(summed(base, folders, [0.7, 0.4]))).abs().max() > 1e-2
    # PEFT's own sum
    model = loaded(base, folders[0])
    model.load_adapter(folders[1], "b")
    # of a pattern and a list of names it makes none, and of the layers of one adapter alone where that names them
    with contextlib.suppress(ValueError):
        model.add_weighted_adapter(["default", "b"], weights, "sum", combination_type="cat")
        model.set_adapter("sum")
        if pair != "some layers":
            torch.testing.assert_close(found, logits(model), atol=2e-5, rtol=1e-4)
    config = LoraConfig.from_pretrained(tmp_path / "sum")
    for path, part in made.parts.items():
        assert part.rank == part.exact_rank == sum(part.ranks)
        assert config.rank_pattern.get(path, config.r) == config.alpha_pattern.get(path, config.lora_alpha) == part.rank
    assert {path.name for path in (tmp_path / "sum").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_adapters_share_costs_no_rank(base, tmp_path):
    folder = saved(base, tmp_path / "a")
    made = merge_adapters([folder, folder], [1.0, 0.5])
    assert {part.rank for part in made.parts.values()} == {4} and made.settings["rank_pattern"] == {}
    # beside PEFT's cat, whose rank is 8
    made.save(tmp_path / "sum")
    torch.testing.assert_close(
        logits(loaded(base, tmp_path / "sum")), logits(summed(base, [folder], [1.5])), atol=2e-5, rtol=1e-4
    )
    nothing = merge_adapters([folder, folder], [1.0, -1.0])
    nothing.save(tmp_path / "nothing")
    assert nothing.relative_error == 0.0 and nothing.settings["r"] == 1
    torch.testing.assert_close(logits(loaded(base, tmp_path / "nothing")), logits(base), atol=0, rtol=0)


def test_a_truncation_is_as_good_as_pefts_svd(base, tmp_path):
    folders = [saved(base, tmp_path / str(seed), seed) for seed in range(2)]
    model = loaded(base, folders[0])
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["default", "b"], [1.0, -0.5], "sum", combination_type="svd", svd_rank=3)
    made = merge_adapters(folders, [1.0, -0.5], 3)
    made.save(tmp_path / "sum")
    ours = loaded(base, tmp_path / "sum")
    gaps, sizes = 0.0, 0.0
    for path, part in made.parts.items():
        layers = [one.get_submodule(f"base_model.model.{path}") for one in (ours, model)]
        own, theirs = (one.get_delta_weight(name) for one, name in zip(layers, ("default", "sum"), strict=True))
        torch.testing.assert_close(own, theirs, atol=1e-6, rtol=1e-4)
        exact = layers[1].get_delta_weight("default") - 0.5 * layers[1].get_delta_weight("b")
        gap, size = torch.linalg.norm(own - exact).item(), torch.linalg.norm(exact).item()
        assert part.relative_error == pytest.approx(gap / size, rel=1e-4) and part.rank == 3
        gaps, sizes = math.hypot(gaps, gap), math.hypot(sizes, size)
    assert made.relative_error == pytest.approx(gaps / sizes, rel=1e-4) and made.relative_error > 0.1


def test_an_energy_keeps_the_ranks_of_pefts_conversion(base, tmp_path):
    folder = saved(base, tmp_path / "a", r=6, target_modules=["q_proj", "down_proj"])
    made = truncate_adapter(folder, energy=0.8)
    made.save(tmp_path / "cut")
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = convert_to_lora(loaded(base, folder), rank=0.8)
    ranks = {path: config.rank_pattern.get(path, config.r) for path in made.parts}
    assert {path: part.rank for path, part in made.parts.items()} == ranks and set(ranks.values()) != {6}
    for path in made.parts:
        name = f"base_model.model.{path}.lora_{{}}.weight"
        products = [one[name.format("B")] @ one[name.format("A")] for one in (made.tensors, tensors)]
        torch.testing.assert_close(*products, atol=1e-6, rtol=1e-4)
    ours = logits(loaded(base, tmp_path / "cut"))
    assert 1e-3 < (ours - logits(loaded(base, folder))).abs().max() < (ours - logits(base)).abs().max()


def test_embeddings_and_transposed_layers_are_added(tmp_path, base):
    targets = dict(target_modules=["q_proj", "embed_tokens"])
    folders = [saved(base, tmp_path / str(seed), seed, **targets) for seed in range(2)]
    made = merge_adapters(folders, [1.0, 2.0])
    made.save(tmp_path / "sum")
    model = loaded(base, folders[0])
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["default", "b"], [1.0, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(loaded(base, tmp_path / "sum")), logits(model), atol=2e-5, rtol=1e-4)
    # the embedding that PEFT saves beside them
    carried = [name for name in made.tensors if not saved_lora.is_factor(name)]
    assert carried == ["base_model.model.model.embed_tokens.base_layer.weight"]
    file = folders[1] / "adapter_model.safetensors"
    save_file({name: value + (name in carried) for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="embed_tokens.base_layer.weight, an embedding of the base, is another one"):
        merge_adapters(folders)
    with pytest.raises(ConfigError, match="is saved in one adapter and not in"):
        merge_adapters([folders[0], saved(base, tmp_path / "plain")])

    gpt2 = tiny_model("gpt2")
    folder = saved(gpt2, tmp_path / "conv", target_modules=["c_attn"], fan_in_fan_out=True)
    truncate_adapter(folder).save(tmp_path / "same")
    torch.testing.assert_close(
        logits(loaded(gpt2, tmp_path / "same")), logits(loaded(gpt2, folder)), atol=1e-5, rtol=1e-4
    )


def test_a_scheme_of_ours_becomes_a_plain_lora_and_that_is_said(base, tmp_path, logged):
    model = get_peft_model(copy.deepcopy(base), GiftSWConfig(r=4, target_modules=["q_proj"]))
    from posttrain.adapters import calibration

    calibration.calibrate(model, IDS.tolist())
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "columns")
    expected = logits(model.eval())
    with logged.at_level("INFO", logger="posttrain"):
        truncate_adapter(tmp_path / "columns").save(tmp_path / "plain")
    assert "columns was trained as gift_sw; what is made of it is a plain LoRA" in logged.text
    assert not (tmp_path / "plain" / SIDE_FILE).exists()
    torch.testing.assert_close(logits(loaded(base, tmp_path / "plain")), expected, atol=1e-5, rtol=1e-4)


def test_factors_are_added_as_folders_are(base, tmp_path):
    folders = [saved(base, tmp_path / str(seed), seed, lora_alpha=12) for seed in range(2)]
    made, path = merge_adapters(folders, [1.0, -2.0]), "model.layers.0.self_attn.q_proj"
    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    names = [f"base_model.model.{path}.lora_{side}.weight" for side in "AB"]
    part = merge_adapters([(*(state[name] for name in names), 3.0) for state in states], [1.0, -2.0])
    for ours, name in zip(part[:2], names, strict=True):
        torch.testing.assert_close(ours, made.tensors[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="give one kind"):
        merge_adapters([folders[0], (part.A, part.B, 1.0)])
    with pytest.raises(ConfigError, match=r"q_proj: a weight of 1e-308 times a scale of 3.0 is below"):
        merge_adapters(folders, [1e-308, 1.0])
    with pytest.raises(ConfigError, match="dtype is torch.int8"):
        merge_adapters(folders, dtype=torch.int8)


@pytest.mark.parametrize(
    "given", [5, None, True, "folder", b"folder", [], (), {}, {"a"}, (one for one in "ab"), range(2)]
)
def test_what_is_no_list_of_adapters_is_answered(given):
    with pytest.raises(ConfigError, match="adapters is .*; give a list of one or more"):
        merge_adapters(given)


@pytest.mark.parametrize("given", [[5], [None], [b"folder"], [[]], [()], [(1, 2, 3, 4)], [{"A": 1}], ["a", None]])
def test_what_are_no_adapters_is_answered(given):
    with pytest.raises(ConfigError, match=r"each a triple|give one kind"):
        merge_adapters(given)
    for look in (truncate_adapter, spectra):
        with pytest.raises(ConfigError, match="adapter is .*; give the folder of an adapter"):
            look(given)


@pytest.mark.parametrize("weights", [(one for one in (1.0, 2.0)), "12", {1.0: 2.0}, torch.ones(2), 1.0])
def test_weights_are_a_list(weights, base, tmp_path):
    with pytest.raises(ConfigError, match="weights is .*; give a list"):
        merge_adapters(["a", "b"], weights)


def test_alphas_as_large_as_fp64_holds_are_answered(base, tmp_path):
    folder = saved(base, tmp_path / "a")
    change(folder, lora_alpha=1e200)
    found = next(iter(spectra(folder).values()))
    assert 1e199 < found.norm < 1e201 and found.left_out()[0].item() == pytest.approx(1)
    with pytest.raises(DataError, match="which torch.float32 does not hold; use a wider type"):
        truncate_adapter(folder)
    assert truncate_adapter(folder, dtype=torch.float64).relative_error < 1e-6
    change(folder, lora_alpha=1e-300)
    with pytest.raises(ConfigError, match="lora_alpha is 1e-300; it must be a finite number, and not below 1e-290"):
        spectra(folder)


def test_spectra_are_those_of_the_changes(base, tmp_path):
    folder = saved(base, tmp_path / "a", use_rslora=True, lora_alpha=3)
    model, found = loaded(base, folder), spectra(folder)
    assert list(found) == sorted(found) and len(found) == 4
    for path, one in found.items():
        change = model.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
        values = torch.linalg.svdvals(change.double())[:4]
        torch.testing.assert_close(one.singular_values, values, atol=1e-6, rtol=1e-5)
        assert one.norm == pytest.approx(torch.linalg.norm(change).item(), rel=1e-5)
        assert one.shape == tuple(change.shape) and one.scale == pytest.approx(1.5) and one.rank == 4
        assert 1 <= one.effective_rank <= 4 and one.rank_for(1e-9) == 1 and one.rank_for(1.0) == 4
        assert one.left_out()[0] == 1.0 and one.left_out()[4] == 0.0
        cut = truncate_adapter(folder, 2).parts[path]
        assert one.left_out()[2].item() == pytest.approx(cut.relative_error, rel=1e-5)


NO_SUM = {
    "use_dora is True, and DoRA scales": dict(use_dora=True),
    r"modules_to_save is \['lm_head'\], and it trains whole modules": dict(modules_to_save=["lm_head"]),
    "trainable_token_indices is .*, and it trains rows": dict(trainable_token_indices=[3, 4]),
    "bias is 'all', and it trains biases": dict(bias="all"),
    "lora_bias is True, and its B has a bias": dict(lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True),
    "alora_invocation_tokens is .*, and it acts behind": dict(alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    r"layer_replication is \[\[0, 2\]\], and it repeats": dict(layer_replication=[[0, 2]]),
}


@pytest.mark.parametrize("said", NO_SUM)
def test_what_is_more_than_two_factors_is_refused(said, base, tmp_path):
    model = tiny_model("gpt2") if "target_modules" in NO_SUM[said] else base
    folder = saved(model, tmp_path / "a", **NO_SUM[said])
    with pytest.raises(ConfigError, match=f"a cannot be added or truncated: {said}"):
        truncate_adapter(folder)
    # what A and B make is told all the same
    assert spectra(folder) and saved_lora.read(folder).refused


def test_other_adapters_and_bases_are_refused(base, tmp_path):
    ours = saved(base, tmp_path / "ours")
    prefix = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(ConfigError, match="is of the type 'PREFIX_TUNING'; it must be LORA"):
        merge_adapters([ours, tmp_path / "prefix"])
    wide = saved(tiny_model(hidden_size=128), tmp_path / "wide")
    with pytest.raises(ConfigError, match="is linear, 64 x 64, in .*ours and linear, .* in .*wide: they are of diff"):
        merge_adapters([ours, wide])
    other = saved(base, tmp_path / "other")
    change(other, base_model_name_or_path="org/other")
    with pytest.raises(ConfigError, match="different base models, or revisions of one: org/base in .*ours, org/other"):
        merge_adapters([ours, other])
    made = merge_adapters([ours, other], base="org/third")
    assert made.settings["base_model_name_or_path"] == "org/third"
    change(other, base_model_name_or_path="org/base", revision="v2")
    with pytest.raises(ConfigError, match="different base models, or revisions"):
        merge_adapters([ours, other])
    change(other, revision="main")
    assert merge_adapters([ours, other]).settings["revision"] is None
    # one folder by two paths
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    change(ours, base_model_name_or_path=str(tmp_path / "base"))
    change(other, base_model_name_or_path=str(tmp_path / "link"))
    assert merge_adapters([ours, other]).parts


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def config(folder, text):
    (folder / "adapter_config.json").write_text(text)


def header(folder, **shapes):
    """A file without numbers, by whose header it has these shapes."""
    held = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    content = json.dumps(held).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def only(part):
    return lambda folder: rewrite(folder, lambda state: {n: v for n, v in state.items() if part in n})


def linked(name):
    def damage(folder):
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to("elsewhere")

    return damage


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def piped(folder):
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


HOSTILE = {
    "is no folder": (ConfigError, lambda folder: folder.rename(folder.with_name("gone"))),
    "has no adapter_config.json; give": (ConfigError, lambda folder: (folder / "adapter_config.json").unlink()),
    "has no adapter_model.safetensors; weights as a pickle": (ConfigError, pickled),
    "adapter_config.json is a link, and none is followed": (ConfigError, linked("adapter_config.json")),
    "adapter_model.safetensors is a link": (ConfigError, linked("adapter_model.safetensors")),
    "adapter_config.json is no valid JSON": (
        DataError,
        lambda folder: config(folder, "{"),
    ),
    "adapter_config.json holds a list": (DataError, lambda folder: config(folder, "[]")),
    "adapter_model.safetensors is damaged": (DataError, cut),
    "adapter_config.json is no regular file": (ConfigError, piped),
    "r is 'x'; it must be a whole number": (ConfigError, lambda folder: change(folder, r="x")),
    "r is True; it must be a whole number": (ConfigError, lambda folder: change(folder, r=True)),
    "lora_alpha is None": (ConfigError, lambda folder: change(folder, lora_alpha=None)),
    "lora_alpha is nan": (ConfigError, lambda folder: change(folder, lora_alpha=math.nan)),
    r"rank_pattern is \[1\]; it must be a mapping": (ConfigError, lambda folder: change(folder, rank_pattern=[1])),
    "alpha_pattern is {'q_proj': '3'}": (ConfigError, lambda folder: change(folder, alpha_pattern={"q_proj": "3"})),
    "rank_pattern='.*' is no regular": (ConfigError, lambda folder: change(folder, rank_pattern={"(q_proj": 4})),
    "repeats what has repeats": (ConfigError, lambda folder: change(folder, rank_pattern={"(a*)*b": 4})),
    "use_rslora is 'no'; it must be true": (ConfigError, lambda folder: change(folder, use_rslora="no")),
    "base_model_name_or_path is 3": (ConfigError, lambda folder: change(folder, base_model_name_or_path=3)),
    "target_modules is 3": (ConfigError, lambda folder: change(folder, target_modules=3)),
    "peft_type|of the type None": (ConfigError, lambda folder: change(folder, peft_type=None)),
    "rank is 1,000,000,000, and no model": (ConfigError, lambda folder: change(folder, lora_r=8, rank=10**9)),
    "by its config they must be matrices of the rank 3": (DataError, lambda folder: change(folder, r=3)),
    "holds one of A and B of model.layers.0": (DataError, only("lora_A")),
    "of A and B of model.layers.0.self_attn.q_proj without the other": (DataError, only("lora_B")),
    "of A and B of model.layers.1.self_attn.v_proj without the other": (
        DataError,
        lambda folder: rewrite(folder, lambda s: {n: v for n, v in s.items() if "1.self_attn.v_proj.lora_A" not in n}),
    ),
    "holds no module of v_proj, which adapter_config.json names in target_modules": (DataError, only("q_proj")),
    "holds no module of 1, which adapter_config.json names in layers_to_transform": (
        DataError,
        lambda folder: change(folder, layers_to_transform=[0, 1], layers_pattern="layers") or only("layers.0")(folder),
    ),
    "velora_config is {'num_groups': 2}, and it keeps what its backward": (
        ConfigError,
        lambda folder: change(folder, velora_config={"num_groups": 2}),
    ),
    r"use_other is \[3\], a setting that PEFT .* does not have: what it makes": (
        ConfigError,
        lambda folder: change(folder, use_other=[3]),
    ),
    "holds no matrices A and B": (DataError, only("nothing")),
    "holds I64 and F32 numbers": (
        DataError,
        lambda folder: rewrite(folder, lambda s: {n: v.long() if "lora_A" in n else v for n, v in s.items()}),
    ),
    "holds numbers that are not finite": (
        DataError,
        lambda folder: rewrite(folder, lambda s: {n: v * math.nan if "lora_B" in n else v for n, v in s.items()}),
    ),
    "its file holds base_model.model.x.lora_E beside A and B": (
        ConfigError,
        lambda folder: rewrite(folder, lambda s: s | {"base_model.model.x.lora_E": torch.ones(2)}),
    ),
    "init_lora_weights is 'pissa_niter_4'": (
        ConfigError,
        lambda folder: change(folder, init_lora_weights="pissa_niter_4"),
    ),
}


@pytest.mark.parametrize("said", HOSTILE)
def test_folders_of_strangers_are_answered(said, base, tmp_path):
    folder = saved(base, tmp_path / "a")
    kind, damage = HOSTILE[said]
    damage(folder)
    with pytest.raises(kind, match=said):
        truncate_adapter(folder)


def test_every_setting_of_pefts_is_taken_or_refused_by_name(base, tmp_path, monkeypatch):
    """A PEFT that has another setting fails here: what it makes of A and B is to be looked at."""
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names == names & (lora_settings._TAKEN | lora_settings._REFUSED.keys())
    assert not lora_settings._TAKEN & lora_settings._REFUSED.keys()
    assert lora_settings.refusals(LoraConfig().to_dict()) == []
    # off, whatever they are
    assert lora_settings.refusals(dict(use_new=False, new_list=[], new_config=None, new_size=0)) == []
    monkeypatch.setattr(lora_settings, "_TAKEN", lora_settings._TAKEN - {"qalora_group_size"})
    assert lora_settings.refusals(LoraConfig().to_dict()) == []
    (told,) = lora_settings.refusals(dict(qalora_group_size=8))
    assert "qalora_group_size is 8, a setting that this library does not know" in told
    # what A and B make is told all the same
    folder = saved(base, tmp_path / "a")
    change(folder, use_new=True)
    assert spectra(folder) and "use_new is True" in saved_lora.read(folder).refused[0]


def test_a_name_that_the_config_leaves_out_again_need_not_be_there(base, tmp_path):
    folder = saved(base, tmp_path / "a", exclude_modules=r".*v_proj")
    assert all(path.endswith("q_proj") for path in truncate_adapter(folder).parts)


def test_sizes_of_no_adapter_are_refused_before_they_are_read(base, tmp_path):
    folder = saved(base, tmp_path / "a")
    name = "base_model.model.q_proj.lora_{}.weight"
    change(folder, r=1, target_modules=["q_proj"])
    # of no bytes, which safetensors itself refuses
    header(folder, **{name.format("A"): [1, 10**9], name.format("B"): [8, 1]})
    with pytest.raises(DataError, match="damaged"):
        truncate_adapter(folder)
    rewrite_sparse(folder, {name.format("A"): [1, 200_000_000], name.format("B"): [8, 1]})
    with pytest.raises(DataError, match=r"a matrix of \[1, 200000000\] of q_proj, a size that no adapter has"):
        truncate_adapter(folder)


def rewrite_sparse(folder, shapes):
    """A file with holes in the place of numbers, of the length that its header says."""
    held, place = {}, 0
    for name, shape in shapes.items():
        held[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + 4 * math.prod(shape)]}
        place += 4 * math.prod(shape)
    content = json.dumps(held).encode()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(file.tell() + place)


def test_nothing_is_written_over(base, tmp_path):
    made = truncate_adapter(saved(base, tmp_path / "a"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, said in (("full", "is not empty"), ("full/mine", "is not empty"), ("lost", "a link that leads nowhere")):
        with pytest.raises(ConfigError, match=said):
            made.save(tmp_path / name)
    with pytest.raises(EnvironmentIssue, match="cannot be written to .*Nothing was left there"):
        made.save(tmp_path / "full" / "mine" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "full", "lost"]
    (tmp_path / "empty").mkdir()
    made.save(tmp_path / "empty")
    mode = (tmp_path / "empty" / "adapter_model.safetensors").stat().st_mode
    assert mode == (tmp_path / "empty" / "adapter_config.json").stat().st_mode


def test_modules_whose_names_end_alike_keep_their_ranks(tmp_path):
    """PEFT takes a pattern for the end of a path, so of two such modules one has the other's rank."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(8, 8, bias=False)
            self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8, bias=False)})

        def forward(self, x):
            return self.inner["q"](self.q(x))

    torch.manual_seed(0)
    plain = Two()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=4, target_modules=["q"]))
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.1, generator=generator)
    # the outer one is of rank 2
    model.base_model.model.q.lora_B["default"].weight.data[:, 2:] = 0
    model.save_pretrained(tmp_path / "a")
    made = truncate_adapter(tmp_path / "a")
    assert {path: part.exact_rank for path, part in made.parts.items()} == {"q": 2, "inner.q": 4}
    made.save(tmp_path / "same")
    x = torch.ones(1, 8)
    torch.testing.assert_close(loaded(plain, tmp_path / "same")(x), model.eval()(x), atol=1e-6, rtol=1e-5)
