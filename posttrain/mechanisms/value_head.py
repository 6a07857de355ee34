"""The value of a prompt, learned: what reward the frozen model's answers to it are expected to earn.

A small head pools the frozen model's last hidden states of the prompt by attention. It is a module of its own, never
part of the model's state dict. Prompts are dealt into folds and a head is trained for each on the others', so that an
answer's value never comes from a head that saw its reward.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain import whole_files

FILE = "value_head.safetensors"
BATCH = 32


class ValueHead(nn.Module):
    """Predicts a prompt's value, V(x) = reward_max sigmoid(linear(attention(query, states))).

    One learned query attends to the states of the prompt's tokens with 8 heads (or as many up to 8 as divide the
    width); dropout 0.1 before and after. 4 hidden_size^2 parameters.
    Source: the published code of arXiv 2305.14718, with a mask for padding, and out of training mode when used.

    Args:
        hidden_size: width of the states. reward_max: R_max, above 0.
    """

    def __init__(self, hidden_size: int, reward_max: float = 1.0, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        heads = next(count for count in range(heads, 0, -1) if hidden_size % count == 0)
        self.reward_max = reward_max
        self.query = nn.Parameter(torch.randn(1, 1, hidden_size) * hidden_size**-0.5)
        self.attention = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return (B,) values from states (B, T, hidden_size) and a mask (B, T), true at one token or more a row."""
        states = torch.where(mask.unsqueeze(-1), states.to(self.query.dtype), 0.0)
        states = self.dropout(states)
        query = self.query.expand(len(states), -1, -1)
        pooled, _ = self.attention(query, states, states, key_padding_mask=~mask, need_weights=False)
        return self.reward_max * torch.sigmoid(self.linear(self.dropout(pooled.squeeze(1))).squeeze(-1))


def folds_of(keys: Sequence[str], folds: int) -> list[int]:
    """Assign a fold, 0 to folds - 1, to each distinct key: even in size, whatever the order of the keys."""
    order = sorted(range(len(keys)), key=lambda i: hashlib.blake2b(keys[i].encode(), digest_size=16).digest())
    found = [0] * len(keys)
    for position, i in enumerate(order):
        found[i] = position % folds
    return found


def fit(
    states: Sequence[Tensor],
    rewards: Tensor,
    counts: Tensor,
    reward_max: float,
    epochs: int,
    learning_rate: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> ValueHead:
    """Train a head on prompts by the squared error to their answers' rewards; returns it in eval mode.

    Args:
        states: of each prompt, (T, hidden_size), T of 1 or more.
        rewards: (N,) the mean reward of each prompt's answers. counts: (N,) how many there are, their weight.
        seed: of the weights, the order and the dropout; the global random state is left as it was.

    The start is the mean reward for every prompt, so what little training does not reach stays with the mean.
    """
    with _seeded(seed, device):
        head = ValueHead(states[0].size(-1), reward_max)
        mean = float((rewards * counts).sum() / counts.sum() / reward_max)
        nn.init.zeros_(head.linear.weight)
        nn.init.constant_(head.linear.bias, torch.logit(torch.tensor(mean), eps=1e-3).item())
        head = head.to(device).train()
        optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate)
        for _ in range(epochs):
            for batch in torch.randperm(len(states)).split(BATCH):
                values = head(*pad([states[i] for i in batch.tolist()], device))
                error = (values - rewards[batch].to(device, values.dtype)).square() * counts[batch].to(device)
                optimiser.zero_grad()
                (error.sum() / counts[batch].sum()).backward()
                optimiser.step()
    return head.eval()


@torch.no_grad()
def predict(head: ValueHead, states: Sequence[Tensor], device: torch.device | str = "cpu") -> list[float]:
    """Predict the values of prompts from their states."""
    values: list[float] = []
    for start in range(0, len(states), BATCH):
        values += head(*pad(states[start : start + BATCH], device)).tolist()
    return values


def on_device(states: Sequence[Tensor], device: torch.device | str) -> Sequence[Tensor]:
    """Move states to a device at once, as views of one tensor; back on the CPU where they do not fit there."""
    device = torch.device(device)
    if device.type == "cpu" or not len(states):
        return states
    try:
        return torch.cat(list(states)).to(device).split([len(one) for one in states])
    except torch.OutOfMemoryError:
        # each batch is then moved by itself
        return states


