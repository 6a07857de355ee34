"""Clients that are trained by TRL's trainer and ours on one model in memory, which is left as it was found."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from posttrain import DPSFTConfig, DPSFTTrainer, NoisySFTConfig, NoisySFTTrainer
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.errors import ConfigError, DivergedError
from posttrain.federated.clients import Task, TrainerClients
from posttrain.federated.config import FederatedConfig
from posttrain.federated.loop import FederatedLoop
from posttrain.mechanisms.as_found import collected_alone, left_as_found
from posttrain.models import byte_tokenizer, tiny_model
from posttrain.run.mixin import without_folder
from tests.made_up import make_pairs
from tests.runs import PARENT, SETTINGS
from tests.scored import make_scored

TOKENIZER = byte_tokenizer()


def adapted(**given):
    torch.manual_seed(0)
    given = dict(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8) | given
    return get_peft_model(tiny_model(), LoraConfig(**given))


def trainer_of(kind, config, folder, rows, model, seed, **given):
    given = SETTINGS | PARENT | dict(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.1, max_length=256, seed=seed
    ) | given  # fmt: skip
    return kind(model, args=config(**given), train_dataset=rows, processing_class=TOKENIZER)


def builder(folder, kind=SFTTrainer, config=SFTConfig, **given):
    return lambda model, rows, seed: trainer_of(kind, config, folder, rows, model, seed, **given)


KINDS = {"trl": (SFTTrainer, SFTConfig), "ours": (NoisySFTTrainer, NoisySFTConfig)}


def settings(**given):
    return FederatedConfig(**dict(num_clients=2, rounds=2, method="fedsvd") | given)


def rows_of(count=2, each=8):
    return {f"c{n}": make_scored(each, seed=n).remove_columns("reward") for n in range(count)}


def clients_of(folder, model=None, rows=None, build=None, **given):
    config = settings(**given)
    made = TrainerClients(model or adapted(), rows or rows_of(config.num_clients), build or builder(folder), config)
    return made, FederatedLoop(made.start, made.rows, made, config, identity=made.identity())


@pytest.mark.parametrize("kind", ["ours", pytest.param("trl", marks=pytest.mark.slow)])
def test_one_client_without_refactoring_is_central_ffa(kind, tmp_path):
    """To the bit: the loop adds nothing to a trainer's own training with A frozen."""
    (name, rows), *_ = rows_of(1).items()
    build = builder(tmp_path / "run", *KINDS[kind])
    made, loop = clients_of(tmp_path, rows={name: rows}, build=build, num_clients=1, rounds=1, method="ffa_lora")
    seeds = []
    made._build = lambda model, rows, seed: seeds.append(seed) or build(model, rows, seed)
    shared = loop.run()
    model = adapted()
    for parameter_name, value in model.named_parameters():
        if "lora_A" in parameter_name:
            value.requires_grad_(False)
    set_seed(seeds[0])
    with without_folder():
        trainer = build(model, rows, seeds[0])
    trainer.train()
    central = {name: value for name, value in trainer.model.named_parameters() if "lora_B" in name}
    assert len(central) == len(shared.B) == 4
    for path, value in shared.B.items():
        assert torch.equal(value, central[f"base_model.model.{path}.lora_B.default.weight"].data) and value.any()
    # neither folder, card nor report
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_the_adapter_that_is_saved_is_a_plain_lora_of_the_shared_product(tmp_path):
    made, loop = clients_of(tmp_path, rounds=1)
    shared = loop.run()
    made.save(tmp_path / "adapter", shared)
    made.adapter.load(shared)
    ids = torch.arange(10, 26).view(2, 8)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
    expected, logits = made.adapter.model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    assert loaded.peft_config["default"].r == 4 and loaded.peft_config["default"].lora_alpha == 8
    # it learned something
    assert (logits - tiny().eval()(input_ids=ids).logits).abs().max() > 1e-3


def tiny():
    torch.manual_seed(0)
    return tiny_model()


