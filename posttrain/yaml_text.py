"""YAML of strangers, read in bounded time and memory: its size, and that of what its aliases stand for; and written."""

import yaml

from posttrain.visible import visible

# Settings of a run are some thousand characters; a file of its resolved settings some ten thousand.
MOST_BYTES = 4 << 20
MOST_NODES = 200_000
# YAML 1.1 knows numbers to the base 60 (1:59:59), whose reading takes the square of their length.
LONGEST_NUMBER = 100
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def compose(text: str, loader_class: type = yaml.SafeLoader):
    """Return the loader, and the root node (or None), of a text with bounded contents.

    Raises:
        yaml.YAMLError: it is no YAML, too long, contains itself, grows without bounds through aliases or merges, or has
            a number of more than `LONGEST_NUMBER` characters.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it has more than {MOST_BYTES >> 20} million characters")
    loader = loader_class(text)
    root = loader.get_single_node()
    _check_size(root)
    return loader, root


def load(text: str):
    """Return the content of a text. Raises as `compose`, and RecursionError for what is nested too deeply."""
    loader, root = compose(text)
    return None if root is None else loader.construct_document(root)


def dump(content) -> str:
    """Return YAML of plain values in their order, of which no character steers a console."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text if visible(text) == text else yaml.safe_dump(content, sort_keys=False)


def read(path, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a file of settings. Raises yaml.YAMLError where it has more than `most`, and OSError."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise yaml.YAMLError(f"the file has more than {most >> 20} MiB, which are no settings")
    return content


def _check_size(root) -> None:
    """Refuse a document whose aliases stand for more nodes than anyone writes; each node is visited once."""
    sizes: dict[int, int | None] = {}
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if not isinstance(node, yaml.CollectionNode):
            _check_number(node)
            continue
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        if done:
            sizes[id(node)] = 1 + sum(sizes.get(id(part)) or 1 for part in parts)
            if sizes[id(node)] > MOST_NODES:
                raise yaml.composer.ComposerError(
                    problem=f"what its aliases stand for has more than {MOST_NODES:,} values",
                    problem_mark=node.start_mark,
                )
        elif id(node) not in sizes:
            # None while its parts are measured: one that contains itself is refused by name elsewhere
            sizes[id(node)] = None
            stack.append((node, True))
            stack.extend((part, False) for part in parts)


def _check_number(node) -> None:
    if node is not None and node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
        raise yaml.composer.ComposerError(
            problem=f"a number of {len(node.value):,} characters, and {LONGEST_NUMBER} are the most",
            problem_mark=node.start_mark,
        )
