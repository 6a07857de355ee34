"""Answers scored over ranks, which are threads here: each by one rank, kept by the first, refused by all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from posttrain.errors import DataError, EnvironmentIssue
from posttrain.trainers.offline import answer_scores

ROWS = [{"prompt": "p", "completion": "a" * (i + 1)} for i in range(21)]


class Ranks:
    """Collective calls of threads, in the place of accelerate's."""

    def __init__(self, count, monkeypatch):
        self.count, self.own, self.rounds = count, threading.local(), 0
        self.barrier, self.parts = threading.Barrier(count, timeout=20), [None] * count
        monkeypatch.setattr(answer_scores, "gather_object", self.gather)
        monkeypatch.setattr(answer_scores, "broadcast_object_list", self.broadcast)

    def _together(self, given):
        self.parts[self.own.rank] = given
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def gather(self, part):
        self.rounds += self.own.rank == 0
        return [one for parts in self._together(part) for one in parts]

    def broadcast(self, found, from_process):
        found[:] = self._together(list(found))[from_process]

    def score(self, rows, reward):
        def one(rank):
            self.own.rank = rank
            args = SimpleNamespace(process_index=rank, world_size=self.count, disable_tqdm=True)
            return answer_scores.score(rows, reward, "x", args)

        with ThreadPoolExecutor(self.count) as pool:
            return [
                future.exception() or future.result() for future in [pool.submit(one, r) for r in range(self.count)]
            ]


def by_length(**asked):
    def length(prompts, completions, **columns):
        asked["seen"].append(list(completions))
        return [float(len(text)) for text in completions]

    return length


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(answer_scores, "BATCH", 4)


@pytest.mark.parametrize("count", [2, 3])
def test_each_answer_is_scored_by_one_rank_and_known_to_all(count, monkeypatch, own_cache):
    seen, ranks = [], Ranks(count, monkeypatch)
    found = ranks.score(ROWS, by_length(seen=seen))
    assert found == [[float(i + 1) for i in range(21)]] * count
    assert sorted(len(text) for call in seen for text in call) == [*range(1, 22)]
    # no call is larger than a round's share, and the rounds are those that so many ranks need
    assert max(map(len, seen)) <= 4 and ranks.rounds == -(-21 // (4 * count))


def test_a_short_round_is_shared_as_well(monkeypatch, own_cache):
    seen = []
    Ranks(2, monkeypatch).score(ROWS[:4], by_length(seen=seen))
    assert sorted(map(len, seen)) == [2, 2]


def test_what_was_scored_is_kept_and_a_second_run_scores_the_rest(monkeypatch, own_cache):
    monkeypatch.setattr(answer_scores.scoring, "reward_key", lambda reward: "key")
    seen = []
    Ranks(2, monkeypatch).score(ROWS[:16], by_length(seen=seen))
    seen.clear()
    found = Ranks(2, monkeypatch).score(ROWS, by_length(seen=seen))
    assert found == [[float(i + 1) for i in range(21)]] * 2
    assert sorted(len(text) for call in seen for text in call) == [*range(17, 22)]
    # one process reads what two have scored
    args = SimpleNamespace(process_index=0, world_size=1, disable_tqdm=True)
    seen.clear()
    assert answer_scores.score(ROWS, by_length(seen=seen), "x", args) == found[0] and not seen


@pytest.mark.parametrize("bad", [0, 13])
def test_an_answer_without_a_score_is_told_on_every_rank_by_its_number(bad, monkeypatch, own_cache):
    def judge(prompts, completions, **columns):
        return [None if len(text) == bad + 1 else 0.5 for text in completions]

    for error in Ranks(2, monkeypatch).score(ROWS, judge):
        assert isinstance(error, DataError) and f"x, answer {bad + 1}: " in str(error)


def test_a_cache_that_cannot_be_written_is_told_on_every_rank_before_a_call(monkeypatch, tmp_path):
    calls = []

    def judge(prompts, completions, **columns):
        calls.append(1)
        return [0.5] * len(completions)

    (tmp_path / "file").touch()
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(answer_scores.scoring, "reward_key", lambda reward: "key")
    assert all(isinstance(error, EnvironmentIssue) for error in Ranks(2, monkeypatch).score(ROWS, judge))
    assert not calls
