import copy
import itertools
import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from posttrain.mechanisms.length_sorting import sort_groups
from posttrain.mechanisms.prefix_sharing import (
    attention_cost,
    mismatch_reason,
    pack,
    pack_padded,
    self_check,
    share_prefixes,
    sliding_window,
    unsupported_reason,
)
from posttrain.mechanisms.row_groups import CHOSEN, RowGroups
from posttrain.models import tiny_model

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 64},
    "mistral": {},
}


def random_ids(rng, low, high):
    return [rng.randrange(3, 250) for _ in range(rng.randint(low, high))]


def random_groups(seed, count=6, answers=4):
    rng = random.Random(seed)
    prompts = [random_ids(rng, 1, 12) for _ in range(count)]
    return prompts, [[random_ids(rng, 1, 9) for _ in range(rng.randint(1, answers))] for _ in prompts]


def padded_batch(prompts, answers, side="right"):
    """The rows `prompt + answer` in order, padded, with the group of each."""
    rows = [(prompt, answer, i) for i, prompt in enumerate(prompts) for answer in answers[i]]
    width = max(len(p) + len(a) for p, a, _ in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for i, (prompt, answer, _) in enumerate(rows):
        start = 0 if side == "right" else width - len(prompt) - len(answer)
        end = start + len(prompt) + len(answer)
        batch["input_ids"][i, start:end] = torch.tensor(prompt + answer)
        batch["attention_mask"][i, start:end] = 1
        batch["labels"][i, start + len(prompt) : end] = torch.tensor(answer)
    return batch, [group for _, _, group in rows]


def fused(architecture="llama", attention="sdpa", **config):
    model = tiny_model(architecture, **(ARCHITECTURES[architecture] | config))
    model.set_attn_implementation(attention)
    for parameter in model.parameters():
        # random logits are nearly flat otherwise, and hide what a token sees
        parameter.data.mul_(3.0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    share_prefixes(model)
    return model


def scores(model, batch, packed=None):
    extra = {} if packed is None else {"packed": packed}
    return model(**batch, use_cache=False, fused_lm_head=True, **extra)


@pytest.mark.parametrize("cost", [0.0, 0.02, 10.0], ids=["one-row", "some-rows", "long-rows-dear"])
@pytest.mark.parametrize("seed", range(3))
def test_each_answer_sees_what_it_would_see_in_a_row_of_its_own(cost, seed):
    prompts, answers = random_groups(seed)
    packed = pack(prompts, answers, attention_cost=cost)
    visible, found = packed.visible()[:, 0], 0
    alone = [prompt + answer for prompt, several in zip(prompts, answers, strict=True) for answer in several]
    for source, label, target in zip(packed.sources, packed.labels, packed.targets, strict=True):
        row, place = divmod(int(source), packed.input_ids.shape[1])
        answer, column = divmod(int(target), packed.shape[1])
        seen = visible[row, place].nonzero().squeeze(1)
        assert packed.input_ids[row, seen].tolist() == alone[answer][: column + 1]
        assert packed.position_ids[row, seen].tolist() == list(range(column + 1))
        assert int(label) == alone[answer][column + 1]
        found += 1
    assert found == sum(len(answer) for several in answers for answer in several)


def test_what_a_row_costs_decides_how_much_goes_into_it():
    prompts, answers = random_groups(0, count=8, answers=2)
    free, dear = pack(prompts, answers, attention_cost=0.0), pack(prompts, answers, attention_cost=10.0)
    assert free.input_ids.shape[0] == 1 and free.forwarded == free.tokens
    assert dear.input_ids.shape[0] > 4
    assert dear.tokens >= free.tokens, "short prompts are repeated rather than shared"


def test_scores_come_back_in_the_callers_order():
    prompts, answers = [[5, 6, 7], [8]], [[[11, 12], [13]], [[14, 15, 16]]]
    packed = pack(prompts, answers)
    values = packed.labels.float()
    assert [part.tolist() for part in packed.per_answer(values)] == [[11, 12], [13], [14, 15, 16]]
    assert packed.unpack(values).tolist() == [[0, 0, 11, 12], [0, 0, 13, 0], [14, 15, 16, 0]]


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([[5], []], [[[6]], [[7]]], "prompt 1 or one of its answers has no token"),
        ([], [], "there is no prompt to pack"),
        ([[5], [6]], [[[7]], []], "prompt 1 has no answer"),
        ([[5.5]], [[[6]]], "the token ids of prompt 0 are not whole numbers"),
    ],
)
def test_nothing_to_pack_is_refused(prompts, answers, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, answers)