def pad(states: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad states (T_i, h) to (B, T, h) fp32; returns the mask (B, T) of tokens as well."""
    lengths = torch.tensor([len(one) for one in states])
    # sent as they are, and made fp32 where they are used
    padded = nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(device).float()
    return padded, (torch.arange(padded.size(1)) < lengths.unsqueeze(1)).to(device)


def save(heads: Sequence[ValueHead], folder: str | Path, key: str) -> Path:
    """Write the heads of all folds into one file at once; `key` says what they were trained on.

    Heads of another key that lie there stay, and these get a name of their own; a file that is no value head is set
    aside. Raises EnvironmentIssue where the folder cannot be written.
    """
    first, path = heads[0], Path(folder) / FILE
    facts = {"key": key, "folds": len(heads), "hidden_size": first.query.size(-1), "reward_max": first.reward_max}
    tensors = {
        f"{i}.{name}": value.cpu().contiguous()
        for i, head in enumerate(heads)
        for name, value in head.state_dict().items()
    }
    facts["digest"] = _digest(facts, tensors)
    mend = "Give a folder that can be written to as `value_head_dir`."
    with whole_files.answered(f"value heads cannot be written to {folder}", mend):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_files.locked(path):
            there, _, _ = _read(path)
            if there and there["key"] != key:
                path = path.with_name(_keyed(key))
            if os.path.lexists(path) and not _read(path)[0]:
                whole_files.set_aside(path, "is no value head")
            metadata = {"value_head": json.dumps(facts)}
            whole_files.replace(path, lambda partial: save_file(tensors, partial, metadata=metadata))
    return path


def load(folder: str | Path, key: str | None = None, device: torch.device | str = "cpu") -> list[ValueHead] | None:
    """Load the heads that `save` wrote, in eval mode; None where there are none, or only ones of another key.

    A damaged file is set aside with a warning.
    """
    for name in (FILE,) if key is None else (FILE, _keyed(key)):
        path = Path(folder) / name
        facts, tensors, fault = _read(path)
        if fault is not None:
            with whole_files.answered(f"{path} {fault}, and cannot be set aside", "Delete it."):
                whole_files.set_aside(path, fault)
        elif facts and key in (None, facts["key"]):
            return [_built(facts, tensors, fold, device) for fold in range(facts["folds"])]
    return None


def _built(facts: dict, tensors: dict[str, Tensor], fold: int, device) -> ValueHead:
    with _seeded(0, device):
        head = ValueHead(facts["hidden_size"], facts["reward_max"])
    head.load_state_dict(
        {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{fold}.")}
    )
    return head.to(device).eval()


def _keyed(key: str) -> str:
    return FILE.replace(".", f"-{key[:16]}.", 1)


def _read(path: Path) -> tuple[dict, dict[str, Tensor], str | None]:
    """Return what `save` noted of the heads in a file, their tensors, and what is wrong with the file, if it is there.

    Files of earlier versions have no digest.
    """
    if not path.exists():
        return {}, {}, None
    # a pipe would be waited for
    if not path.is_file():
        return {}, {}, "is no regular file"
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["value_head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "digest" in facts and facts["digest"] != _digest(facts, tensors):
            return {}, {}, "is damaged: its digest is not that of its content"
        if facts["folds"] < 1 or facts["hidden_size"] != tensors["0.query"].size(-1):
            return {}, {}, "is no value head"
        for fold in range(facts["folds"]):
            _built(facts, tensors, fold, "cpu")
        return {"key": facts["key"], **facts}, tensors, None
    except (SafetensorError, OSError) as error:
        return {}, {}, f"cannot be read ({error})"
    except (KeyError, TypeError, ValueError, RuntimeError):
        return {}, {}, "is no value head"


def _digest(facts: dict, tensors: dict[str, Tensor]) -> str:
    named = {name: value for name, value in facts.items() if name != "digest"}
    return whole_files.digest_of_tensors(json.dumps(named, sort_keys=True), tensors)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    kind = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=devices, **kind):
        torch.default_generator.manual_seed(seed)
        if devices:
            getattr(torch, device.type).manual_seed(seed)
        yield
