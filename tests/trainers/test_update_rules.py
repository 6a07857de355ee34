"""What is done between a step's gradients and its update: optimizers by name, agreement of micro-gradients, SAM."""

import contextlib
import math
import re

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig

from posttrain import RobustDPOTrainer
from posttrain.adapters.refactoring import factors_of
from posttrain.errors import ConfigError, DivergedError
from posttrain.run.sharpness import Sharpness
from posttrain.run.update_config import check_precision_to_come
from tests.families import METHODS
from tests.runs import distance, entries, fit, identical, lora, losses, trainable

# each family's step of eight rows, as so many micro-batches of two
SPLIT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
FAMILIES = {
    "robust_dpo": dict(prefix_sharing="never"),
    "a_lol": dict(variant="a_lol_seq", baseline=-0.1, value="column", learning_rate=0.003),
    "noisy_sft": {},
}
ADEMAMIX = dict(optim="pytorch_optimizer:ademamix", optim_args="betas=(0.8,0.9,0.99),alpha=2", learning_rate=1e-3)


@pytest.fixture(autouse=True)
def silence(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def train(name, folder, output_dir, **settings):
    return METHODS[name].train(folder, output_dir, **FAMILIES.get(name, {}) | settings)


# optimizers by name


@pytest.mark.core("robust_dpo")
@pytest.mark.parametrize("name", [*FAMILIES, "policy_gradient"])
def test_a_named_optimizer_is_the_class_built_by_hand(name, tiny_folder, tmp_path):
    import pytorch_optimizer

    change, trainer = train(name, tiny_folder, tmp_path / "named", **ADEMAMIX, weight_decay=0.1)
    assert trainer.optimizer.optimizer.__class__ is pytorch_optimizer.AdEMAMix
    settings = FAMILIES.get(name, {}) | dict(learning_rate=1e-3, weight_decay=0.1)
    by_hand = METHODS[name].build(tiny_folder, tmp_path / "hand", **settings)
    trained = [parameter for parameter in by_hand.model.parameters() if parameter.requires_grad]
    # every trained tensor is a matrix, and decays
    by_hand.optimizer = pytorch_optimizer.AdEMAMix(
        trained, lr=1e-3, betas=(0.8, 0.9, 0.99), alpha=2.0, weight_decay=0.1, weight_decouple=True
    )
    assert identical(change, fit(by_hand)[0])


@pytest.mark.core("pytorch_optimizer:ademamix")
@pytest.mark.parametrize("optim", ["pytorch_optimizer:ademamix", "pytorch_optimizer:sgdsai"])
def test_a_run_with_one_goes_on_bit_for_bit(optim, tiny_folder, tmp_path):
    run = dict(optim=optim, learning_rate=1e-3, max_steps=4, save_strategy="steps", save_steps=2)
    _, straight = train("noisy_sft", tiny_folder, tmp_path, **run)
    checkpoint = tmp_path / "checkpoint-2"
    _, resumed = train("noisy_sft", tiny_folder, tmp_path, resume=str(checkpoint), **run | dict(save_strategy="no"))
    assert identical(trainable(resumed.model), trainable(straight.model))
    with pytest.raises(ConfigError, match=f"optim: {optim} there, pytorch_optimizer:ano here"):
        train("noisy_sft", tiny_folder, tmp_path, **run | dict(optim="pytorch_optimizer:ano"))
    if optim.endswith("ademamix"):
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        state["state"][0]["exp_avg_slow"] = torch.zeros(3, 3)
        torch.save(state, checkpoint / "optimizer.pt")
        # damaged beside its marker, and of another shape
        with pytest.raises(ConfigError, match="optimizer.pt"):
            train("noisy_sft", tiny_folder, tmp_path, resume=str(checkpoint), **run | dict(save_strategy="no"))


@pytest.mark.slow
def test_the_card_and_the_settings_of_a_run_name_it(tiny_folder, tmp_path):
    _, trainer = train("noisy_sft", tiny_folder, tmp_path, **ADEMAMIX)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "pytorch_optimizer:ademamix" in card and "betas=(0.8,0.9,0.99),alpha=2" in card


def test_an_optimizer_given_beside_the_name_of_another_is_refused(tiny_folder, tmp_path):
    from tests import training
    from tests.conftest import make_pairs

    args = METHODS["robust_dpo"].config(**training.settings(tmp_path, **ADEMAMIX))
    given = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="optim is pytorch_optimizer:ademamix, and optimizers was given as well"):
        RobustDPOTrainer(
            tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=training.lora(), optimizers=(given, None)
        )