def test_odd_batches_are_refused_or_read_right():
    batch, groups = padded_batch([[5, 6], [7]], [[[50005]], [[60007]]])
    expected = pack_padded(*batch.values(), groups)
    halves = pack_padded(batch["input_ids"], batch["attention_mask"].half(), batch["labels"], groups)
    assert torch.equal(halves.input_ids, expected.input_ids) and torch.equal(halves.labels, expected.labels)
    with pytest.raises(ValueError, match="there are 1 groups for 2 rows"):
        pack_padded(*batch.values(), [0])
    with pytest.raises(ValueError, match="token ids are whole numbers"):
        pack_padded(batch["input_ids"].float(), batch["attention_mask"], batch["labels"], groups)
    with pytest.raises(ValueError, match="multiple is 0"):
        pack_padded(*batch.values(), groups, multiple=0)
    mixed = pack([np.array([5, 6], np.int32)], [[np.array([7], np.int64), [8]]])
    assert mixed.unshared == 0 and mixed.tokens == 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shapes_for_kernels_leave_the_numbers(attention):
    """Wide steps, few numbers of rows, and a second row of padding alone, which is no number and no gradient."""
    model = fused(attention=attention)
    for groups in (random_groups(3), random_groups(0, count=1)):
        batch, of_rows = padded_batch(*groups)
        plain = pack_padded(**batch, groups=of_rows)
        shaped = pack_padded(**batch, groups=of_rows, multiple=128, few_shapes=True, least_rows=2)
        assert shaped.input_ids.size(0) >= 2 and shaped.input_ids.size(1) % 128 == 0
        assert shaped.visible().any(-1).all()
        outputs = []
        for packed in (plain, shaped):
            model.zero_grad()
            found = scores(model, batch, packed).log_probs
            found.sum().backward()
            outputs.append((found.detach(), model.get_input_embeddings().weight.grad.clone()))
        for ours, theirs in zip(*outputs, strict=True):
            assert torch.isfinite(theirs).all()
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_packed_as_its_rows(side):
    prompts, answers = random_groups(3)
    batch, groups = padded_batch(prompts, answers, side)
    packed, direct = pack_padded(*batch.values(), groups), pack(prompts, answers)
    assert torch.equal(packed.input_ids, direct.input_ids) and torch.equal(packed.visible(), direct.visible())
    assert packed.unshared == 0
    labels = batch["labels"][:, 1:]
    assert torch.equal(packed.unpack(packed.labels), labels.masked_fill(labels == -100, 0))


def test_rows_of_one_group_with_other_prompts_stand_alone():
    batch, _ = padded_batch([[5, 6], [5, 7], [8, 9]], [[[11]], [[12]], [[13], [14]]])
    packed = pack_padded(*batch.values(), [0, 0, 1, 1])
    assert packed.unshared == 1
    assert packed.tokens == 3 + 3 + 4


def test_labels_with_holes_keep_their_places():
    batch, groups = padded_batch([[5, 6]], [[[11, 12, 13], [14, 15]]])
    batch["labels"][0, 3] = -100
    packed = pack_padded(*batch.values(), groups)
    assert packed.unpack(packed.labels).tolist() == [[0, 11, 0, 13], [0, 14, 15, 0]]


def test_a_batch_without_labels_or_with_holes_in_its_rows_is_left_alone():
    batch, groups = padded_batch(*random_groups(0))
    assert (
        pack_padded(batch["input_ids"], batch["attention_mask"], torch.full_like(batch["labels"], -100), groups) is None
    )
    batch["attention_mask"][:, 1] = 0
    assert pack_padded(*batch.values(), groups) is None


def test_packing_real_lengths_pads_under_a_tenth():
    rng, forwarded, tokens = random.Random(0), 0, 0
    for _ in range(50):
        # as in dialogues: long tails on both
        prompts = [[7] * max(5, int(rng.lognormvariate(4.8, 0.7))) for _ in range(4)]
        answers = [[[8] * max(2, int(rng.lognormvariate(3.7, 0.8))) for _ in range(2)] for _ in prompts]
        packed = pack(prompts, answers, attention_cost=3e-4)
        forwarded, tokens = forwarded + packed.forwarded, tokens + packed.tokens
    assert 1 - tokens / forwarded < 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cost", [0.0, 0.02], ids=["one-row", "some-rows"])
