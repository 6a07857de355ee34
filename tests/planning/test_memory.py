"""Memory of a card: against arithmetic done by hand, and what each setting is known to do to it."""

import dataclasses

import pytest
from peft import LoraConfig

from posttrain.errors import ConfigError
from posttrain.paths import configs_dir
from posttrain.planning import advice, launches, memory
from posttrain.planning.cards import CARDS, card_of
from posttrain.planning.job import Job, Launch
from posttrain.planning.shapes import config_of, config_of_size, parameters_of, shapes_of

GIB = 2**30
ALONE = Launch()
EIGHT = shapes_of(config_of("Qwen/Qwen3-8B"))
SMALL = shapes_of(config_of("Qwen/Qwen3-0.6B"))


def job(shapes=EIGHT, **given) -> Job:
    return Job(**dict(shapes=shapes, family="instructions", rows=4, length=2048, weight_bytes=2.0) | given)


def total(job: Job, launch: Launch = ALONE, card: float | None = None) -> float:
    return memory.need(memory.phases(job, launch, card))


def training(job: Job, launch: Launch = ALONE, card: float | None = None) -> dict:
    return memory.phases(job, launch, card)["training"]


@pytest.mark.parametrize(
    "model, parameters",
    [
        # of each model's card, or the sum of the tensors of its files
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("embedded:smollm2-135m", 134_515_008),
    ],
)
def test_shapes_have_the_numbers_of_the_public_models(model, parameters):
    assert shapes_of(config_of(model)).parameters == parameters


def test_an_adapter_has_the_numbers_of_its_matrices():
    found = shapes_of(config_of("Qwen/Qwen3-0.6B"), LoraConfig(r=8, target_modules="all-linear"))
    # r (in + out) of q, k, v, o, gate, up, down, 28 layers
    by_hand = 28 * 8 * ((1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024) + 3 * (1024 + 3072))
    assert found.adapter == by_hand
    assert found.adapted_inputs == 3 * 1024 + 2048 + 2 * 1024 + 3072 and found.ranks == 7 * 8
    assert found.parameters == SMALL.parameters


def test_full_fine_tuning_in_fp32_has_sixteen_bytes_a_parameter():
    parts = training(job(SMALL, weight_bytes=4.0, accumulation=2))
    parameters = SMALL.parameters
    assert parts["weights"] == 4 * parameters == parts["gradients"]
    assert parts["optimizer states"] == 8 * parameters and "fp32 masters" not in parts


@pytest.mark.parametrize("kind, shards", [("zero2", 1), ("zero3", 8)])
def test_an_engine_keeps_fp32_masters_and_shards_what_its_stage_says(kind, shards):
    parts, parameters = training(job(), Launch(kind, 8)), EIGHT.parameters
    assert parts["weights"] == 2 * parameters / shards
    # added up in fp32, as the launches here have it
    assert parts["gradients"] == 4 * parameters / 8
    assert parts["fp32 masters"] + parts["optimizer states"] == 12 * parameters / 8
    assert ("gathered weights" in parts) == (kind == "zero3")


def test_fsdp_shards_fp32_weights_and_gathers_layers_in_bf16():
    parts, parameters = training(job(), Launch("fsdp2", 8)), EIGHT.parameters
    assert parts["weights"] == 4 * parameters / 8 and parts["optimizer states"] == 8 * parameters / 8
    assert parts["gathered weights"] == 2 * (2 * EIGHT.layer + EIGHT.head)


def test_ddp_has_a_second_copy_of_the_gradients():
    alone, several = training(job(SMALL, weight_bytes=4.0)), training(job(SMALL, weight_bytes=4.0), Launch("ddp", 8))
    assert several["buffers of the engine"] == 4 * SMALL.parameters and several["weights"] == alone["weights"]


def test_more_nodes_leave_smaller_shards():
    one, two = (training(job(), Launch("zero3", 8 * nodes, nodes)) for nodes in (1, 2))
    for part in ("weights", "gradients", "optimizer states", "fp32 masters"):
        assert two[part] == one[part] / 2


