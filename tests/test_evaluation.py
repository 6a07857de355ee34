import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.data.generated import reverse_list_pairs
from posttrain.evaluation import score_pairs
from posttrain.models import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def pairs():
    # Lists of two and of four words, so that lengths differ and the batches are sorted.
    from datasets import concatenate_datasets

    return concatenate_datasets([reverse_list_pairs(4, 0, words=4), reverse_list_pairs(5, 0, words=2)])


def by_hand(model, tokenizer, row, side):
    """The same figure without batch, padding or fused head: softmax of all logits, one sequence at a time."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, :-1]
    per_token = logits.log_softmax(-1)[torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
    return per_token[len(prompt) - 1 :].sum().item()


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_scores_are_the_summed_log_probabilities_of_the_answers_in_the_order_of_the_rows(pairs, architecture):
    model, tokenizer = tiny_model(architecture, initializer_range=0.2), byte_tokenizer()
    scores = score_pairs(model, tokenizer, pairs, batch_size=3)
    for side in ("chosen", "rejected"):
        expected = [by_hand(model, tokenizer, row, side) for row in pairs]
        assert getattr(scores, side).tolist() == pytest.approx(expected, abs=1e-3)
    assert torch.equal(scores.margins, scores.chosen - scores.rejected)
    assert scores.chosen.std() > 10


def test_scores_do_not_depend_on_the_batch_size_and_progress_counts_every_sequence(pairs):
    model, tokenizer, done = tiny_model(initializer_range=0.2), byte_tokenizer(), []
    small = score_pairs(model, tokenizer, pairs, batch_size=1)
    large = score_pairs(model, tokenizer, pairs, batch_size=100, progress=done.append)
    assert torch.allclose(small.chosen, large.chosen, atol=1e-3)
    assert done == [18]
    assert torch.equal(score_pairs(model, tokenizer, pairs.to_list(), batch_size=1).chosen, small.chosen)


def test_an_adapter_counts_and_can_be_disabled(pairs):
    tokenizer = byte_tokenizer()
    base = score_pairs(tiny_model(), tokenizer, pairs)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted = score_pairs(model, tokenizer, pairs)
    assert not torch.allclose(adapted.chosen, base.chosen, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(score_pairs(model, tokenizer, pairs).chosen, base.chosen, atol=1e-3)


def test_the_model_is_left_as_it_was(pairs):
    model = tiny_model().train()
    score_pairs(model, byte_tokenizer(), pairs)
    assert model.training
    assert "forward" not in vars(model)


def test_plain_text_pairs_are_scored_with_the_end_of_sequence_token(pairs):
    from datasets import Dataset

    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    scores = score_pairs(model, tokenizer, Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}]))
    whole = tokenizer("a b c<|im_end|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        per_token = model(whole).logits[0, :-1].log_softmax(-1)[torch.arange(5), whole[0, 1:]]
    assert scores.chosen.item() == pytest.approx(per_token[2:].sum().item(), abs=1e-3)


def test_a_sliding_window_shorter_than_a_row_is_minded(pairs):
    model, tokenizer = tiny_model("mistral", sliding_window=12, initializer_range=0.2), byte_tokenizer()
    scores = score_pairs(model, tokenizer, pairs)
    expected = [by_hand(model, tokenizer, row, "chosen") for row in pairs]
    assert scores.chosen.tolist() == pytest.approx(expected, abs=1e-3)
