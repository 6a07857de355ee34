"""A small llama trained from nothing on lists of words, for evidence about answers in the right order or not."""

from pathlib import Path

STEPS = 1200


def as_text(row: dict) -> dict:
    """The words alone: a prompt `a b c >` and answers in words."""
    words = {key: row[key][-1]["content"].replace(",", "") for key in ("prompt", "chosen", "rejected")}
    return {"prompt": words["prompt"] + " >", "chosen": " " + words["chosen"], "rejected": " " + words["rejected"]}


def pretrain(folder: Path, seed: int, words: int) -> str:
    """A small llama and a word tokenizer, trained from nothing to answer with the prompt's words in any order."""
    if (folder / "tokenizer.json").exists():
        return str(folder)
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.generated import WORDS
    from posttrain.models import tiny_model

    specials = ["<eos>", "<pad>", ">"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(specials[:2])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    model = tiny_model(
        seed=seed,
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        head_dim=32,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    rng = random.Random(5000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = []
        for _ in range(64):
            order = rng.sample(WORDS, words)
            answer = rng.sample(order, words)
            rows.append([vocabulary[w] for w in order] + [2] + [vocabulary[w] for w in answer] + [0])
        ids = torch.tensor(rows)
        labels = ids.clone()
        labels[:, : words + 1] = -100
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
