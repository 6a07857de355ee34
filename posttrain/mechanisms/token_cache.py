"""Per-token reference log-probabilities on disk, an entry a sequence; the token form of `reference_cache`."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.log import get_logger

_DIGEST_BYTES = 16


class TokenCache:
    """Sequence digests -> (T,) fp32 log-probabilities of the answer's tokens in nats, in one safetensors file.

    Args:
        directory: folder of the cache; made when first written to.
        key: digest of everything about the reference that affects its log-probabilities.
    """

    def __init__(self, directory: str | Path, key: str) -> None:
        self.path = Path(directory) / f"{key}-tokens.safetensors"

    def load(self) -> dict[bytes, Tensor]:
        """All entries; empty where the file is missing or cannot be read."""
        if not self.path.exists():
            return {}
        try:
            found = load_file(self.path)
        except (SafetensorError, OSError) as error:
            get_logger().warning("reference cache %s cannot be read (%s); it will be written anew", self.path, error)
            return {}
        raw = found["digests"].numpy().tobytes()
        keys = [raw[i : i + _DIGEST_BYTES] for i in range(0, len(raw), _DIGEST_BYTES)]
        return dict(zip(keys, found["logps"].split(found["lengths"].tolist()), strict=True))

    def add(self, values: Mapping[bytes, Tensor]) -> None:
        """Add entries. The file is replaced at once, so a reader or a killed run never sees half of it."""
        if not values:
            return
        merged = {**self.load(), **values}
        tensors = {
            "digests": torch.frombuffer(bytearray(b"".join(merged)), dtype=torch.uint8),
            "lengths": torch.tensor([len(logps) for logps in merged.values()]),
            "logps": torch.cat(list(merged.values())),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.stem}-{uuid.uuid4().hex}.partial")
        try:
            save_file(tensors, partial)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
