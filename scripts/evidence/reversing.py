"""A small llama trained from nothing on lists of words, for evidence about answers in the right order or not."""

from collections.abc import Callable
from pathlib import Path

STEPS = 1200


def as_text(row: dict) -> dict:
    """The words alone: a prompt `a b c >` and answers in words."""
    words = {key: row[key][-1]["content"].replace(",", "") for key in ("prompt", "chosen", "rejected")}
    return {"prompt": words["prompt"] + " >", "chosen": " " + words["chosen"], "rejected": " " + words["rejected"]}


def pretrain(folder: Path, seed: int, words: int) -> str:
    """A small llama and a word tokenizer, trained from nothing to answer with the prompt's words in any order."""

    def draw(rng, known: list[str]) -> list[str]:
        order = rng.sample(known, words)
        return [*order, ">", *rng.sample(order, words), "<eos>"]

    return train_from_nothing(folder, seed, [], draw, words + 1, STEPS)


def train_from_nothing(
    folder: Path,
    seed: int,
    signs: list[str],
    draw: Callable,
    prompt: int,
    steps: int,
    width: int = 128,
    inner: int = 256,
) -> str:
    """A llama of 4 layers and a word tokenizer, trained on texts of equal length; one that is in the folder is kept.

    `signs`: words of the vocabulary beside the generated ones. `draw(rng, words)` gives the words of a text, whose
    first `prompt` ones are not learned. `width`, `inner`: of the hidden and the inner states.
    """
    if (folder / "tokenizer.json").exists():
        return str(folder)
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.generated import WORDS
    from posttrain.models import tiny_model

    vocabulary = {word: place for place, word in enumerate(["<eos>", "<pad>", ">", *signs, *WORDS])}
    by_words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_words.add_special_tokens(["<eos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_words, eos_token="<eos>", pad_token="<pad>")
    model = tiny_model(
        seed=seed,
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=4,
        head_dim=width // 4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    rng = random.Random(5000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        ids = torch.tensor([[vocabulary[word] for word in draw(rng, WORDS)] for _ in range(64)])
        labels = ids.clone()
        labels[:, :prompt] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"base {seed}: last loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