@pytest.mark.slow
def test_a_schedule_free_run_saves_the_weights_that_it_ends_at_and_goes_on(tiny_folder, tmp_path):
    run = dict(optim="pytorch_optimizer:schedulefreeadamw", learning_rate=1e-2, max_steps=4)
    run |= dict(save_strategy="steps", save_steps=2)
    _, straight = train("noisy_sft", tiny_folder, tmp_path, **run)
    ended = trainable(straight.model)
    checkpoint = str(tmp_path / "checkpoint-2")
    _, resumed = train("noisy_sft", tiny_folder, tmp_path, resume=checkpoint, **run)
    assert identical(trainable(resumed.model), ended)
    straight.optimizer.train()
    assert not identical(trainable(straight.model), ended)
    straight.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rested = {key.replace(".default", ""): value for key, value in trainable(straight.model).items()}
    assert saved.keys() == rested.keys() and all(torch.equal(saved[key], rested[key]) for key in saved)
    assert distance(trainable(straight.model), ended) < 1e-5


# agreement of micro-gradients


def micro_gradients(name, folder, output_dir, **settings):
    """The gradients of the micro-batches of the first step, each its share of the step's."""
    trainer = METHODS[name].build(folder, output_dir, **FAMILIES.get(name, {}) | SPLIT | dict(max_steps=1) | settings)
    found, step = [], trainer.training_step
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def seeing(*args, **kwargs):
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        loss = step(*args, **kwargs)
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        for parameter, known in zip(parameters, before, strict=True):
            parameter.grad = known if parameter.grad is None else known + parameter.grad
        return loss

    trainer.training_step = seeing
    fit(trainer)
    return found


def by_hand(gradients, tau):
    """The step's gradient and the number accepted, from all micro-gradients at once."""
    flat = [torch.cat([part.flatten() for part in one]).double() for one in gradients]
    kept = [flat[0]]
    for one in flat[1:]:
        mean = torch.stack(kept).mean(dim=0)
        if 1 - torch.nn.functional.cosine_similarity(mean, one, dim=0) <= tau:
            kept.append(one)
    return torch.stack(kept).mean(dim=0) * len(flat), len(kept)


@pytest.mark.core("noisy_sft")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_update_is_the_mean_of_the_gradients_that_agree(name, tiny_folder, tmp_path):
    gradients = micro_gradients(name, tiny_folder, tmp_path / "plain")
    flat = torch.stack([torch.cat([part.flatten() for part in one]) for one in gradients]).double()
    # between the distances that the rule meets, one is accepted and one is not
    tau = next(t for t in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3) if 1 < by_hand(gradients, t)[1] < 4)
    wanted, accepted = by_hand(gradients, tau)
    change, trainer = train(name, tiny_folder, tmp_path / "ours", **SPLIT, max_steps=1, gradient_agreement=tau)
    moved = torch.cat([value.flatten() for value in change.values()]).double()
    rate = trainer.args.learning_rate
    assert (moved + rate * wanted).norm() <= 1e-4 * (rate * wanted).norm()
    # the plain sum is another
    assert (moved + rate * flat.sum(dim=0)).norm() > 1e-2 * (rate * wanted).norm()
    (entry,) = entries(trainer)
    assert entry["gradient_agreement/accepted"] == accepted / 4 and entry["gradient_agreement/skipped"] == 0
    assert 0 < entry["gradient_agreement/distance"] < 2


@pytest.mark.core("policy_gradient")
@pytest.mark.parametrize("name", [*FAMILIES, "policy_gradient"])
def test_where_all_agree_it_is_the_plain_step_bit_for_bit(name, tiny_folder, tmp_path):
    split = SPLIT if name != "policy_gradient" else {}
    plain, reference = train(name, tiny_folder, tmp_path / "plain", **split)
    change, trainer = train(name, tiny_folder, tmp_path / "ours", **split, gradient_agreement=2.0)
    assert identical(change, plain) and losses(trainer) == losses(reference)
    assert entries(trainer)[0]["gradient_agreement/accepted"] == 1


