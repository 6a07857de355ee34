"""Special tokens in the text of completions: those that a reward looks for stay, where TRL leaves all of them out."""

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.rewards.base import Reward
from posttrain.rewards.user import UserReward

# Tokens of these kinds are never kept unless `kept_tokens` names them
_FRAME = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


def check_kept(tokens: list[str], tokenizer) -> None:
    """Refuse names that are no tokens; ordinary tokens are in the text anyway.

    Raises:
        ConfigError: with the special tokens that there are.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ConfigError(
                f"kept_tokens names {token!r}, which is no token of the tokenizer. Its special tokens: "
                f"{', '.join(sorted(_special(tokenizer).values()))}. Add it to the tokenizer, or leave it out."
            )


class KeptTokens:
    """Writes completions with the special tokens that rewards look for.

    They are those of `wanted`, or else the ones named by what a reward `reads`, but for the tokens that begin, end, pad
    or mask a text.

    Args:
        tokenizer: of the policy.
        functions: rewards; those that are no `posttrain.rewards.Reward` name nothing.
        ends: ids that end a completion.
        wanted: the setting `kept_tokens`.
    """

    def __init__(self, tokenizer, functions: list, ends: list[int], wanted: list[str] | None = None) -> None:
        self._tokenizer, self._special, self._said = tokenizer, _special(tokenizer), False
        self._users = any(isinstance(function, UserReward) for function in functions)
        self._ends = set(ends)
        found = self._named(functions) if wanted is None else dict.fromkeys(wanted)
        self._kept = {id for id, token in self._special.items() if token in found}
        for token, reward in found.items():
            if reward is not None:
                get_logger().info("%s is a special token that reward %s looks for: completions keep it", token, reward)

    def _named(self, functions: list) -> dict[str, str]:
        """Return the special tokens that rewards look for, each with the first reward that does."""
        tokenizer = self._tokenizer
        frame = {tokenizer.convert_ids_to_tokens(id) for id in self._ends}
        frame |= {getattr(tokenizer, f"{kind}_token", None) for kind in _FRAME}
        candidates, found = set(self._special.values()) - frame, {}
        if not candidates:
            return found
        for function in functions:
            for text in function.reads if isinstance(function, Reward) else ():
                # as a pattern may write it
                plain = text.replace("\\", "")
                for token in candidates - found.keys():
                    if token in text or token in plain:
                        found[token] = function.__name__
        return found

    def text(self, ids: list[int]) -> str:
        """Decode a completion."""
        if self._kept.isdisjoint(ids):
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        ids = [id for id in ids if id not in self._special or id in self._kept]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def write(self, completions: list, completion_ids: list[list[int]]) -> None:
        """Write the kept tokens into `completions`, texts or single messages, in place."""
        for i, ids in enumerate(completion_ids):
            if self._kept.isdisjoint(ids):
                continue
            if isinstance(completions[i], str):
                completions[i] = self.text(ids)
            else:
                completions[i][0]["content"] = self.text(ids)
        if self._users and not self._said:
            self._warn_of_left_out(completion_ids)

    def _warn_of_left_out(self, completion_ids: list[list[int]]) -> None:
        """Warn, once, of special tokens in completions that rewards do not see."""
        hidden = self._special.keys() - self._kept - self._ends - {self._tokenizer.pad_token_id}
        seen = {id for ids in completion_ids for id in ids if id in hidden}
        if seen:
            self._said = True
            get_logger().warning(
                "completions hold the special tokens %s, which are left out of the text that rewards see. Where a "
                "reward looks for one, name it in kept_tokens.",
                ", ".join(sorted(self._special[id] for id in seen)),
            )


def parses_messages(tokenizer) -> bool:
    """Return whether a response template parses the answers of conversations."""
    return any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))


def _special(tokenizer) -> dict[int, str]:
    """Return the tokens that decoding leaves out as special, by id."""
    found = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return found | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
