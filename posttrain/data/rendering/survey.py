"""One pass over all rows of a data set: what they look like, and the faults that show without a chat template."""

from collections import Counter
from collections.abc import Iterator, Mapping

from posttrain.data.rendering.applied import ControlTokens
from posttrain.data.rendering.looks import look_of
from posttrain.data.rendering.marks import REASONING, switch_of
from posttrain.data.rendering.probes import answers_of, prompt_of
from posttrain.data.rendering.repeats import BEGINS, TRANSCRIPT, repeats
from posttrain.data.row_options import tools_of
from posttrain.errors import DataError

# Characters that prompts must have together before answers that begin with them are no chance.
_CHANCE = 16
# Keys of a message whose texts a template can render
_WRITTEN = ("content", *REASONING, "name", "tool_calls", "function_call")


class Survey:
    """One pass over all rows: what they look like, and the faults that need no template."""

    def __init__(self, name: str, rows: int, unit: str, tokens: ControlTokens):
        self.name, self.rows, self.unit, self.tokens = name, rows, unit, tokens
        self.looks: dict[tuple, list[int]] = {}
        self.is_text = False
        self.repeated, self.repeated_characters = 0, 0
        # of those, with prompts too long for chance
        self.plainly_repeated, self.first_repeated = 0, ""
        # rows whose answers hold the prompt in another way: all as a transcript, all, or the side that alone does
        self.held: Counter = Counter()
        self.first_held: dict[str, str] = {}
        self.others: Counter = Counter()
        self.first_other: dict[str, str] = {}
        # rows with a turn that is not to be learned, or not as the others, and what the first of them says
        self.unlearned, self.first_unlearned = 0, ""

    def look(self, number: int, row: Mapping, place: str) -> None:
        """Take in a row."""
        self.looks.setdefault(look_of(row), []).append(number)
        prompt, answers = prompt_of(row), answers_of(row)
        parts = {"prompt": prompt, **answers}
        self.is_text = any(isinstance(value, str) for value in parts.values())
        texts = {part: list(_texts(value)) for part, value in parts.items()}
        if not self.is_text and row.get("tools"):
            texts["tools"] = list(_strings(tools_of(row)))
        self.tokens.look(texts, place, self.is_text)
        self._look_for_switches(answers, place)
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
        self._look_for_prompt(prompt, answers, place)
        for answer in answers.values():
            for role in (
                {turn.get("role") for turn in answer} & {"user", "system", "developer", "tool"}
                if isinstance(answer, list)
                else ()
            ):
                self.others[role] += 1
                self.first_other.setdefault(role, place)

    def _look_for_switches(self, answers: Mapping, place: str) -> None:
        for name, answer in answers.items():
            # of whole conversations no answer is told apart here
            turns = answer if isinstance(answer, list) and name != "messages" else []
            for number, turn in enumerate(turns, 1):
                key = switch_of(turn)
                if key is not None:
                    self.unlearned += 1
                    self.first_unlearned = self.first_unlearned or (
                        f"{place}, whose {name} has {key}: {turn[key]!r} in message {number} of {len(turns)}"
                    )
                    return

    def _look_for_prompt(self, prompt, answers: Mapping, place: str) -> None:
        found = {name: repeats(prompt, answer) for name, answer in answers.items()}
        if not any(found.values()):
            return
        kind = "quoted"
        if all(how in (BEGINS, TRANSCRIPT) for how in found.values()):
            kind = "transcript"
        elif sum(map(bool, found.values())) < len(found):
            kind = next(name for name, how in found.items() if how)
        self.held[kind] += 1
        self.first_held.setdefault(kind, place)

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
        if 2 * (self.held["transcript"] + self.plainly_repeated) >= self.rows and self.held["transcript"]:
            raise DataError(
                f"{self.name}: in {self.held['transcript']} of {self.rows} {self.unit} the answers begin with a "
                f"transcript of the prompt, which stands in its own column as well (first: "
                f"{self.first_held['transcript']}): it would be there twice, and learned as part of the answers. Cut "
                "off all that stands before the answer's own words."
            )
        if self.unlearned:
            raise DataError(
                f"{self.name}: in {self.unlearned} of {self.rows} {self.unit} a turn of an answer is marked as not to "
                f"be learned, or with a weight of its own (first: {self.first_unlearned}). All tokens of an answer are "
                "learned alike here. Move the turns up to the last one into the prompt, where nothing is learned; "
                "leave out rows whose last turn is marked, and the key where it means something else."
            )
        for role in ("user", "system", "developer"):
            if self.others[role]:
                raise DataError(
                    f"{self.name}: in {self.others[role]} answers the {role} takes a turn (first: "
                    f"{self.first_other[role]}), which would be learned as the assistant's words. Move the turns up "
                    "to the last answer into the prompt, or cut the answer after its first turn."
                )

    def warnings(self) -> list[str]:
        """Return a sentence about each fault that is only said."""
        said = []
        if self.plainly_repeated and not self._are_repeated:
            said.append(
                f"{self.name}: in {self.plainly_repeated} of {self.rows} {self.unit} the answers begin with the prompt "
                f"and repeat it (first: {self.first_repeated}). Where it is no part of the answer, cut it off."
            )
        held = sum(self.held.values())
        if held and 2 * held >= self.rows:
            sides = [name for name in self.held if name not in ("transcript", "quoted")]
            one = ""
            if len(sides) == 1 and 2 * self.held[sides[0]] >= self.rows:
                one = f" In {self.held[sides[0]]} of them only {sides[0]!r} does, which tells the sides apart."
            said.append(
                f"{self.name}: in {held} of {self.rows} {self.unit} the prompt stands once more at the beginning of an "
                f"answer (first: {next(iter(self.first_held.values()))}), and is learned as part of it.{one} Where it "
                "is no part of the answer, cut it off."
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


def _texts(value) -> Iterator[str]:
    """Return the texts that someone wrote in a prompt or an answer: contents, reasoning, names and calls of tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for turn in value:
            for name in _WRITTEN if isinstance(turn, Mapping) else ():
                if turn.get(name):
                    yield from _strings(turn[name])


def _strings(value) -> Iterator[str]:
    """Collect all texts in nested lists and mappings, their keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield key
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _begins_with(answer, prompt) -> bool:
    """Tell whether an answer begins with the prompt, or with the end of it."""
    if isinstance(prompt, str) or isinstance(answer, str):
        both = isinstance(prompt, str) and isinstance(answer, str) and bool(prompt.strip())
        return both and answer.strip().startswith(prompt.strip())
    said = [(turn.get("role"), turn.get("content")) for turn in answer]
    asked = [(turn.get("role"), turn.get("content")) for turn in prompt]
    shared = [n for n in range(1, min(len(said), len(asked)) + 1) if said[:n] == asked[-n:]]
    return any(asked[-n:][0][0] != "assistant" for n in shared)