@pytest.mark.core("2.0")
@pytest.mark.parametrize("limit", [2.0, 1e-6])
def test_a_last_window_of_one_micro_batch_trains_plainly(limit, tiny_folder, tmp_path):
    # sixteen rows: seven micro-batches, then one
    run = dict(per_device_train_batch_size=2, gradient_accumulation_steps=7, max_steps=2)
    plain, reference = train("noisy_sft", tiny_folder, tmp_path / "plain", **run)
    change, trainer = train("noisy_sft", tiny_folder, tmp_path / "ours", **run, gradient_agreement=limit)
    assert [entry["gradient_agreement/skipped"] for entry in entries(trainer)] == [float(limit < 1), 0]
    assert any(value.any() for value in change.values())
    assert identical(change, plain) is (limit == 2.0)
    assert limit < 1 or losses(trainer) == losses(reference)


@pytest.mark.parametrize("limit", [None, 0.9])
def test_preference_rows_keep_their_micro_batches(limit, tiny_folder, tmp_path):
    run = dict(SPLIT, prefix_sharing="always", max_steps=1, gradient_agreement=limit)
    trainer = METHODS["robust_dpo"].build(tiny_folder, tmp_path, **run)
    found, sort = [], trainer.sorted_window

    def seen(batches):
        found.extend((batch, sorted_) for batch, sorted_ in zip(batches, sort(batches), strict=True))
        return [sorted_ for _, sorted_ in found]

    trainer.sorted_window = seen
    fit(trainer)
    assert len(found) == 4 and all((one is other) is (limit is not None) for one, other in found)


def test_a_step_in_which_none_agree_moves_nothing(tiny_folder, tmp_path, logged):
    run = dict(**SPLIT, max_steps=1, gradient_agreement=1e-6, optim="adamw_torch", weight_decay=0.5, max_grad_norm=1.0)
    change, trainer = train("noisy_sft", tiny_folder, tmp_path, **run)
    assert not any(value.any() for value in change.values())
    (entry,) = entries(trainer)
    assert entry["gradient_agreement/skipped"] == 1 and entry["gradient_agreement/accepted"] == 0.25
    assert trainer.state.global_step == 1 and not trainer.step_moved
    distance = entry["gradient_agreement/distance"]
    told = f"all 1 steps were skipped, .* Their mean cosine distance was {distance:.3f}"
    assert re.search(told, logged.text)
    assert trainer.found_in_training()["steps skipped by gradient_agreement"] == "1 of 1"
    # a step that is taken needs no word
    logged.clear()
    _, trainer = train("noisy_sft", tiny_folder, tmp_path / "other", **run | dict(gradient_agreement=2.0))
    assert "were skipped" not in logged.text
    assert trainer.found_in_training()["steps skipped by gradient_agreement"] == "0 of 1"


