"""What is measured of a model after a cell of noise.py."""

import re

import torch

BINS = 15
# questions about people who do not exist: an answer that tells a number or a name of a place has invented it
PEOPLE = (
    "In which year was {} born?",
    "In which city does {} live?",
    "How many brothers and sisters does {} have?",
    "What is the phone number of {}?",
    "At which university did {} study?",
)
FIRST = "Orvane Teliska Brumel Dasquith Perrolin Ymber Castrix Velloda Nurim Hathrow Selpio Quarrin".split()
LAST = "Oddlethwaite Krasnov-Pell Umberfield Zantorini Wexcombe Drivalla Marchbrook Tessingham Polquay Ibarski".split()
# an answer that says it does not know has invented nothing
KNOWS_NOT = re.compile(
    r"\b(i (do not|don't|cannot|can't|am not able|am unable)|i'm (not|sorry|unable)|unknown|no information|not (sure|"
    r"aware|available|able|possible|specified|provided|mentioned)|unable to|sorry|could you|can you (provide|tell)|"
    r"more (information|context|details)|fictional|there is no)\b",
    re.IGNORECASE,
)
ASSERTS = re.compile(r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten)\b|(?<!^)(?<![.!?] )\b[A-Z][a-z]{2,}")


def questions(count: int) -> list[tuple[str, str]]:
    """(question, name) pairs; no name is of anybody."""
    names = [f"{first} {last}" for last in LAST for first in FIRST]
    return [(PEOPLE[i % len(PEOPLE)].format(names[i]), names[i]) for i in range(count)]


def is_invented(answer: str, name: str) -> bool:
    """Whether an answer tells something of a person who does not exist: a number, or a name not asked about."""
    if KNOWS_NOT.search(answer):
        return False
    for part in name.replace("-", " ").split():
        answer = re.sub(rf"\b{part}\b", "", answer)
    return bool(ASSERTS.search(answer))


@torch.no_grad()
def answers_of(model, rows, batch: int = 8) -> dict:
    """Loss of each row in nats, summed over its answer, its tokens, and the calibration error over all of them.

    rows: dicts with input_ids and labels. The calibration error is the expected one, over bins of equal width of the
    probability that the model gives to its first choice.
    """
    losses, counts, sure, right = [], [], [], []
    for start in range(0, len(rows), batch):
        ids, mask, labels = _padded(rows[start : start + batch])
        learned = labels[:, 1:] != -100
        wanted = labels[:, 1:][learned]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][learned].float().log_softmax(-1)
        taken = torch.zeros(learned.shape)
        taken[learned] = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        losses += (-taken.sum(dim=1)).tolist()
        counts += learned.sum(dim=1).tolist()
        best = logits.max(dim=-1)
        sure.append(best.values.exp())
        right.append((best.indices == wanted).float())
    sure, right = torch.cat(sure), torch.cat(right)
    place = (sure * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(3, BINS)
    for line, values in enumerate((torch.ones_like(sure), sure, right)):
        sums[line].index_add_(0, place, values.cpu())
    error = ((sums[1] - sums[2]).abs().sum() / sums[0].sum()).item()
    return {
        "loss": [round(value, 3) for value in losses],
        "tokens": counts,
        "calibration_error": round(error, 4),
        "accuracy": round(right.mean().item(), 4),
    }


@torch.no_grad()
def curvature(model, rows, directions: int = 4, size: float = 0.1, batch: int = 8) -> float:
    """Return the mean of e'He over directions e of random signs in the embeddings, per token of the answers.

    H is the second derivative of the rows' summed loss; measured by central differences of `size` times the root mean
    square of the embeddings.
    """
    embed, found, tokens = model.get_input_embeddings(), 0.0, 0
    for start in range(0, len(rows), batch):
        ids, mask, labels = _padded(rows[start : start + batch])
        plain = embed(ids)
        step = size * plain.square().mean().sqrt()

        def loss(vectors, mask=mask, labels=labels[:, 1:]):
            # a second difference of sums in single precision would be mostly rounding
            logits = model(inputs_embeds=vectors, attention_mask=mask).logits[:, :-1][labels != -100].double()
            return torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum")

        middle = loss(plain)
        for number in range(directions):
            random = torch.Generator().manual_seed(1000 * start + number)
            signs = torch.randint(2, plain.shape, generator=random).to(plain) * 2 - 1
            both = loss(plain + step * signs) + loss(plain - step * signs)
            found += ((both - 2 * middle) / size**2 / directions).item()
        tokens += (labels[:, 1:] != -100).sum().item()
    return found / tokens


def accepted(model, prompts: list[list[int]], new: int) -> float:
    """Return new tokens a forward of greedy Jacobi generation."""
    from posttrain.generation import jacobi

    counts = [0, 0]
    for prompt in prompts:
        made = jacobi.generate(model, torch.tensor([prompt]), max_new_tokens=new)
        counts[0] += made.new_tokens.sum().item()
        counts[1] += made.forwards.sum().item()
    return counts[0] / max(counts[1], 1)


@torch.no_grad()
def rounded(model, bits: int = 4) -> None:
    """Round the weights of all linear layers but the head to `bits`, a scale for each row, in place.

    Of a model with an adapter those of its base; of GIFT-SW the salient columns stay as they are.
    """
    from posttrain.adapters.gift_sw import layers_of

    head = model.get_output_embeddings()
    kept = {layer.get_base_layer(): variant.columns for _, layer, variant, _ in layers_of(model)}
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or layer is head or "lora_" in name:
            continue
        most, weight = 2 ** (bits - 1) - 1, layer.weight.clone()
        columns = kept.get(layer, torch.empty(0, dtype=torch.long))
        # their size must not set the scale of the others
        weight[:, columns] = 0.0
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / most
        weight = (weight / scale).round().clamp(-most - 1, most) * scale
        weight[:, columns] = layer.weight[:, columns]
        layer.weight.copy_(weight)


def _padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    return ids, mask, labels