def test_the_padded_numbers_come_back(architecture, attention, cost):
    model = fused(architecture, attention)
    batch, groups = padded_batch(*random_groups(1))
    packed = pack_padded(*batch.values(), groups, attention_cost=cost)
    weights = torch.rand(batch["input_ids"].shape[0], generator=torch.Generator().manual_seed(0)) - 0.5
    gradients, outputs = [], []
    for form in (None, packed):
        model.zero_grad()
        outputs.append(scores(model, batch, form))
        (outputs[-1].log_probs.sum(dim=1) * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    padded, shared = outputs
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(shared, name), getattr(padded, name), rtol=0, atol=1e-4)
    assert torch.equal(shared.is_top1, padded.is_top1) and torch.equal(shared.label_mask, padded.label_mask)
    assert shared.loss.item() == pytest.approx(padded.loss.item(), rel=1e-5)
    assert padded.log_probs.std() > 0.1
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.slow
def test_flex_attention_takes_a_block_mask(monkeypatch):
    # upstream's compiler builds broken code where ATen is told to use less than the machine has
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    batch, groups = padded_batch(*random_groups(1))
    model = fused(attention="flex_attention")
    with torch.no_grad():
        padded = scores(fused(), batch)
        shared = scores(model, batch, pack_padded(*batch.values(), groups))
    torch.testing.assert_close(shared.log_probs, padded.log_probs, rtol=0, atol=1e-4)


def test_other_implementations_are_refused():
    with pytest.raises(ValueError, match="flash_attention_2"):
        pack([[5]], [[[6]]]).attention_mask("flash_attention_2", torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_changing_one_answer_changes_no_other(attention):
    model = fused(attention=attention)
    prompts, answers = [[5, 6, 7, 8]], [[[11, 12, 13], [14, 15], [16, 17, 18]]]
    results = []
    for second in ([14, 15], [200, 3]):
        answers[0][1] = second
        batch, groups = padded_batch(prompts, answers)
        with torch.no_grad():
            results.append(scores(model, batch, pack_padded(*batch.values(), groups)).log_probs)
    before, after = results
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ([5], [[11], [12]]),
        ([5, 6, 7], [[11], [12, 13, 14, 15]]),
        ([5, 6, 7], [[11, 12, 13], [11, 12, 13]]),
        ([5, 6, 7], [[7], [6, 7]]),
    ],
    ids=["one-token-each", "one-token-answer", "equal-answers", "answers-of-prompt-tokens"],
)
def test_the_smallest_shapes(prompt, answers):
    model = fused()
    batch, groups = padded_batch([prompt], [answers])
    with torch.no_grad():
        padded, shared = scores(model, batch), scores(model, batch, pack_padded(*batch.values(), groups))
    torch.testing.assert_close(shared.log_probs, padded.log_probs, rtol=0, atol=1e-5)


def test_a_bool_mask_under_eager_is_the_error_that_the_float_mask_avoids():
    model = fused(attention="eager")
    batch, groups = padded_batch(*random_groups(1))
    with torch.no_grad():
        padded = scores(model, batch).log_probs
        right = pack_padded(*batch.values(), groups)
        wrong = pack_padded(*batch.values(), groups)
        wrong._masks["eager", torch.float32] = wrong.visible()
        errors = [(scores(model, batch, packed).log_probs - padded).abs().max() for packed in (right, wrong)]
    assert errors[0] <= 1e-4 and errors[1] > 1e-2


