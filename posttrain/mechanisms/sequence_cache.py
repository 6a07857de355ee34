"""Reference log-probabilities on disk, one entry per sequence, so that no forward is ever paid for twice.

An entry's key is the content of the sequence as the model sees it, after truncation, and where the prompt ends. A file
belongs to one reference: its name is a digest of the weights, the model's configuration, the precision and the
library versions. A flipped pair, another batch size, another subset or another run finds its values again.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from posttrain import whole_files
from posttrain.errors import EnvironmentIssue
from posttrain.log import get_logger
from posttrain.mechanisms.spread_weights import own_part

_DIGEST_BYTES = 16
# of the files; a file of another one is set aside
_FORMAT = "2"
# between two writings of what was computed
_SECONDS = 60.0


class ReferenceCache:
    """Maps sequence digests to summed log-probabilities in nats, in one safetensors file.

    Its head has the number of its format and a digest of its key and content.

    Args:
        directory: folder of the cache; made when first written to.
        key: digest of everything about the reference that affects its log-probabilities.
    """

    def __init__(self, directory: str | Path, key: str) -> None:
        self.path = Path(directory) / f"{key}.safetensors"

    def load(self) -> dict[bytes, float]:
        """Read all entries; empty where the file is missing, damaged or none of ours, which is logged.

        Raises EnvironmentIssue where it may not be read.
        """
        entries, fault = self._read()
        if fault:
            get_logger().warning("cache %s %s; it is passed over", self.path, fault)
        return entries

    def add(self, values: Mapping[bytes, float]) -> None:
        """Add entries to those that any process wrote. The file is replaced at once, so nobody ever sees half of it.

        A file that is damaged or none of ours is set aside. Raises EnvironmentIssue where the cache cannot be written.
        """
        if not values:
            return
        with self._writing():
            known, fault = self._read()
            if fault:
                whole_files.set_aside(self.path, fault)
            whole_files.replace(self.path, lambda partial: self._save({**known, **values}, partial))

    def pending(self) -> "Pending":
        """Return a collector of entries, to be entered with `with`."""
        return Pending(self)

    def check_writable(self) -> None:
        """Raise EnvironmentIssue where the cache cannot be written."""
        with self._writing():
            pass

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        mend = "Give a folder that can be written to: ref_cache_dir, or POSTTRAIN_CACHE for all caches."
        with whole_files.answered(f"the cache {self.path} cannot be written", mend):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_files.locked(self.path):
                yield

    def _save(self, entries: Mapping[bytes, float], path: Path) -> None:
        digests = torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8).view(-1, _DIGEST_BYTES)
        tensors = {"digests": digests, **self._to_tensors(list(entries.values()))}
        save_file(tensors, path, {"format": _FORMAT, "digest": self._digest(tensors)})

    def _read(self) -> tuple[dict[bytes, float], str | None]:
        """Return the entries, and what is wrong with the file."""
        try:
            # a pipe would be waited for
            if self.path.exists() and not self.path.is_file():
                return {}, "is a folder" if self.path.is_dir() else "is no regular file"
            with safe_open(self.path, "pt") as file:
                head = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return {}, None
        except SafetensorError as error:
            return {}, f"cannot be read ({error})"
        except OSError as error:
            raise EnvironmentIssue(
                f"the cache {self.path} cannot be read: {error.strerror or error}. Delete it, or give another folder: "
                "ref_cache_dir, or POSTTRAIN_CACHE for all caches."
            ) from error
        if head.get("format") != _FORMAT:
            return {}, f"has the format {head.get('format')!r} and not {_FORMAT!r}"
        if head.get("digest") != self._digest(tensors):
            return {}, "is damaged or belongs to another key: its digest is not that of its content"
        digests = tensors.pop("digests", None)
        whole = digests is not None and digests.dtype == torch.uint8 and digests.shape[1:] == (_DIGEST_BYTES,)
        if not (whole and self._are_values(tensors, len(digests))):
            return {}, "is damaged: its tensors are not those of a cache of this kind"
        raw = digests.numpy().tobytes()
        keys = [raw[i : i + _DIGEST_BYTES] for i in range(0, len(raw), _DIGEST_BYTES)]
        return dict(zip(keys, self._from_tensors(tensors), strict=True)), None

    def _digest(self, tensors: Mapping[str, torch.Tensor]) -> str:
        return whole_files.digest_of_tensors(self.path.stem, tensors)

    def _are_values(self, tensors: Mapping[str, torch.Tensor], count: int) -> bool:
        """Tell whether tensors are the values of so many entries, as `_to_tensors` makes them."""
        return tensors.keys() == {"logps"} and _are_numbers(tensors["logps"]) and len(tensors["logps"]) == count

    def _from_tensors(self, tensors: dict[str, torch.Tensor]) -> Sequence:
        return tensors["logps"].tolist()

    def _to_tensors(self, values: list) -> dict[str, torch.Tensor]:
        return {"logps": torch.tensor(values)}


class Pending:
    """Collects entries for a cache, inside `with`: written every minute and at the end, also one that an error brings.

    Entering it raises EnvironmentIssue where the cache cannot be written, before anything is paid for.
    """

    def __init__(self, cache: ReferenceCache) -> None:
        self._cache, self._entries, self._pause = cache, {}, _SECONDS
        self._written = time.monotonic()

    def __enter__(self) -> "Pending":
        self._cache.check_writable()
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.flush()
        except EnvironmentIssue as issue:
            if error is None:
                raise
            # the error that ended it is the one to be told
            if not isinstance(error, EnvironmentIssue):
                get_logger().warning("%s", issue)

    def add(self, values: Mapping[bytes, float]) -> None:
        """Add entries; write them where the last writing is a minute ago."""
        self._entries.update(values)
        if time.monotonic() - self._written >= self._pause:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet. Raises EnvironmentIssue where the cache cannot be written."""
        begun = time.monotonic()
        self._cache.add(self._entries)
        self._entries, self._written = {}, time.monotonic()
        # a file is written whole: a large one more seldom, so that at most a twentieth of the time goes into it
        self._pause = max(_SECONDS, 20 * (self._written - begun))


class TokenCache(ReferenceCache):
    """Maps sequence digests to the answer's token log-probabilities (T,) in nats, fp32, in a file beside the sums'."""

    def __init__(self, directory: str | Path, key: str) -> None:
        super().__init__(directory, f"{key}-tokens")

    def _are_values(self, tensors, count):
        if tensors.keys() != {"logps", "lengths"} or not _are_numbers(tensors["logps"]):
            return False
        lengths = tensors["lengths"]
        return (
            lengths.dtype == torch.int64
            and lengths.shape == (count,)
            and bool((lengths >= 0).all())
            # a sum of huge lengths could come round
            and bool((lengths <= len(tensors["logps"])).all())
            and int(lengths.sum()) == len(tensors["logps"])
        )

    def _from_tensors(self, tensors):
        return tensors["logps"].split(tensors["lengths"].tolist())

    def _to_tensors(self, values):
        return {"lengths": torch.tensor([len(logps) for logps in values]), "logps": torch.cat(values)}


def _are_numbers(values: torch.Tensor) -> bool:
    return values.ndim == 1 and values.is_floating_point()


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
        model: any module; of a parameter that ZeRO-3 or FSDP has spread, this rank's part counts.
        skip_adapters: names of PEFT adapters whose weights play no part in the forward.
    """
    skipped = set(skip_adapters)
    partitions = {name: p.ds_tensor for name, p in model.named_parameters() if hasattr(p, "ds_tensor")}
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if skipped.intersection(name.split(".")):
            continue
        tensor = own_part(partitions.get(name, tensor))
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
