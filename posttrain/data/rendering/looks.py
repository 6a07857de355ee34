"""What rows look like beside their texts, and which of them are rendered so that each feature of a look is seen."""

from collections.abc import Iterator, Mapping

from posttrain.data.rendering.additions import misreads

# Rows that are rendered: so many, spread over the data set, and of those that look unlike the others up to so many.
SPREAD, UNLIKE = 32, 256
# Rows for features of looks that none of these has, at most.
FEATURES = 512
# Rows of each feature, where there are so many.
_OF_A_FEATURE = 2
# Rows look unlike the others where no more than this share of them, or so few, look like that.
_FEW_SHARE, _FEW = 0.01, 8


def rows_to_render(looks: Mapping[tuple, list[int]], rows: int) -> list[int]:
    """Return the rows to render, in order.

    They are spread over the data set; those whose whole look few rows have, and one of each look, both up to UNLIKE;
    and of each feature of a look (a role, a key, a type of block, what stands last, two of them together) some, those
    of a turn alone first, the rare ones first.

    Args:
        looks: the numbers of the rows that look alike, by their look.
    """
    spread = {i * rows // SPREAD for i in range(SPREAD)} if rows > SPREAD else set(range(rows))
    few = max(_FEW, int(_FEW_SHARE * rows))
    alike = sorted(looks.values(), key=len)
    unlike = [number for numbers in alike if len(numbers) <= few for number in numbers][:UNLIKE]
    # of rows that look alike, the first
    chosen = {*spread, *unlike, *(numbers[0] for numbers in alike[:UNLIKE])}
    if len(alike) <= UNLIKE:
        return sorted(chosen)
    return sorted(chosen | _of_features(looks, chosen))


def _of_features(looks: Mapping[tuple, list[int]], chosen: set[int]) -> set[int]:
    counts, first, seen = {}, {}, {}
    for look, numbers in looks.items():
        has = sum(number in chosen for number in numbers)
        for feature in set(_features(look)):
            counts[feature] = counts.get(feature, 0) + len(numbers)
            seen[feature] = seen.get(feature, 0) + has
            kept = first.setdefault(feature, [])
            kept += [number for number in numbers[:_OF_A_FEATURE] if number not in chosen][: _OF_A_FEATURE - len(kept)]
    found: set[int] = set()
    for feature in sorted(first, key=lambda feature: (feature[0], counts[feature])):
        has = seen[feature] + sum(number in found for number in first[feature])
        for number in first[feature]:
            if has >= min(_OF_A_FEATURE, counts[feature]) or len(found) >= FEATURES:
                break
            if number not in found:
                found.add(number)
                has += 1
    return found


def look_of(row: Mapping) -> tuple:
    """Tell what a row looks like, beside its texts."""
    found = []
    for name, value in row.items():
        if name == "tools":
            found.append((name, bool(value)))
        elif name == "chat_template_kwargs":
            # a setting that is no switch can have a value of its own in each row
            pairs = ((key, one if isinstance(one, bool | None) else "set") for key, one in (value or {}).items())
            found.append((name, tuple(sorted(pairs, key=repr))))
        elif isinstance(value, list):
            found.append((name, tuple(_look_of_turn(turn) for turn in value)))
        else:
            found.append((name, "empty" if not value else "text"))
    return tuple(found)


def _features(look: tuple) -> Iterator[tuple]:
    """Return the features of a look, each behind its rank: 0 for one thing, 1 for a whole turn and where it stands,
    2 for two.

    A turn's whole look counts by its column, at the end and at the beginning, behind the one before, and beside the
    tools and the settings of the template.
    """
    others = [(name, value) for name, value in look if not _is_turns(value)]
    for other in others:
        yield 0, other
    for name, turns in look:
        if not _is_turns(turns):
            continue
        yield 1, name, "turns", min(len(turns), 4)
        yield 1, name, "last", turns[-1]
        yield 1, name, "first", turns[0]
        for turn in set(turns):
            for part in _parts(turn):
                yield 0, name, part
                for other in others:
                    yield 2, name, part, other
            yield 1, name, turn
        for before, turn in {*zip(turns, turns[1:], strict=False)}:
            yield 1, name, before[0], turn[0]
            yield 2, name, before, turn


def _is_turns(value) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], tuple) and len(value[0]) in (1, 4)


def _parts(turn: tuple) -> Iterator[tuple]:
    if len(turn) == 1:
        yield turn
        return
    role, kind, thinks, keys = turn
    yield "role", role
    for one in kind if isinstance(kind, tuple) else (kind,):
        yield "content", role, one
    if thinks:
        yield "thinks", role, thinks
    for key in keys:
        yield "key", role, key


def _look_of_turn(turn) -> tuple:
    if not isinstance(turn, Mapping):
        return (type(turn).__name__,)
    content = turn.get("content")
    kind = "empty" if not content else type(content).__name__
    if isinstance(content, list):
        kind = tuple(sorted({str(block.get("type")) for block in content if isinstance(block, Mapping)}))
    thinks = isinstance(content, str) and (misreads(content) or "</think>" in content)
    keys = tuple(sorted(key for key, value in turn.items() if value not in (None, "", []) and key != "content"))
    return turn.get("role"), kind, thinks, keys