def test_a_repeated_prompt_token_would_see_itself_twice():
    # the layout of the published code: each further answer starts with a copy of the prompt's last token
    model = fused()
    prompts, answers = [[5, 6, 7, 8]], [[[11, 12, 13], [14, 15]]]
    batch, groups = padded_batch(prompts, answers)
    with torch.no_grad():
        padded = scores(model, batch).log_probs
        right = pack_padded(*batch.values(), groups)
        doubled = pack(prompts, [[[11, 12, 13], [8, 14, 15]]])
        second = doubled.branches == 2
        doubled.position_ids[second] -= 1
        own = doubled.targets >= doubled.shape[1]
        # the copy, seeing the original, predicts the answer's first token
        doubled.targets[own] -= 1
        doubled.sources, doubled.labels, doubled.targets = (
            x[~(own & (doubled.targets == doubled.targets[own].min()))]
            for x in (doubled.sources, doubled.labels, doubled.targets)
        )
        doubled.shape = tuple(padded.shape)
        places = {int(t): int(s) for t, s in zip(doubled.targets, doubled.sources, strict=True)}
        wrong = scores(model, batch, doubled).log_probs
        error = (scores(model, batch, right).log_probs - padded).abs().max()
    assert len(places) == 5 and error <= 1e-5
    assert (wrong[1, 3:] - padded[1, 3:]).abs().max() > 1e-3


def test_the_check_finds_a_model_that_ignores_the_mask():
    model = fused()
    assert self_check(model.eval(), 259, "cpu")[0] < 1e-4
    backbone = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: backbone(*args, **kwargs)
    assert self_check(model, 259, "cpu")[0] > 2e-2


def test_the_check_finds_a_model_that_ignores_positions():
    model = fused()
    backbone = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: backbone(*args, **kwargs)
    assert self_check(model, 259, "cpu")[0] > 2e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weights", [0.6, 1.0])
def test_half_precision_is_told_from_a_model_that_ignores_the_mask(architecture, weights):
    model = fused(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(weights)
    model = model.bfloat16().eval()
    assert mismatch_reason(*self_check(model, 259, "cpu"), half=True) is None
    backbone = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: backbone(*args, **kwargs)
    assert "packed log-probs differ" in mismatch_reason(*self_check(model, 259, "cpu"), half=True)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("llama", {"_attn_implementation": "flash_attention_2"}, "flash_attention_2 takes no mask"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention do not go by a mask"),
        ("llama", {"alibi": True}, "ALiBi"),
        ("llama", {"output_router_logits": True}, "auxiliary loss"),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("llama", {}, None),
    ],
)
def test_what_stands_in_the_way_is_named(architecture, changes, reason):
    config = tiny_model(architecture).config
    for name, value in changes.items():
        setattr(config, name, value)
    found = unsupported_reason(config)
    assert found is None if reason is None else reason in found


def test_models_that_place_tokens_themselves_are_found():
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert "linear_attention do not go by a mask" in unsupported_reason(mamba.config, mamba)
    mpt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mpt", vocab_size=50, d_model=16, n_heads=2, n_layers=1)
    )
    assert "MptForCausalLM builds its positions itself" in unsupported_reason(mpt.config, mpt)


