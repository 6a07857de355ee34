"""Case 5: TRL's fused head, by triton on a card, against the plain one in fp32."""

import types

from gpu.models import cosine, free
from gpu.record import Case

_HIDDEN = 896
_SIZES = ((1, 151936), (4095, 151936), (4097, 151936), (20000, 151936), (4097, 259))
_TOY = ((1, 259), (33, 259), (65, 1000))
_LARGEST_FP32, _MEAN_BF16, _COSINE = 1e-4, 2e-2, 0.999
# beside weights, states and their gradients: tiles of logits, whatever the number of states
_WORKSPACE = 1.5 * 2**30


def head_of(record, vocab_size: int, dtype, tied: bool):
    """Return a model that is a head alone: what it is called with are the states, or the tokens if `tied`."""
    import torch
    from transformers import AutoConfig

    hidden = record.pick(_HIDDEN, 64)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = AutoConfig.for_model("llama", vocab_size=vocab_size, hidden_size=hidden)
            self.lm_head = torch.nn.Linear(hidden, vocab_size, bias=False, device=record.device, dtype=dtype)

        def forward(self, states):
            raise NotImplementedError

        def get_output_embeddings(self):
            return self.lm_head

        def base_model(self, states, use_cache):
            states = torch.nn.functional.embedding(states, self.lm_head.weight) if tied else states
            return types.SimpleNamespace(last_hidden_state=states)

    return Head()


def run(record) -> None:
    import torch
    from trl.trainer.utils import add_fused_lm_head

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for count, vocab_size in record.pick(_SIZES, _TOY):
            for tied in (False, True) if vocab_size == 259 else (False,):
                torch.manual_seed(0)
                model = head_of(record, vocab_size, dtype, tied)
                # the default spread of a weight is so small that all tokens are alike
                torch.nn.init.normal_(model.lm_head.weight, std=0.05)
                add_fused_lm_head(model)
                labels = torch.randint(vocab_size, (1, count), device=record.device)
                if tied:
                    states = torch.randint(vocab_size, (1, count), device=record.device)
                else:
                    shape = (1, count, record.pick(_HIDDEN, 64))
                    states = torch.randn(shape, device=record.device, dtype=dtype).requires_grad_()
                _compare(record, f"N {count}, V {vocab_size}, {name}{', tied' * tied}", model, states, labels, dtype)


def _compare(record, arm: str, model, states, labels, dtype) -> None:
    import torch

    free(record.device)
    weight = model.lm_head.weight
    before = torch.cuda.memory_allocated() if not record.toy else 0
    found = model(states=states, shift_labels=labels, fused_lm_head=True).log_probs[0]
    # a weight of its own for each token, so that an error in one of them is not summed away
    scale = torch.linspace(0.5, 1.5, found.numel(), device=found.device)
    (found * scale).sum().backward()
    own = [weight.grad] + ([states.grad] if states.is_floating_point() else [])
    if not record.toy:
        peak = torch.cuda.max_memory_allocated() - before
        # fp32, as the head adds up the gradient of its weights
        allowed = _WORKSPACE + 6 * weight.numel() + 6 * states.numel()
        record.at_most(f"{arm}: peak, GiB", peak / 2**30, allowed / 2**30)
    wanted, gradients = _exact(weight.detach(), states.detach(), labels[0], scale)
    gap = (found.detach().float() - wanted).abs()
    if dtype == torch.float32:
        record.at_most(f"{arm}: largest error, nats", gap.max().item(), _LARGEST_FP32)
    else:
        record.at_most(f"{arm}: mean error, nats", gap.mean().item(), _MEAN_BF16)
    for what, one, other in zip(("weights", "states"), own, gradients, strict=False):
        record.at_least(f"{arm}: cosine of the gradients of the {what}", cosine(one, other), _COSINE)


def _exact(weight, states, labels, scale):
    """Return log-probs and gradients in fp32, 512 states at a time."""
    import torch

    weight, found, of_states = weight.float().requires_grad_(), [], []
    for at in range(0, len(labels), 512):
        part = slice(at, at + 512)
        own = states[0, part]
        own = own.float().requires_grad_() if states.is_floating_point() else own
        given = own if states.is_floating_point() else torch.nn.functional.embedding(own, weight)
        log_probs = (given @ weight.T).log_softmax(-1).gather(1, labels[part, None])[:, 0]
        (log_probs * scale[part]).sum().backward()
        found.append(log_probs.detach())
        of_states += [own.grad] if states.is_floating_point() else []
    return torch.cat(found), [weight.grad] + ([torch.cat(of_states).unsqueeze(0)] if of_states else [])


CASE = Case(
    number=5,
    name="head",
    proves="TRL's fused head has fp32's log-probabilities and gradients, in memory that does not grow with the tokens",
    seconds=40,
    toy_seconds=60,
    run=run,
)