@pytest.mark.parametrize(
    "optimizer, bytes_each",
    [
        ("adamw_torch_fused", 8),
        ("sgd", 0),
        ("torch.optim:SGD", 0),
        ("adamw_bnb_8bit", 2.04),
        ("paged_adamw_32bit", 8),
        ("lion_32bit", 4),
    ],
)
def test_states_are_those_of_the_optimizer(optimizer, bytes_each):
    assert memory.state_bytes(optimizer, 4.0) == pytest.approx(bytes_each)


def test_states_of_torch_are_in_the_type_of_what_they_move():
    assert memory.state_bytes("adamw_torch_fused", 2.0) == 4 and memory.state_bytes("paged_adamw_32bit", 2.0) == 8


def test_checkpointing_keeps_the_input_of_each_layer_and_one_whole_layer():
    kept, again = (training(job(SMALL, checkpointing=on, rows=16)) for on in (False, True))
    assert again["activations"] < kept["activations"] / 8
    assert again["activations"] > 28 * 16 * 2048 * 1024 * 2


def test_activations_grow_with_tokens_and_eager_scores_with_their_square():
    one, two = (training(job(SMALL, length=size, checkpointing=False))["activations"] for size in (1024, 2048))
    assert 1.9 < two / one < 2.2
    one, two = (
        training(job(SMALL, length=size, checkpointing=False, attention="eager"))["activations"]
        for size in (1024, 2048)
    )
    assert two / one > 3


def test_a_mask_is_left_out_of_flash_attention():
    masked, flash = (
        training(job(SMALL, rows=1, length=32768, attention=kind))["activations"]
        for kind in ("sdpa", "flash_attention_2")
    )
    assert masked - flash >= 32768**2 * 3


def test_a_reference_is_beside_the_policy_or_goes_before_it_trains():
    live = memory.phases(job(reference="live", own_reference=True), Launch("zero3", 8))
    before = memory.phases(job(reference="precomputed", own_reference=True), Launch("zero3", 8))
    assert live["training"]["reference model"] == 2 * EIGHT.parameters / 8
    assert "reference model" not in before["training"] and "reference model" in before["reference pass"]
    adapter = memory.phases(job(reference="live", own_reference=False), ALONE)
    assert "reference model" not in adapter["training"]


def test_vllm_has_its_share_of_the_card_unless_it_sleeps():
    card = CARDS["h100"].memory
    generated = dict(family="policy_gradient", answers=64, vllm=0.5)
    awake = memory.phases(job(**generated), Launch("zero3", 8), card)
    asleep = memory.phases(job(**generated, sleeps=True), Launch("zero3", 8), card)
    assert awake["training"]["vLLM"] == awake["generation"]["vLLM"] == asleep["generation"]["vLLM"] == card / 2
    assert asleep["training"]["vLLM"] == memory.ASLEEP
    server = memory.phases(job(**generated | {"vllm": 0.0}), Launch("zero3", 8), card)
    assert "vLLM" not in server["training"] | server["generation"]


def test_vllms_share_holds_rows_beside_the_whole_model():
    # 147,456 bytes of keys and values a token of Qwen3-8B: 36 layers, 8 heads of 128, two numbers each, bf16
    free = 0.5 * 80e9 - 2 * EIGHT.parameters - memory.ASLEEP
    given = job(family="policy_gradient", answers=64, vllm=0.5, length=8448)
    assert memory.rows_of_vllm(given, 80e9) == int(free / (147_456 * 8448))
    assert memory.rows_of_vllm(dataclasses.replace(given, vllm=0.1), 80e9) == 0
    assert memory.rows_of_vllm(job(), 80e9) is None