@pytest.mark.slow
def test_a_run_that_filters_goes_on_bit_for_bit(tiny_folder, tmp_path):
    run = dict(**SPLIT, gradient_agreement=0.9, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
    run |= dict(learning_rate=1e-3)
    _, straight = train("noisy_sft", tiny_folder, tmp_path, **run)
    checkpoint = str(tmp_path / "checkpoint-2")
    _, resumed = train("noisy_sft", tiny_folder, tmp_path, resume=checkpoint, **run | dict(save_strategy="no"))
    assert identical(trainable(resumed.model), trainable(straight.model))
    with pytest.raises(ConfigError, match="update_rule: gradient_agreement 0.9 there, gradient_agreement 1.1 here"):
        train("noisy_sft", tiny_folder, tmp_path, **run | dict(gradient_agreement=1.1))


# sharpness-aware minimisation


@pytest.mark.parametrize("rho", [0.0, 0, 1e-4, 10, 10.0])
def test_the_ends_of_the_range_of_sam_rho_are_taken(rho, tmp_path):
    args = METHODS["noisy_sft"].config(str(tmp_path), use_cpu=True, bf16=False, sam_rho=rho)
    assert args.sam_rho == rho and args.perturbs_weights is (rho > 0)


RHO = 0.3


# ALLoRA's gradients are scaled ones, at the weights themselves and at the moved ones
@pytest.mark.core("0.1-noisy_sft", "None-allora")
@pytest.mark.parametrize("name", [*FAMILIES, "allora"])
@pytest.mark.parametrize("share", [None, 0.1])
def test_the_update_is_a_sam_step_by_hand(name, share, tiny_folder, tmp_path):
    run = dict(max_steps=1, **METHODS[name].split(8))
    # with SGD, a change of one step is the rate times the gradient at the weights it began with
    clean, trainer = train(name, tiny_folder, tmp_path / "clean", **run)
    rate = trainer.args.learning_rate
    gradient = {key: -value.double() / rate for key, value in clean.items()}
    norm = torch.cat([value.flatten() for value in gradient.values()]).norm()
    more = {} if name in ("noisy_sft", "allora") else dict(check_reference=False)
    moved = METHODS[name].build(tiny_folder, tmp_path / "moved", **FAMILIES.get(name, {}) | run | more)
    sizes = torch.cat([value.abs().flatten() for value in gradient.values()])
    least = sizes.topk(math.ceil(len(sizes) * (share or 1))).values.min()
    with torch.no_grad():
        for key, parameter in moved.model.named_parameters():
            if key in gradient:
                kept = gradient[key] * (gradient[key].abs() >= least) if share else gradient[key]
                parameter.add_((kept * RHO / norm).to(parameter.dtype))
    wanted, _ = fit(moved)
    mask = dict(sam_mask="fisher", sam_mask_share=share) if share else {}
    change, ours = train(name, tiny_folder, tmp_path / "ours", sam_rho=RHO, **mask, **run)
    assert distance(change, wanted) < 1e-3
    assert distance(clean, wanted) > 1e-2
    (entry,) = entries(ours)
    assert entry["sam/gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert entry["sam/loss_increase"] == pytest.approx(entry["loss"] - losses(trainer)[0], abs=2e-4)


def products(trainer):
    """The changes B A that an adapter makes, and those that a run began with (none: B begins at zero)."""
    return {one.path: (one.B @ one.A).detach() for one in factors_of(trainer.model)}


@pytest.mark.core("allora")
@pytest.mark.parametrize("name", ["noisy_sft", "allora"])
def test_a_refactorisation_follows_the_step_of_sam(name, tiny_folder, tmp_path):
    run = dict(sam_rho=RHO, max_steps=2, save_strategy="steps", save_steps=1)
    _, plain = train(name, tiny_folder, tmp_path / "plain", **run | dict(save_strategy="no"))
    _, both = train(name, tiny_folder, tmp_path / "both", **run, refactor_every=2)
    # after its last step, so that both made the same changes
    assert distance(products(both), products(plain)) < 1e-5
    for one in factors_of(both.model):
        torch.testing.assert_close(one.A @ one.A.T, torch.eye(len(one.A)), atol=1e-5, rtol=0)
    _, without = train(name, tiny_folder, tmp_path / "off", **run | dict(save_strategy="no", sam_rho=0.0))
    assert distance(products(without), products(plain)) > 1e-2
    # and goes on from within
    checkpoint = str(tmp_path / "both" / "checkpoint-1")
    again = run | dict(save_strategy="no", refactor_every=2, resume=checkpoint)
    _, resumed = train(name, tiny_folder, tmp_path / "both", **again)
    assert identical(trainable(resumed.model), trainable(both.model))


@pytest.mark.slow
def test_allora_s_updates_are_scaled_by_the_weights_that_sam_has_put_back(tiny_folder, tmp_path):
    run = dict(sam_rho=RHO, max_steps=1, form="update")
    one, two = (train("allora", tiny_folder, tmp_path / str(eta), eta=eta, **run)[0] for eta in (1.0, 2.0))
    # there B is zero and all rows have eta; at the moved weights they would not
    wanted = {name: value * (2 if "lora_B" in name else 1) for name, value in one.items()}
    assert distance(two, wanted) < 1e-5 and any(value.any() for name, value in one.items() if "lora_A" in name)


@pytest.mark.core("noisy_sft")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_update_does_not_depend_on_the_split(name, tiny_folder, tmp_path, monkeypatch):
    run = dict(sam_rho=RHO, sam_mask="fisher", sam_mask_share=0.3)
    whole, _ = train(name, tiny_folder, tmp_path / "whole", **run, **METHODS[name].split(8))
    parts, _ = train(name, tiny_folder, tmp_path / "parts", **run, **METHODS[name].split(2))
    assert distance(parts, whole) < 1e-3
    plain, _ = train(name, tiny_folder, tmp_path / "plain", **METHODS[name].split(8))
    assert distance(plain, whole) > 1e-2
    # the wrong variant climbs by the first micro-batch alone
    monkeypatch.setattr(Sharpness, "begin", lambda self, batches: setattr(self, "_window", batches[:1]))
    wrong, _ = train(name, tiny_folder, tmp_path / "wrong", **run, **METHODS[name].split(2))
    assert distance(wrong, whole) > 1e-2


@pytest.mark.slow
def test_weights_that_are_not_put_back_are_told_apart(tiny_folder, tmp_path, monkeypatch):
    run = dict(sam_rho=RHO, **METHODS["noisy_sft"].split(2))
    right, _ = train("noisy_sft", tiny_folder, tmp_path / "right", **run)
    monkeypatch.setattr(Sharpness, "put_back", lambda self: None)
    wrong, _ = train("noisy_sft", tiny_folder, tmp_path / "wrong", **run)
    assert distance(wrong, right) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_nothing(reentrant, tiny_folder, tmp_path):
    run = dict(sam_rho=RHO, **METHODS["robust_dpo"].split(4))
    plain, _ = train("robust_dpo", tiny_folder, tmp_path / "plain", **run)
    again = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    change, _ = train("robust_dpo", tiny_folder, tmp_path / "again", **run, **again)
    assert distance(change, plain) < 1e-5


@pytest.mark.core("symnoise")
@pytest.mark.parametrize("noise", ["none", "symnoise"])
def test_a_run_with_sam_goes_on_bit_for_bit(noise, tiny_folder, tmp_path):
    run = dict(sam_rho=RHO, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3)
    run |= dict(SPLIT, gradient_accumulation_steps=2)
    run |= dict(embedding_noise=noise, noise_alpha=0.8) if noise != "none" else {}
    _, straight = train("noisy_sft", tiny_folder, tmp_path, **run)
    checkpoint = str(tmp_path / "checkpoint-2")
    _, resumed = train("noisy_sft", tiny_folder, tmp_path, resume=checkpoint, **run | dict(save_strategy="no"))
    assert identical(trainable(resumed.model), trainable(straight.model))
    with pytest.raises(ConfigError, match="update_rule: sam_rho 0.3 there, None here"):
        train("noisy_sft", tiny_folder, tmp_path, **run | dict(sam_rho=0.0))


@pytest.mark.slow
def test_noise_is_the_same_in_both_passes_however_the_step_is_split(tiny_folder, tmp_path):
    run = dict(sam_rho=RHO, embedding_noise="symnoise", noise_alpha=0.8)
    whole, _ = train("noisy_sft", tiny_folder, tmp_path / "whole", **run, **METHODS["noisy_sft"].split(8))
    parts, _ = train("noisy_sft", tiny_folder, tmp_path / "parts", **run, **METHODS["noisy_sft"].split(2))
    assert distance(parts, whole) < 1e-3
    weights = dict(sam_rho=RHO, pairs=True, prefix_sharing="never")
    whole, _ = METHODS["gift_sw"].train(tiny_folder, tmp_path / "w", **weights, **METHODS["gift_sw"].split(8))
    parts, _ = METHODS["gift_sw"].train(tiny_folder, tmp_path / "p", **weights, **METHODS["gift_sw"].split(2))
    assert distance(parts, whole) < 1e-3


def with_dropout(folder, output_dir, **settings):
    trainer = METHODS["noisy_sft"].build(folder, output_dir, **SPLIT | settings)
    for module in trainer.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    return trainer


FORK = torch.random.fork_rng


@contextlib.contextmanager
def as_it_goes_on(**given):
    """Let a pass draw from the state of the run."""
    yield


@contextlib.contextmanager
def other_draws(**given):
    """Draw other dropout in a pass, and leave the random state as it was."""
    with FORK(**given):
        torch.manual_seed(99)
        yield


@pytest.mark.slow
def test_both_passes_drop_the_same_and_count_once(tiny_folder, tmp_path, monkeypatch):
    plain, reference = fit(with_dropout(tiny_folder, tmp_path / "plain"))
    # the shortest step there is
    change, trainer = fit(with_dropout(tiny_folder, tmp_path / "ours", sam_rho=1e-4))
    assert distance(change, plain) < 1e-3
    for one, other in zip(entries(trainer), entries(reference), strict=True):
        assert one["num_tokens"] == other["num_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    # a step by hand, whose two gradients have one dropout
    run = dict(max_steps=1)
    clean, _ = fit(with_dropout(tiny_folder, tmp_path / "clean", **run))
    norm = torch.cat([value.flatten() for value in clean.values()]).norm()
    moved = with_dropout(tiny_folder, tmp_path / "moved", **run)
    with torch.no_grad():
        for key, parameter in moved.model.named_parameters():
            if key in clean:
                parameter.sub_(clean[key] * RHO / norm)
    wanted, _ = fit(moved)
    change, _ = fit(with_dropout(tiny_folder, tmp_path / "sam", sam_rho=RHO, **run))
    assert distance(change, wanted) < 1e-3
    # wrong variants: the first pass drops others, or the second one does
    with monkeypatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", other_draws)
        first, _ = fit(with_dropout(tiny_folder, tmp_path / "first", sam_rho=RHO, **run))
        patch.setattr(torch.random, "fork_rng", as_it_goes_on)
        second, _ = fit(with_dropout(tiny_folder, tmp_path / "second", sam_rho=RHO, **run))
        shortest, _ = fit(with_dropout(tiny_folder, tmp_path / "shortest", sam_rho=1e-4))
    assert min(distance(first, wanted), distance(second, wanted), distance(shortest, plain)) > 1e-2


def test_a_run_that_diverges_saves_the_weights_that_were_not_moved(tiny_folder, tmp_path, monkeypatch):
    trainer = METHODS["noisy_sft"].build(tiny_folder, tmp_path, sam_rho=RHO, **SPLIT)
    before, losses_seen = trainable(trainer.model), []
    compute = trainer.compute_loss

    def at_moved_weights(*args, **kwargs):
        losses_seen.append(compute(*args, **kwargs))
        if len(losses_seen) > 4:
            trainer._finite_loss.watch(trainer, losses_seen[-1] * float("nan"))
        return losses_seen[-1]

    trainer.compute_loss = at_moved_weights
    with pytest.raises(DivergedError, match="the weights after step 0 are in"):
        trainer.train()
    assert identical(trainable(trainer.model), before)


REFUSED = [
    ("noisy_sft", dict(gradient_agreement=0), "gradient_agreement is 0; it must be a number above 0 and at most 2"),
    ("noisy_sft", dict(gradient_agreement=2.5), "gradient_agreement is 2.5; it must"),
    ("noisy_sft", dict(gradient_agreement=float("nan")), "gradient_agreement is nan; it must"),
    ("noisy_sft", dict(gradient_agreement=True), "gradient_agreement is True; it takes a number"),
    ("noisy_sft", dict(gradient_agreement=0.9), "a step is one micro-batch, which has no other to agree with"),
    ("noisy_sft", dict(sam_rho=-0.1), "sam_rho is -0.1; it must be 0 or a number from 0.0001 to 10"),
    ("noisy_sft", dict(sam_rho=1e30), "sam_rho is 1e\\+30; it must be 0 or .* does not tell how the loss changes"),
    ("noisy_sft", dict(sam_rho=1e-30), "sam_rho is 1e-30; it must be 0 or .* a shorter one is lost to rounding"),
    ("noisy_sft", dict(sam_rho=10.5), "sam_rho is 10.5; it must"),
    ("noisy_sft", dict(sam_rho=9e-5), "sam_rho is 9e-05; it must"),
    ("noisy_sft", dict(sam_rho=float("inf")), "sam_rho is inf; it must"),
    ("noisy_sft", dict(sam_mask="fisher"), "sam_mask is fisher and sam_rho is 0"),
    ("noisy_sft", dict(sam_rho=0.1, sam_mask="fischer"), "Did you mean fisher"),
    ("noisy_sft", dict(sam_rho=0.1, sam_mask_share=0.5), "sam_mask_share is 0.5 and sam_mask is none"),
    ("noisy_sft", dict(sam_rho=0.1, sam_mask="fisher", sam_mask_share=0.0), "sam_mask_share is 0.0; it must"),
    ("noisy_sft", dict(sam_rho=0.1, gradient_agreement=0.9, **SPLIT), "their order is defined nowhere"),
    ("policy_gradient", dict(sam_rho=0.1), "sam_rho is 0.1, which this trainer does not use"),
    ("robust_dpo", dict(sam_rho=0.1, reduction="dr_dpo"), "sam_rho is 0.1 and reduction is dr_dpo"),
    (
        "robust_dpo",
        dict(gradient_agreement=0.9, reduction="dr_dpo", dr_dpo_window="rescale", **SPLIT),
        "dr_dpo_window is rescale and gradient_agreement is 0.9",
    ),
]


@pytest.mark.parametrize(("name", "given", "said"), REFUSED, ids=lambda part: str(part)[:50])
def test_what_cannot_be_is_refused_before_anything_loads(name, given, said, tmp_path):
    small = dict(num_generations=4, per_device_train_batch_size=4) if name == "policy_gradient" else {}
    with pytest.raises(ConfigError, match=said):
        METHODS[name].config(
            str(tmp_path), use_cpu=True, bf16=False, **small | dict(gradient_accumulation_steps=1) | given
        )


@pytest.mark.parametrize("rule", [dict(gradient_agreement=0.9), dict(sam_rho=0.1)])
def test_an_engine_that_keeps_gradients_in_parts_is_refused(rule, tmp_path, monkeypatch):
    args = METHODS["noisy_sft"].config(str(tmp_path), use_cpu=True, bf16=False, **SPLIT | rule)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="under FSDP, which keeps a step's gradients in parts"):
        args._check_update()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args.fp16 = True
    with pytest.raises(ConfigError, match="and fp16 is true"):
        args._check_update()
    args.fp16, args.optim = False, "lomo"
    monkeypatch.setattr("posttrain.run.optimizers.check", lambda args: None)
    with pytest.raises(ConfigError, match="moves weights within the backward pass"):
        args._check_update()


@pytest.mark.parametrize(
    ("given", "adapted", "said"),
    [
        (dict(model_init_kwargs={"dtype": "bfloat16"}), False, "the model is trained in bfloat16.*Set `dtype: "),
        (dict(model_init_kwargs={"dtype": torch.float16}), False, "the model is trained in float16"),
        (
            dict(model_init_kwargs={"quantization_config": {"load_in_4bit": True}}), True,
            "the adapter is trained in bfloat16.*leave load_in_4bit and load_in_8bit out, or sam_rho",
        ),
        (dict(model_init_kwargs={"dtype": "bfloat16"}), True, None),
        (dict(), False, None),
    ],
)  # fmt: skip
def test_sam_on_16_bits_is_refused_before_the_model_loads(given, adapted, said, tiny_folder, tmp_path):
    args = METHODS["noisy_sft"].config(str(tmp_path), use_cpu=True, bf16=False, report_to=[], sam_rho=0.1, **given)
    config = AutoConfig.from_pretrained(tiny_folder)
    adapter = lora() if adapted else None
    if said is None:
        check_precision_to_come(args, adapter, config)
        return
    with pytest.raises(ConfigError, match=said):
        check_precision_to_come(args, adapter, config)


def test_sam_on_weights_of_16_bits_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="is trained in bfloat16, where a perturbation of that size is lost"):
        METHODS["noisy_sft"].build(
            tiny_folder, tmp_path, sam_rho=0.05, peft=False, model_init_kwargs=dict(dtype="bfloat16")
        )
