import errno
import multiprocessing
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import EnvironmentIssue
from posttrain.mechanisms import sequence_cache
from posttrain.mechanisms.sequence_cache import ReferenceCache, TokenCache

ENTRIES = {bytes([i]) * 16: float(-i) for i in range(4)}
TENSORS = {"digests": torch.zeros(1, 16, dtype=torch.uint8), "logps": torch.zeros(1)}


def left(folder):
    return {path.name for path in folder.glob("[!.]*")}


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (None, "has the format None and not '2'"),
        ({"format": "1"}, "has the format '1' and not '2'"),
        ({"format": "2"}, "its digest is not that of its content"),
        ({"format": "2", "digest": "0" * 32}, "its digest is not that of its content"),
    ],
)
def test_a_file_of_another_kind_is_passed_over_named_and_set_aside(tmp_path, logged, head, fault):
    cache = ReferenceCache(tmp_path, "key")
    save_file(TENSORS, cache.path, head)
    assert cache.load() == {} and str(cache.path) in logged.text and fault in logged.text
    assert left(tmp_path) == {"key.safetensors"}, "reading writes nothing"
    cache.add(ENTRIES)
    assert cache.load() == ENTRIES and left(tmp_path) == {"key.safetensors", "key.safetensors.damaged1"}
    assert load_file(tmp_path / "key.safetensors.damaged1").keys() == TENSORS.keys()


@pytest.mark.parametrize("kind", [ReferenceCache, TokenCache])
@pytest.mark.parametrize(
    "harm",
    [
        {"logps": None},
        {"digests": None},
        {"more": torch.zeros(4)},
        {"logps": torch.zeros(3)},
        {"logps": torch.zeros(4, 1)},
        {"logps": torch.zeros(4, dtype=torch.int64)},
        {"digests": torch.zeros(4, 8, dtype=torch.uint8)},
        {"digests": torch.zeros(4, 16)},
        {"lengths": torch.tensor([1, 1, 1, 2])},
        {"lengths": torch.tensor([2, 2, 1, -1])},
        {"lengths": torch.ones(4)},
        {"lengths": None, "logps": torch.zeros(5)},
    ],
    ids=lambda harm: "-".join(harm),
)
def test_tensors_of_another_kind_are_set_aside_though_their_digest_is_right(tmp_path, logged, kind, harm):
    cache = kind(tmp_path, "key")
    fresh = {key: torch.tensor([value]) if kind is TokenCache else value for key, value in ENTRIES.items()}
    cache.add(fresh)
    tensors = {name: value for name, value in (load_file(cache.path) | harm).items() if value is not None}
    save_file(tensors, cache.path, {"format": "2", "digest": cache._digest(tensors)})
    assert cache.load() == {} and "its tensors are not those of a cache of this kind" in logged.text
    cache.add(fresh)
    assert cache.load().keys() == fresh.keys() and left(tmp_path) == {cache.path.name, f"{cache.path.name}.damaged1"}


@pytest.mark.parametrize("kind", [ReferenceCache, TokenCache])
def test_every_altered_byte_is_noticed(tmp_path, kind, logged):
    cache = kind(tmp_path, "key")
    cache.add({key: torch.tensor([value]) if kind is TokenCache else value for key, value in ENTRIES.items()})
    raw = cache.path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert len(cache.load()) == 4 and start < len(raw)
    for place in (*range(start, len(raw)), raw.index(b'"format"') + 2, raw.index(b"logps")):
        cache.path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert cache.load() == {}, place
    cache.path.write_bytes(raw[:-1])
    assert cache.load() == {}
    other = kind(tmp_path, "other")
    other.path.write_bytes(raw)
    assert other.load() == {}, "it belongs to another key"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_a_killed_writer_left_goes_and_what_is_no_file_in_the_place_is_set_aside(tmp_path, make):
    cache = ReferenceCache(tmp_path, "key")
    make(cache.path)
    (tmp_path / ".key.safetensors-0123.partial").touch()
    (tmp_path / ".other.safetensors-0123.partial").touch()
    assert cache.load() == {}
    cache.add(ENTRIES)
    assert cache.load() == ENTRIES
    assert [path.name for path in tmp_path.glob(".*.partial")] == [".other.safetensors-0123.partial"]


def _add(folder, number):
    cache = ReferenceCache(folder, "key")
    for part in range(4):
        cache.add({bytes([number, part]) + bytes(14): float(number)})


def test_writers_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(ReferenceCache(tmp_path, "key").load()) == 12


def test_without_locks_of_the_file_system_a_cache_is_written_all_the_same(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    cache = ReferenceCache(tmp_path, "key")
    cache.add(ENTRIES)
    assert cache.load() == ENTRIES


def test_a_cache_that_cannot_be_written_is_an_answer_before_anything_is_paid_for(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentIssue, match=r"the cache .*key\.safetensors cannot be written: .*ref_cache_dir"):
        with ReferenceCache(tmp_path / "file", "key").pending():
            raise AssertionError("entered")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sequence_cache, "save_file", full)
    with pytest.raises(EnvironmentIssue, match="No space left on device"):
        ReferenceCache(tmp_path, "key").add(ENTRIES)
    assert left(tmp_path) == {"file"} and not list(tmp_path.glob(".*.partial"))


def test_entries_are_written_every_minute_and_by_an_error(tmp_path, monkeypatch):
    cache, now = ReferenceCache(tmp_path, "key"), [0.0]
    monkeypatch.setattr(sequence_cache.time, "monotonic", lambda: now[0])
    keys = list(ENTRIES)
    with pytest.raises(KeyboardInterrupt), cache.pending() as pending:
        pending.add({keys[0]: 0.0})
        now[0] = 59.0
        pending.add({keys[1]: 0.0})
        assert cache.load() == {}
        now[0] = 60.0
        pending.add({keys[2]: 0.0})
        assert set(cache.load()) == set(keys[:3])
        pending.add({keys[3]: 0.0})
        assert set(cache.load()) == set(keys[:3])
        raise KeyboardInterrupt
    assert set(cache.load()) == set(keys)


def test_the_error_that_ended_it_is_told_when_the_disk_is_full_as_well(tmp_path, monkeypatch, logged):
    def full(self, values):
        raise EnvironmentIssue("the cache cannot be written")

    monkeypatch.setattr(ReferenceCache, "add", full)
    with pytest.raises(ZeroDivisionError), ReferenceCache(tmp_path, "key").pending() as pending:
        pending.add(ENTRIES)
        raise ZeroDivisionError
    assert "the cache cannot be written" in logged.text