def test_a_value_head_learns_from_states_of_prompts():
    found = memory.phases(job(SMALL, value_prompts=32, reference="precomputed"), ALONE)["value head"]
    assert found["states of prompts"] >= 32 * 2048 * 1024 * 4 and found["value head"] == 4 * 1024**2 * 16


def test_what_does_not_fit_comes_with_changes_that_do():
    alone = job(weight_bytes=4.0, family="preference", rows=8, reference="live", own_reference=True)
    card = CARDS["h100"].memory
    assert total(alone) > card
    found = advice.fixes(alone, Launch(), card)
    assert found and all(size <= card for _, size in found)
    assert any("zero3" in text for text, _ in found)


def test_what_no_single_change_mends_has_several():
    card = card_of("24").memory
    found = advice.fixes(job(weight_bytes=4.0, rows=16, length=4096), Launch(), card)
    # with more cards, and with an adapter on the one that there is
    assert len(found) == 2 and all(", and " in text and size <= card for text, size in found)
    assert "zero3" in found[0][0] and "use_peft" not in found[0][0]
    assert "use_peft" in found[1][0] and "--launch" not in found[1][0]


def test_a_quantised_base_is_not_sharded():
    quantised = dataclasses.replace(EIGHT, adapter=10_000_000, adapted_inputs=30_000, ranks=100)
    found = advice.fixes(job(quantised, weight_bytes=0.5625, rows=32), Launch(), 13e9)
    assert found and not any("zero" in text for text, _ in found)


def test_nothing_is_promised_where_nothing_fits():
    assert advice.fixes(job(shapes_of(config_of_size(4e11)), weight_bytes=4.0), Launch(), card_of("8").memory) == []


@pytest.mark.parametrize(
    "text, size", [("7b", 7e9), ("0.5B", 5e8), ("500m", 5e8), ("7000000000", 7e9), ("1.5e9", 1.5e9)]
)
def test_a_size_in_words_is_a_number_and_a_model_of_about_it(text, size):
    assert parameters_of(text) == size
    assert shapes_of(config_of_size(size)).parameters == pytest.approx(size, rel=0.3)


@pytest.mark.parametrize("text", ["", "7q", "nan", "-7b", "inf", "0", "1e400", "7b7", "99999t"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="params is"):
        parameters_of(text)


@pytest.mark.parametrize("name, memory_", [("80", 80e9), ("80GB", 80e9), ("24 gb", 24e9), ("H100", 79.1 * GIB)])
def test_a_card_is_a_name_or_a_memory(name, memory_):
    assert card_of(name).memory == memory_


@pytest.mark.parametrize("name", ["", "h1000", "nan", "inf", "-80", "0", "1e9", "gb"])
def test_a_card_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="gpu is"):
        card_of(name)


def test_launch_files_are_read_as_they_are_shipped():
    folder = configs_dir() / "accelerate"
    found = {path.stem: launches.read(path) for path in folder.glob("*.yaml")}
    assert found["single_gpu"] == Launch("single", 1) and found["ddp"] == Launch("ddp", 8)
    assert found["zero2"] == Launch("zero2", 8) and found["zero3"] == Launch("zero3", 8)
    assert found["fsdp2"] == Launch("fsdp2", 8) and found["zero3_multinode"] == Launch("zero3", 16, 2)
    assert not found["cpu"].mixed


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no launch file"), ("[1]", "no launch file"), ("a: [", "no YAML"), ("distributed_type: TPU", "knows no"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}", "a plan knows 2, 3"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: [3]", "no launch file"),
        ("distributed_type: MULTI_GPU\nnum_processes: 0", "gpus is 0"),
        ("distributed_type: MULTI_GPU\nnum_processes: true", "gpus is True"),
        ("distributed_type: MULTI_GPU\nnum_processes: 8\nnum_machines: 3", "no whole number"),
        ("distributed_type: 'NO'\nnum_processes: 8", "a launch of one process"),
    ],
)  # fmt: skip
def test_a_launch_file_that_is_none_is_refused(text, said, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        launches.read(path)
