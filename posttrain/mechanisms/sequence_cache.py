"""Reference log-probabilities on disk, one entry per sequence, so that no forward is ever paid for twice.

An entry's key is the content of the sequence as the model sees it, after truncation, and where the prompt ends. A file
belongs to one reference: its name is a digest of the weights, the model's configuration, the precision and the
library versions. A flipped pair, another batch size, another subset or another run finds its values again.
"""

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from posttrain.log import get_logger

_DIGEST_BYTES = 16


class ReferenceCache:
    """Maps sequence digests to summed log-probabilities in nats, in one safetensors file.

    Args:
        directory: folder of the cache; made when first written to.
        key: digest of everything about the reference that affects its log-probabilities.
    """

    def __init__(self, directory: str | Path, key: str) -> None:
        self.path = Path(directory) / f"{key}.safetensors"

    def load(self) -> dict[bytes, float]:
        """Read all entries; empty where the file is missing or cannot be read."""
        if not self.path.exists():
            return {}
        try:
            tensors = load_file(self.path)
        except (SafetensorError, OSError) as error:
            get_logger().warning("reference cache %s cannot be read (%s); it will be written anew", self.path, error)
            return {}
        raw = tensors["digests"].numpy().tobytes()
        keys = [raw[i : i + _DIGEST_BYTES] for i in range(0, len(raw), _DIGEST_BYTES)]
        return dict(zip(keys, self._from_tensors(tensors), strict=True))

    def add(self, values: Mapping[bytes, float]) -> None:
        """Add entries. The file is replaced at once, so a reader or a killed run never sees half of it."""
        if not values:
            return
        merged = {**self.load(), **values}
        digests = torch.frombuffer(bytearray(b"".join(merged)), dtype=torch.uint8).view(-1, _DIGEST_BYTES)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.stem}-{uuid.uuid4().hex}.partial")
        try:
            save_file({"digests": digests, **self._to_tensors(list(merged.values()))}, partial)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _from_tensors(self, tensors: dict[str, torch.Tensor]) -> Sequence:
        return tensors["logps"].tolist()

    def _to_tensors(self, values: list) -> dict[str, torch.Tensor]:
        return {"logps": torch.tensor(values)}


class TokenCache(ReferenceCache):
    """Maps sequence digests to the answer's token log-probabilities (T,) in nats, fp32, in a file beside the sums'."""

    def __init__(self, directory: str | Path, key: str) -> None:
        super().__init__(directory, f"{key}-tokens")

    def _from_tensors(self, tensors):
        return tensors["logps"].split(tensors["lengths"].tolist())

    def _to_tensors(self, values):
        return {"lengths": torch.tensor([len(logps) for logps in values]), "logps": torch.cat(values)}


def forwarded(
    prompt_ids: list[int], completion_ids: list[int], max_length: int | None, keep_end: bool = False
) -> tuple[list[int], int]:
    """Return the tokens of a sequence that the model sees, and how many of them are the prompt's.

    Args:
        prompt_ids, completion_ids: of the whole sequence.
        max_length: how many tokens are kept; None for all.
        keep_end: whether they are the last ones instead of the first.
    """
    ids = prompt_ids + completion_ids
    if max_length is None or len(ids) <= max_length:
        return ids, len(prompt_ids)
    if keep_end:
        return ids[-max_length:], max(0, max_length - len(completion_ids))
    return ids[:max_length], min(len(prompt_ids), max_length)


def sequence_digest(
    prompt_ids: list[int],
    completion_ids: list[int],
    max_length: int | None,
    extra: str = "",
    keep_end: bool = False,
) -> bytes:
    """Digest a sequence as `forwarded` cuts it, where its prompt ends, and `extra`."""
    ids, prompt = forwarded(prompt_ids, completion_ids, max_length, keep_end)
    content = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    content.update(f"{prompt}|{extra}|".encode())
    content.update(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())
    return content.digest()


def weights_digest(model: torch.nn.Module, skip_adapters: Iterable[str] = ()) -> str:
    """Digest the weights and buffers of `model` as this rank holds them.

    Args:
        model: any module; of a parameter that ZeRO-3 has partitioned, this rank's partition counts.
        skip_adapters: names of PEFT adapters whose weights play no part in the forward.
    """
    skipped = set(skip_adapters)
    partitions = {name: p.ds_tensor for name, p in model.named_parameters() if hasattr(p, "ds_tensor")}
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if skipped.intersection(name.split(".")):
            continue
        tensor = partitions.get(name, tensor)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
