"""Checkpoints of a federated run after its rounds, whole or not at all, and the reports of its rounds beside them."""

import json
import os
import re
import shutil
import uuid
from pathlib import Path

from torch import Tensor

from posttrain.checks import check_links
from posttrain.errors import ConfigError, DataError
from posttrain.federated.methods import Shared
from posttrain.saved import check_safetensors, read_json, read_text
from posttrain.whole_files import answered, digest, replace, sync

REPORTS = "rounds.jsonl"
_STATE, _ABOUT = "shared.safetensors", "round.json"
_NAME = re.compile(r"round-(\d{6,})")
_FORMAT = 1
# a damaged newest one leaves the one before it
_KEPT = 2
# differences that a message lists
_SHOWN = 5


class RoundFiles:
    """Writes and reads what a run needs to go on after a round.

    Args:
        folder: of the run. identity: what a run that goes on must share with this one, as plain JSON.

    Raises:
        ConfigError: a folder that is a file, or below one, or behind a link that leads nowhere.
    """

    def __init__(self, folder: str | Path, identity: dict) -> None:
        check_links(folder, "folder")
        self.folder, self._identity = Path(folder), json.loads(json.dumps(identity))
        self._mend = "Free some space there, or choose another folder."

    def begin(self, resume: bool) -> tuple[int, Shared | None]:
        """Return the round that the run goes on from and what clients shared after it; 0 and None for a new run.

        Raises:
            ConfigError: rounds in the folder of a new run, none where one is to go on, or those of another run.
            DataError: a checkpoint that is damaged, or a report that is missing.
        """
        found = self._found()
        if not resume:
            if found or (self.folder / REPORTS).exists():
                raise ConfigError(
                    f"{self.folder} has rounds of a run already. Go on from them with resume, or choose another folder."
                )
            with answered(f"the folder {self.folder} cannot be made", self._mend):
                self.folder.mkdir(parents=True, exist_ok=True)
            return 0, None
        if not found and not (self.folder / REPORTS).exists():
            raise ConfigError(
                f"{self.folder} has no round to go on from. Leave resume out to start a run, or name its folder."
            )
        # one that was killed before its first checkpoint begins anew
        number, shared = self._read(found[-1]) if found else (0, None)
        kept = [line for line in self.reports() if line["round"] <= number]
        lost = sorted(set(range(1, number + 1)) - {line["round"] for line in kept})
        if lost:
            # what a client has spent is known from them
            raise DataError(
                f"{self.folder / REPORTS} lacks round {lost[0]}, and the newest checkpoint is of round {number}. Put "
                "the file back, or begin a new run in another folder."
            )
        text = "".join(f"{json.dumps(line)}\n" for line in kept)
        with answered(f"{self.folder / REPORTS} cannot be written", self._mend):
            replace(self.folder / REPORTS, lambda path: path.write_text(text, encoding="utf-8"))
        return number, shared

    def report(self, content: dict) -> None:
        """Add the report of a round; it is on the disk when this returns."""
        with answered(f"{self.folder / REPORTS} cannot be written", self._mend):
            with open(self.folder / REPORTS, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(content)}\n")
                file.flush()
                os.fsync(file.fileno())

    def reports(self) -> list[dict]:
        """Return the reports of the rounds, in their order; a last line that was cut off is left out."""
        path, found = self.folder / REPORTS, []
        for line in read_text(path).splitlines() if path.exists() else ():
            try:
                content = json.loads(line)
                found.append(content | {"round": int(content["round"])})
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def save(self, number: int, shared: Shared) -> None:
        """Write what clients share after a round, and delete checkpoints but for the newest two."""
        from safetensors.torch import save_file

        final = self.folder / f"round-{number:06d}"
        partial = self.folder / f".{final.name}-{uuid.uuid4().hex}.partial"
        with answered(f"the checkpoint {final} cannot be written", self._mend):
            for leftover in self.folder.glob(".round-*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir()
            save_file(_flat(shared), partial / _STATE, metadata={"format": "pt"})
            about = {
                "format": _FORMAT, "round": number, "digest": digest(partial / _STATE), "identity": self._identity,
            }  # fmt: skip
            (partial / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
            for name in (_STATE, _ABOUT):
                sync(partial / name)
            if final.exists():
                # of the same round, before a checkpoint was deleted by hand
                shutil.rmtree(final)
            os.rename(partial, final)
            sync(self.folder)
            for old in self._found()[:-_KEPT]:
                shutil.rmtree(old)

    def _found(self) -> list[Path]:
        """Return the checkpoints, the newest last."""
        if not self.folder.is_dir():
            if self.folder.exists():
                raise ConfigError(f"folder is {self.folder}, which is no folder; choose another.")
            return []
        found = {
            int(name[1]): path
            for path in self.folder.iterdir()
            if (name := _NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
        }
        return [found[number] for number in sorted(found)]

    def _read(self, path: Path) -> tuple[int, Shared]:
        from safetensors.torch import load_file

        mend = f"Delete {path.name} to go on from the round before."
        about = read_json(path / _ABOUT)
        if about.get("format") != _FORMAT or type(about.get("round")) is not int:
            raise DataError(f"{path / _ABOUT} is of another form than this version writes. {mend}")
        check_safetensors(path / _STATE)
        if digest(path / _STATE) != about.get("digest"):
            raise DataError(f"{path / _STATE} is not as it was written. {mend}")
        then, now = (_one_level(identity) for identity in (about.get("identity") or {}, self._identity))
        if other := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
            told = "; ".join(
                f"{name} was {then.get(name)!r:.200} and is {now.get(name)!r:.200}" for name in other[:_SHOWN]
            )
            raise ConfigError(
                f"{path} is of another run: {told}. Set them as they were, or start a new run in another folder."
            )
        return about["round"], _shared(load_file(path / _STATE))


def _one_level(identity: dict) -> dict:
    """Return an identity's entries by name, of the settings by their own, so that a message tells those that differ."""
    found = {}
    for name, value in identity.items():
        prefix = "" if name == "settings" else f"{name} "
        found |= {f"{prefix}{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _flat(shared: Shared) -> dict[str, Tensor]:
    tensors = {f"A/{name}": value for name, value in shared.A.items()}
    tensors |= {f"B/{name}": value for name, value in shared.B.items()}
    for name, pair in shared.base.items():
        tensors |= {f"base_{side}/{name}": value for side, value in zip("AB", pair, strict=True)}
    return {name: value.contiguous() for name, value in tensors.items()}


def _shared(tensors: dict[str, Tensor]) -> Shared:
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "base_A": {}, "base_B": {}}
    for name, value in tensors.items():
        side, _, path = name.partition("/")
        # a file's numbers lie where they lie; in memory of torch's own, products have the bits that they had
        parts[side][path] = value.clone()
    base = {path: (parts["base_A"][path], parts["base_B"][path]) for path in parts["base_A"]}
    return Shared(parts["A"], parts["B"], base)