def test_windows_of_other_names_are_found():
    neo = AutoConfig.for_model("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=7)
    assert "local attention goes by the place in the row" in unsupported_reason(neo)
    assert sliding_window(tiny_model("mistral", sliding_window=9).config) == 9
    assert sliding_window(tiny_model("qwen2").config) is None


def test_positions_counted_from_the_padding_id_are_found():
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    roberta = AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", is_decoder=True, **sizes))
    assert "counts positions from its padding id" in unsupported_reason(roberta.config, roberta)


def test_layers_of_different_sizes_have_a_cost_too():
    assert attention_cost(AutoConfig.for_model("gemma3n_text")) > 0


def test_generation_and_plain_calls_are_as_before():
    model = fused().eval()
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
    assert model(input_ids=ids).logits.shape == (1, 3, 259)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_is_added_gives_what_a_bool_one_gives_bit_for_bit(dtype):
    packed = pack(*random_groups(0))
    rows, _, width, _ = packed.visible().shape
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, 2, width, 16, generator=generator).to(dtype) for _ in range(3)]
    results = []
    for mask in (packed.visible(), packed._added(dtype, -torch.inf)):
        inputs = [one.clone().requires_grad_() for one in drawn]
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
        output.float().square().sum().backward()
        results.append([output.detach(), *(one.grad for one in inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not packed._added(dtype, -torch.inf).isinf().all(dim=-1).any()


def test_off_the_cpu_sdpa_takes_one_added_mask_for_all_layers():
    packed = pack(*random_groups(0)).to("meta")
    mask = packed.attention_mask("sdpa", torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask is packed.attention_mask("sdpa", torch.bfloat16)
    packed.drop_masks()
    assert mask is not packed.attention_mask("sdpa", torch.bfloat16)
    assert pack(*random_groups(0)).attention_mask("sdpa", torch.bfloat16).dtype == torch.bool


@pytest.mark.parametrize(("weights", "autocast"), [("float32", True), ("bfloat16", False), ("float32", False)])
def test_an_added_mask_has_the_dtype_of_the_queries(weights, autocast, monkeypatch):
    model, (batch, groups) = fused().to(getattr(torch, weights)), padded_batch(*random_groups(0))
    packed, seen, attention = pack_padded(*batch.values(), groups), [], torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None, **kwargs):
        # what autocast makes of the queries within the call
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        seen.append((attn_mask.dtype, low, id(attn_mask)))
        return attention(query, key, value, attn_mask=attn_mask, **kwargs)

    def as_elsewhere(self, implementation, dtype):
        return self._masks.setdefault(dtype, self._added(dtype, -torch.inf))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = scores(model, batch, packed).log_probs
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        monkeypatch.setattr(type(packed), "attention_mask", as_elsewhere)
        assert torch.equal(scores(model, batch, packed).log_probs, expected)
    assert len(seen) == 2 and all(mask == low for mask, low, _ in seen) and len({own for *_, own in seen}) == 1


def test_a_batch_goes_to_a_device_in_one_transfer():
    packed = pack(*random_groups(0))
    moved = packed.to("meta")
    for name in ("input_ids", "position_ids", "blocks", "branches", "sources", "labels", "targets"):
        own, other = getattr(packed, name), getattr(moved, name)
        assert (other.device.type, other.dtype, other.shape) == ("meta", own.dtype, own.shape)
    assert (moved.shape, moved.tokens, moved.longest) == (packed.shape, packed.tokens, packed.longest)


def test_the_cost_of_attention_grows_with_the_share_of_its_work():
    small = attention_cost(tiny_model(hidden_size=64).config)
    assert 0 < attention_cost(tiny_model(hidden_size=64, intermediate_size=1024).config) < small


def test_sorting_deals_the_same_pairs_out_by_length():
    rng = random.Random(0)
    batches, number = [], itertools.count(1)
    for size in (2, 2, 1):
        lengths = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(size)]
        width = max(max(pair) for pair in lengths)
        rows = [pair[side] for side in (0, 1) for pair in lengths]
        mask = (torch.arange(width) < torch.tensor(rows).unsqueeze(1)).long()
        own = torch.tensor([next(number) for _ in range(size)])
        batches.append(
            {"input_ids": mask * own.repeat(2).unsqueeze(1), "attention_mask": mask, "ref_chosen_logps": own.float()}
            | {"real_rows": size}
        )
    sides = {"ref_chosen_logps": CHOSEN}
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in batches]
    after = sort_groups(batches, [RowGroups.pairs(batch["real_rows"]) for batch in batches], sides, lengths)
    assert [batch["real_rows"] for batch in after] == [2, 2, 1]
    assert sorted(x for batch in after for x in batch["ref_chosen_logps"].tolist()) == [1, 2, 3, 4, 5]
    totals = []
    for batch in after:
        size = batch["real_rows"]
        assert (
            batch["input_ids"].shape[0] == 2 * size
            and batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        )
        for i, name in enumerate(batch["ref_chosen_logps"].tolist()):
            for row in (i, i + size):
                assert set(batch["input_ids"][row].tolist()) <= {0, int(name)}
            totals.append(int(batch["attention_mask"][[i, i + size]].sum()))
    assert totals == sorted(totals, reverse=True)


def test_a_deep_copy_runs_its_own_weights():
    model = fused()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        batch, groups = padded_batch(*random_groups(0, count=2, answers=2))
        packed = pack_padded(*batch.values(), groups, attention_cost=0.0)
        own, other, shared = (
            scores(m, batch, p).log_probs for m, p in ((model, None), (copied, None), (copied, packed))
        )
    assert (own - other).abs().max() > 0.1 and (shared - other).abs().max() < 1e-4


def test_the_check_finds_a_model_that_left_padding_moves():
    sizes = dict(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).eval()
    model.transformer.wpe.weight.data *= 50
    add_fused_lm_head(model)
    share_prefixes(model)
    assert self_check(model, 259, "cpu")[0] < 1e-4
    assert self_check(model, 259, "cpu", left=True)[0] > 0.01
    assert self_check(fused(), 259, "cpu", left=True)[0] < 1e-4
