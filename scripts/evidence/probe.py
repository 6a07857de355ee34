"""Scores of answers from the states of a model that was not trained: one knows human labels, one the reward model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

# of 30; the last ones are about the next word
LAYERS = (16, 24)
PENALTIES = (0.01, 0.1, 1.0, 10.0)


class Probe:
    """Two linear models over a frozen language model's states, averaged over an answer's tokens.

    `human` is Bradley-Terry on the human labels of pairs and never sees a reward: a difference of two answers to one
    prompt is the log-odds that a human prefers the first. `reward` is ridge regression on the published rewards: what
    the training reward would be, as far as the states tell. Penalties are chosen by cross-validation on the same pairs.

    Args:
        pairs: rows of prompt, chosen, rejected (messages), chosen_reward, rejected_reward; no policy trains on them.
        file: where the states of `pairs` are kept, computed if absent (.npy).
    """

    def __init__(self, folder: str, tokenizer, pairs: Sequence[dict], file: Path, longest: int):
        self._folder, self._tokenizer, self._longest, self._model = folder, tokenizer, longest, None
        if not file.exists():
            states = [self.states([row["prompt"] for row in pairs], [row[s] for row in pairs]) for s in SIDES]
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.stack(states), allow_pickle=False)
        states = np.load(file, allow_pickle=False).astype(float)
        self._mean, self._scale = states.mean(axis=(0, 1)), states.std(axis=(0, 1)) + 1e-6
        states = (states - self._mean) / self._scale
        rewards = np.array([[row[f"{side}_reward"] for row in pairs] for side in SIDES])
        self.human, self.human_accuracy = _chosen(_bradley_terry, states, rewards, _accuracy)
        self.reward, self.reward_correlation = _chosen(_ridge, states, rewards, _correlation)

    def scores(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((N,), (N,)) of both models, from what `states` gives."""
        states = (states - self._mean) / self._scale
        return states @ self.human[:-1], states @ self.reward[:-1] + self.reward[-1]

    def states(self, prompts: Sequence[list], answers: Sequence[list]) -> np.ndarray:
        """(N, features) states of each answer under its prompt, both as messages."""
        import torch

        tokens = [self._tokens(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))
        found = [None] * len(tokens)
        model = self._loaded()
        for start in range(0, len(order), 16):
            own = order[start : start + 16]
            width = max(len(tokens[i][0]) for i in own)
            ids = torch.tensor([tokens[i][0] + [0] * (width - len(tokens[i][0])) for i in own])
            mask = torch.tensor([[1] * len(tokens[i][0]) + [0] * (width - len(tokens[i][0])) for i in own])
            with torch.no_grad():
                layers = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            for row, i in enumerate(own):
                answer = slice(tokens[i][1], len(tokens[i][0]))
                found[i] = torch.cat([layers[n][row, answer].float().mean(dim=0) for n in LAYERS]).numpy()
        return np.stack(found)

    def _tokens(self, prompt: list, answer: list) -> tuple[list[int], int]:
        """(ids, where the answer begins), the prompt cut on the left where both are too long."""
        head = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        whole = self._tokenizer.apply_chat_template(prompt + answer)["input_ids"]
        cut = max(len(whole) - self._longest, 0)
        return whole[cut:], min(max(len(head) - cut, 0), len(whole) - cut - 1)

    def _loaded(self):
        if self._model is None:
            from transformers import AutoModel

            self._model = AutoModel.from_pretrained(self._folder).eval()
        return self._model


SIDES = ("chosen", "rejected")
FOLDS = 5


def _chosen(fit, states: np.ndarray, rewards: np.ndarray, quality) -> tuple[np.ndarray, float]:
    """(weights on all pairs with the best penalty, that penalty's quality on pairs left out)."""
    fold = np.arange(states.shape[1]) % FOLDS
    found = {}
    for penalty in PENALTIES:
        parts = []
        for left in range(FOLDS):
            weights = fit(states[:, fold != left], rewards[:, fold != left], penalty)
            parts.append(quality(weights, states[:, fold == left], rewards[:, fold == left]))
        found[penalty] = float(np.mean(parts))
    best = max(found, key=found.get)
    return fit(states, rewards, best), found[best]


def _bradley_terry(states, rewards, penalty: float) -> np.ndarray:
    """Newton's method on the penalised likelihood of the labels; the last weight, a constant's, is 0."""
    differences = states[0] - states[1]
    weights = np.zeros(differences.shape[1])
    ridge = penalty * len(differences) * np.eye(len(weights)) / 10
    for _ in range(8):
        wrong = 1 / (1 + np.exp(differences @ weights))
        slope = differences.T @ wrong - ridge @ weights
        curve = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + ridge
        weights += np.linalg.solve(curve, slope)
    return np.append(weights, 0.0)


def _ridge(states, rewards, penalty: float) -> np.ndarray:
    rows, targets = states.reshape(-1, states.shape[2]), rewards.reshape(-1)
    curve = rows.T @ rows + penalty * len(rows) * np.eye(rows.shape[1])
    weights = np.linalg.solve(curve, rows.T @ (targets - targets.mean()))
    return np.append(weights, targets.mean())


def _accuracy(weights, states, rewards) -> float:
    return float(((states[0] - states[1]) @ weights[:-1] > 0).mean())


def _correlation(weights, states, rewards) -> float:
    return float(np.corrcoef(states.reshape(-1, states.shape[2]) @ weights[:-1], rewards.reshape(-1))[0, 1])