@pytest.mark.parametrize("method", [pytest.param("flora", marks=pytest.mark.slow), "fedex_lora"])
def test_what_went_into_the_base_is_saved_in_the_adapter(method, tmp_path):
    made, loop = clients_of(tmp_path, method=method)
    shared = loop.run()
    made.adapter.load(shared)
    ids = torch.arange(10, 26).view(2, 8)
    expected = made.adapter.model.eval()(input_ids=ids).logits
    assert any(pair[1].any() for pair in shared.base.values())
    made.save(tmp_path / "adapter", shared)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    # and the base in memory is its own again for what the run began with
    made.adapter.load(made.start)
    torch.testing.assert_close(
        made.adapter.model(input_ids=ids).logits, tiny().eval()(input_ids=ids).logits, atol=0, rtol=0
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    straight = clients_of(tmp_path, rounds=3)[1].run()
    for rounds, resume in ((1, False), (3, True)):
        made, _ = clients_of(tmp_path, rounds=rounds)
        loop = FederatedLoop(
            made.start, made.rows, made, settings(rounds=rounds), tmp_path / "run", identity=made.identity()
        )
        shared = loop.run(resume)
    assert all(torch.equal(shared.B[name], value) for name, value in straight.B.items())
    other, _ = clients_of(tmp_path, model=adapted(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="is of another run: .*start was"):
        FederatedLoop(other.start, other.rows, other, settings(), tmp_path / "run", identity=other.identity()).run(True)


@pytest.mark.parametrize("kind", ["ours", pytest.param("trl", marks=pytest.mark.slow)])
def test_turns_leave_the_model_as_they_found_it(kind, tmp_path):
    """A trainer wraps the model's forward; a hundred of them would call each other."""
    made, loop = clients_of(tmp_path, build=builder(tmp_path, *KINDS[kind], max_steps=1), rounds=1)
    model = made.adapter.model
    found = _state(model)
    loop.run()
    assert _state(model) == found
    trainer = builder(tmp_path, *KINDS[kind])
    with without_folder():
        trainer(model, rows_of(1)["c0"], 0)
    assert _state(model) != found


def _state(model):
    return [
        (name, "forward" in module.__dict__, list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


class Ring:
    """Something that only a collection of garbage frees."""

    def __init__(self):
        self.own = self


@pytest.fixture
def unfrozen():
    """Thaw what the suite has frozen, and freeze it again."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.slow
def test_what_a_turn_leaves_behind_is_collected_and_nothing_else_is_looked_at(unfrozen):
    before = Ring()
    old, new = weakref.ref(before), []
    del before
    with pytest.raises(ZeroDivisionError), collected_alone():
        new.append(weakref.ref(Ring()))
        gc.collect()
        assert new[0]() is None and old() is not None
        new.append(weakref.ref(Ring()))
        raise ZeroDivisionError
    assert new[1]() is None and old() is not None and gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None
    # what somebody else froze stays so
    gc.freeze()
    with collected_alone():
        pass
    assert gc.get_freeze_count() > 0


def test_a_model_that_was_patched_before_keeps_its_patches():
    model = torch.nn.Linear(2, 2)
    own, calls = model.forward, []
    model.forward = lambda x: calls.append("patched") or own(x)
    handle = model.register_forward_hook(lambda *_: calls.append("hook"))
    with pytest.raises(ZeroDivisionError), left_as_found(model):
        model.forward = own
        model.register_forward_hook(lambda *_: calls.append("other"))
        raise ZeroDivisionError
    model(torch.ones(1, 2))
    assert calls == ["patched", "hook"]
    handle.remove()
    model(torch.ones(1, 2))
    assert calls == ["patched", "hook", "patched"]


@pytest.mark.parametrize("kind", ["trl", pytest.param("ours", marks=pytest.mark.slow)])
def test_rows_are_tokenised_once_a_client(kind, tmp_path):
    trainer, config = KINDS[kind]
    given = []
    plain = builder(tmp_path, trainer, config, max_steps=1)

    def build(model, rows, seed):
        given.append(rows)
        return plain(model, rows, seed)

    made, loop = clients_of(tmp_path, build=build, rounds=2)
    loop.run()
    tokenised = ["input_ids" in rows.column_names for rows in given]
    assert tokenised == [False, False, True, True]
    # and learn the same
    other, again = clients_of(tmp_path, build=build, rounds=2)
    other._keep_tokens = lambda *args: None
    again.run()
    assert all(torch.equal(again.shared.B[name], value) for name, value in loop.shared.B.items())


@pytest.mark.slow
def test_a_packed_data_set_is_packed_once(tmp_path):
    """What a trainer that packs has made of rows is not given to the next one, which would pack it again."""
    packed = []

    def build(model, rows, seed):
        made = builder(tmp_path, packing=True, padding_free=True, max_steps=1)(model, rows, seed)
        packed.append(made.train_dataset[:])
        return made

    made, loop = clients_of(tmp_path, build=build, rounds=2)
    loop.run()
    # packed again, several documents would count as one, each read by those behind it
    assert packed[:2] == packed[2:] and any(len(row) > 1 for row in packed[0]["seq_lengths"])


PRIVATE = dict(privacy_unit_column="person", rows_per_unit=3, expected_batch_size=2, max_steps=1)


@pytest.mark.slow
def test_a_private_trainer_is_a_client_whose_units_of_privacy_are_kept(tmp_path):
    """The rows that the first turn tokenised still say to whom each belongs; A is the shared one."""
    people = {name: rows.add_column("person", ["p0", "p1", "p2", "p0"]) for name, rows in rows_of(2, 4).items()}
    plain, units = builder(tmp_path, DPSFTTrainer, DPSFTConfig, noise_multiplier=1.0, **PRIVATE), []

    def build(model, rows, seed):
        made = plain(model, rows, seed)
        units.append(("input_ids" in rows.column_names, made._private.plan.units))
        return made

    made, loop = clients_of(tmp_path / "run", rows=people, build=build, method="ffa_lora")
    shared = loop.run()
    assert units == [(False, 3), (False, 3), (True, 3), (True, 3)]
    assert all(torch.equal(value, made.start.A[name]) for name, value in shared.A.items())
    assert all(value.any() for value in shared.B.values()) and not (tmp_path / "run").exists()


def test_an_orthonormal_start_is_drawn_by_the_seed(tmp_path):
    made, other = (clients_of(tmp_path, initial_a="orthonormal", federated_seed=seed)[0].start for seed in (0, 1))
    for name, a in made.A.items():
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-6, rtol=0)
        assert not torch.equal(a, other.A[name]) and not made.B[name].any()
    given = clients_of(tmp_path)[0].start
    plain = dict(adapted().named_parameters())
    assert all(torch.equal(a, plain[f"base_model.model.{n}.lora_A.default.weight"].data) for n, a in given.A.items())


def test_a_training_that_diverges_is_a_reply_with_a_fault(tmp_path):
    def build(model, rows, seed):
        made = builder(tmp_path)(model, rows, seed)

        def train():
            raise DivergedError("the loss is nan at step 2.")

        made.train = train
        return made

    made, _ = clients_of(tmp_path, build=build)
    reply = made(Task("c0", 1, 0, made.start))
    assert reply.fault == "its training diverged: the loss is nan at step 2."


def test_trainers_that_would_train_something_else_are_refused(tmp_path, monkeypatch):
    def turn(build, rows=None):
        made, _ = clients_of(tmp_path, build=build, rows=rows)
        made(Task("c0", 1, 0, made.start))

    def thawed(model, rows, seed):
        made = builder(tmp_path)(model, rows, seed)
        for name, value in model.named_parameters():
            value.requires_grad_("lora_" in name)
        return made

    with pytest.raises(ConfigError, match="the trainer of client c0 trains A of model.layers.0.self_attn.q_proj"):
        turn(thawed)
    # which the next turn does not inherit
    made, _ = clients_of(tmp_path, build=thawed)
    with pytest.raises(ConfigError, match="trains A"):
        made(Task("c0", 1, 0, made.start))
    made._build = builder(tmp_path, max_steps=1)
    assert made(Task("c0", 1, 0, made.start)).A == {}

    def after(change):
        """Build a trainer, and change the model then."""

        def build(model, rows, seed):
            made = builder(tmp_path)(model, rows, seed)
            change(model)
            return made

        return build

    def named(model, part):
        return next(value for name, value in model.named_parameters() if part in name)

    for change, said in (
        (lambda model: named(model, "mlp").requires_grad_(True), "trains model.layers.0.mlp.gate_proj.weight, which"),
        (lambda model: named(model, "lora_B").requires_grad_(False), "froze B of model.layers.0.self_attn.q_proj"),
        (lambda model: named(model, "lora_A").data.neg_(), "client c0 has another A of model.layers.0.self_attn.q_pr"),
        (lambda model: named(model, "lora_B").data.add_(1), "client c0 has another B of model.layers.0.self_attn.q_pr"),
    ):
        with pytest.raises(ConfigError, match=said):
            turn(after(change))

    def moving(model, rows, seed):
        made = builder(tmp_path, max_steps=1)(model, rows, seed)
        own = made.training_step
        made.training_step = lambda *args, **kwargs: (own(*args, **kwargs), named(model, "lora_A").data.neg_())[0]
        return made

    with pytest.raises(ConfigError, match="client c0 has another A of model.layers.0.self_attn.q_proj than it was"):
        turn(moving)
    with pytest.raises(ConfigError, match="saves or pushes by itself"):
        turn(builder(tmp_path, save_strategy="steps"))
    with pytest.raises(ConfigError, match="has another model than it was given"):
        turn(lambda model, rows, seed: builder(tmp_path)(adapted(), rows, seed))
    pairs = {name: make_pairs(8) for name in ("c0", "c1")}
    with pytest.raises(ConfigError, match=r"put a second adapter beside the shared one \(default, ref\)"):
        turn(builder(tmp_path, DPOTrainer, DPOConfig), pairs)
    with pytest.raises(ConfigError, match="build returned None for client c0; it must return a trainer of this lib"):
        turn(lambda *given: None)
    made, _ = clients_of(tmp_path)
    with pytest.raises(ConfigError, match="there is no client 'zz'; found c0, c1"):
        made(Task("zz", 1, 0, made.start))
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'x'; it must be a number of processes"):
        clients_of(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2: clients of one process take turns"):
        clients_of(tmp_path)


def test_factors_of_16_bits_are_shared_in_fp32(tmp_path):
    model = adapted().to(torch.bfloat16)
    start = clients_of(tmp_path, model)[0].start
    assert {value.dtype for side in (start.A, start.B) for value in side.values()} == {torch.float32}


def test_what_no_clients_can_be_made_of_is_refused(tmp_path):
    for rows in (None, 3, [], {}, {3: rows_of()["c0"]}, {"": rows_of()["c0"]}):
        with pytest.raises(ConfigError, match="rows is .*; it must be data sets by the client's id"):
            TrainerClients(adapted(), rows, builder(tmp_path), settings())
    for rows in (3, [1, 2], None):
        with pytest.raises(ConfigError, match="rows of client a is .*; it must be a datasets.Dataset"):
            TrainerClients(adapted(), {"a": rows}, builder(tmp_path), settings())
    with pytest.raises(ConfigError, match="build is 3; it must be a function"):
        TrainerClients(adapted(), rows_of(), 3, settings())
    for ledgers in (3, "", ["a"]):
        with pytest.raises(
            ConfigError, match="ledgers is .*; it must be the path of a folder, or None for a temporary"
        ):
            TrainerClients(adapted(), rows_of(), builder(tmp_path), settings(), ledgers)
    with pytest.raises(ConfigError, match="config is {}; it must be a FederatedConfig"):
        TrainerClients(adapted(), rows_of(), builder(tmp_path), {})
    with pytest.raises(ConfigError, match="the model is a NoneType, without an adapter"):
        TrainerClients(None, rows_of(), builder(tmp_path), settings())


def test_adapters_that_cannot_be_shared_are_refused(tmp_path):
    def start(model, **given):
        return TrainerClients(model, rows_of(), builder(tmp_path), settings(**given))

    with pytest.raises(ConfigError, match="the model is a LlamaForCausalLM, without an adapter"):
        start(tiny_model())
    two = adapted()
    two.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="the model has the adapters default, other; clients train one"):
        start(two)
    for fields, said in (
        (dict(use_dora=True), "the adapter is no plain LoRA: use_dora is True"),
        (dict(bias="all"), "the adapter is no plain LoRA: bias is 'all'"),
        (dict(init_lora_weights="pissa"), "the adapter is no plain LoRA: init_lora_weights is 'pissa'"),
    ):
        with pytest.raises(ConfigError, match=said):
            start(adapted(**fields))
    scheme = adapted()
    scheme.peft_config["default"] = GiftSWConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="the adapter is no plain LoRA: it is one of the scheme gift_sw"):
        start(scheme)
    wide = adapted(r=100)
    with pytest.raises(ConfigError, match="q_proj has 64 inputs and the rank 100: .* or use `method: ffa_lora`"):
        start(wide)
    start(wide, method="ffa_lora")
    trained = adapted()
    with torch.no_grad():
        next(value for name, value in trained.named_parameters() if "lora_B" in name).fill_(1.0)
    with pytest.raises(ConfigError, match="initial_a is orthonormal, and B of model.layers.0.self_attn.q_proj is not"):
        start(trained, initial_a="orthonormal")
    embedded = adapted(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ConfigError, match="moves the base weights, and those of model.embed_tokens are no plain"):
        start(embedded, method="flora")
    with pytest.raises(ConfigError, match="A of model.embed_tokens is zero, and clients do not train it"):
        start(embedded)
    assert start(embedded, method="fedavg_lora").start.A["model.embed_tokens"].shape[0] == 4
