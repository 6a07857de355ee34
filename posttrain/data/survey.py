"""One pass over all rows of a data set: what they look like, and the faults that show without a chat template."""

from collections import Counter
from collections.abc import Iterator, Mapping

from posttrain.data.applied import ControlTokens
from posttrain.data.probes import answers_of, prompt_of
from posttrain.errors import DataError

# Rows that are rendered: so many, spread over the data set, and of those that look unlike the others up to so many.
SPREAD, UNLIKE = 32, 256
# Rows look unlike the others where no more than this share of them, or so few, look like that.
_FEW_SHARE, _FEW = 0.01, 8
# Characters that prompts must have together before answers that begin with them are no chance.
_CHANCE = 16


class Survey:
    """One pass over all rows: what they look like, and the faults that need no template."""

    def __init__(self, name: str, rows: int, unit: str, tokens: ControlTokens):
        self.name, self.rows, self.unit, self.tokens = name, rows, unit, tokens
        self.looks: dict[tuple, list[int]] = {}
        self.is_text = False
        self.repeated, self.repeated_characters = 0, 0
        # of those, with prompts too long for chance
        self.plainly_repeated, self.first_repeated = 0, ""
        self.others: Counter = Counter()
        self.first_other: dict[str, str] = {}

    def look(self, number: int, row: Mapping, place: str) -> None:
        """Take in a row."""
        self.looks.setdefault(_look(row), []).append(number)
        prompt, answers = prompt_of(row), answers_of(row)
        parts = {"prompt": prompt, **answers}
        self.is_text = any(isinstance(value, str) for value in parts.values())
        self.tokens.look({part: list(_texts(value)) for part, value in parts.items()}, place, self.is_text)
        if not prompt or not answers:
            return
        if all(_begins_with(answer, prompt) for answer in answers.values()):
            length = len("".join(prompt.split())) if isinstance(prompt, str) else _CHANCE
            self.repeated += 1
            self.repeated_characters += length
            if length >= _CHANCE // 2:
                self.plainly_repeated += 1
                self.first_repeated = self.first_repeated or place
            return
        for answer in answers.values():
            for role in (
                {turn.get("role") for turn in answer} & {"user", "system", "developer", "tool"}
                if isinstance(answer, list)
                else ()
            ):
                self.others[role] += 1
                self.first_other.setdefault(role, place)

    def refuse(self) -> None:
        """Raise DataError for a prompt that stands in the answers too, and for others' turns within an answer."""
        if self._are_repeated:
            first = f" (first: {self.first_repeated})" if self.first_repeated else ""
            raise DataError(
                f"{self.name}: in {self.repeated} of {self.rows} {self.unit} the answers begin with the prompt, which "
                f"stands in its own column as well{first}: it would be there twice, and learned "
                "as part of the answers. Cut it off the answers, or of pairs leave the column out:\n"
                '  dataset = dataset.remove_columns("prompt")'
            )
        for role in ("user", "system", "developer"):
            if self.others[role]:
                raise DataError(
                    f"{self.name}: in {self.others[role]} answers the {role} takes a turn (first: "
                    f"{self.first_other[role]}), which would be learned as the assistant's words. Move the turns up "
                    "to the last answer into the prompt, or cut the answer after its first turn."
                )

    def warnings(self) -> list[str]:
        """A sentence about each fault that is only said."""
        said = []
        if self.plainly_repeated and not self._are_repeated:
            said.append(
                f"{self.name}: in {self.plainly_repeated} of {self.rows} {self.unit} the answers begin with the prompt "
                f"and repeat it (first: {self.first_repeated}). Where it is no part of the answer, cut it off."
            )
        if self.others["tool"]:
            said.append(
                f"{self.name}: in {self.others['tool']} answers a tool takes a turn (first: "
                f"{self.first_other['tool']}); its results are learned as the assistant's words. Move the turns up to "
                "the last answer into the prompt."
            )
        return said

    @property
    def _are_repeated(self) -> bool:
        if not self.is_text:
            return self.repeated > 0
        if self.repeated == self.rows and self.repeated_characters >= _CHANCE:
            return True
        return 2 * self.plainly_repeated >= self.rows and self.repeated_characters >= _CHANCE

    def to_render(self) -> list[int]:
        """The rows to render, in order."""
        spread = {i * self.rows // SPREAD for i in range(SPREAD)} if self.rows > SPREAD else set(range(self.rows))
        few = max(_FEW, int(_FEW_SHARE * self.rows))
        looks = sorted(self.looks.values(), key=len)
        unlike = [number for numbers in looks if len(numbers) <= few for number in numbers][:UNLIKE]
        # of rows that look alike, the first
        return sorted({*spread, *unlike, *(numbers[0] for numbers in looks[:UNLIKE])})


def _look(row: Mapping) -> tuple:
    """What a row looks like, beside its texts."""
    found = []
    for name, value in row.items():
        if name == "tools":
            found.append((name, bool(value)))
        elif name == "chat_template_kwargs":
            found.append((name, tuple(sorted(value or ()))))
        elif isinstance(value, list):
            found.append((name, tuple(_look_of_turn(turn) for turn in value)))
        else:
            found.append((name, "empty" if not value else "text"))
    return tuple(found)


def _look_of_turn(turn) -> tuple:
    if not isinstance(turn, Mapping):
        return (type(turn).__name__,)
    content = turn.get("content")
    kind = "empty" if not content else type(content).__name__
    if isinstance(content, list):
        kind = tuple(sorted({str(block.get("type")) for block in content if isinstance(block, Mapping)}))
    thinks = isinstance(content, str) and "</think>" in content
    keys = tuple(sorted(key for key, value in turn.items() if value not in (None, "", []) and key != "content"))
    return turn.get("role"), kind, thinks, keys


def _texts(value) -> Iterator[str]:
    """The texts that someone wrote in a prompt or an answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for turn in value:
            content = turn.get("content") if isinstance(turn, Mapping) else None
            if isinstance(content, str):
                yield content
            elif isinstance(content, list):
                yield from (
                    block["text"]
                    for block in content
                    if isinstance(block, Mapping) and isinstance(block.get("text"), str)
                )


def _begins_with(answer, prompt) -> bool:
    """Whether an answer begins with the prompt, or with the end of it."""
    if isinstance(prompt, str) or isinstance(answer, str):
        both = isinstance(prompt, str) and isinstance(answer, str) and bool(prompt.strip())
        return both and answer.strip().startswith(prompt.strip())
    said = [(turn.get("role"), turn.get("content")) for turn in answer]
    asked = [(turn.get("role"), turn.get("content")) for turn in prompt]
    shared = [n for n in range(1, min(len(said), len(asked)) + 1) if said[:n] == asked[-n:]]
    return any(asked[-n:][0][0] != "assistant" for n in shared)
