"""The library's layers, read from its imports: each stands on those below it alone, and no two on each other."""

import ast
import importlib
from pathlib import Path

import pytest

import posttrain
import posttrain.data
from posttrain import former_names

ROOT = Path(posttrain.__file__).parent
# from the ground up; a name is a module or a folder of them
LAYERS = (
    (
        "errors",
        "signals",
        "started",
        "log",
        "paths",
        "compat",
        "console",
        "outputs",
        "exit_codes",
        "private",
        "secret_forms",
        "secret_names",
        "remote",
        "quiet",
        "checks",
        "bounded",
        "patterns",
        "model_sizes",
        "environment",
        "tables",
        "saved",
        "whole_files",
        "config",
        "models",
        "user_code",
        "visible",
        "yaml_text",
    ),
    ("objectives",),
    ("rewards",),
    ("data",),
    ("mechanisms",),
    ("adapters", "evaluation", "generation", "planning", "privacy"),
    ("hub",),
    ("run",),
    ("trainers",),
    ("federated",),
    ("recipe",),
    ("cli", "__main__"),
)
# modules by the names that they had, which stand on none by an import of their own
OUTSIDE = {"posttrain", "former_names"}
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# families that stand on another one
ON = {"offline": {"sft"}}


def name_of(path: Path) -> str:
    parts = ("posttrain", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posttrain"):
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    # the module of a name that is imported from it, and a package only where nothing in it was meant
    return {name for name in found if name in modules and not any(other.startswith(f"{name}.") for other in found)}


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if "_recipes" not in path.parts}
ARROWS = {name: imports_of(path, MODULES) - {name} for name, path in MODULES.items()}


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else "posttrain"


def test_every_module_has_a_layer():
    assert {part(name) for name in MODULES} - LEVELS.keys() == OUTSIDE


def test_no_import_goes_up():
    up = [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if part(name) in LEVELS and LEVELS.get(part(other), 0) > LEVELS[part(name)]
    ]
    assert up == []


def test_families_of_trainers_know_no_other_family():
    family = {name: name.split(".")[2] for name in MODULES if name.startswith("posttrain.trainers.")}
    across = [
        f"{name} -> {other}"
        for name in family
        for other in ARROWS[name] & family.keys()
        if family[other] != family[name] and family[other] not in ON.get(family[name], set())
    ]
    assert across == []


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()
    for start in MODULES:
        stack = [(start, iter(sorted(ARROWS[start])))]
        way = [start]
        while stack and start not in done:
            following = next(stack[-1][1], None)
            if following is None:
                done.add(stack.pop()[0])
                way.pop()
            elif following in way:
                raise AssertionError(" -> ".join([*way[way.index(following) :], following]))
            elif following not in done:
                stack.append((following, iter(sorted(ARROWS[following]))))
                way.append(following)


def test_objectives_know_tensors_only():
    for name, path in MODULES.items():
        if name.startswith("posttrain.objectives"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            modules += [node.names[0].name for node in nodes if isinstance(node, ast.Import)]
            roots = {module.split(".")[0] for module in modules}
            assert not roots & {"transformers", "trl", "peft", "datasets", "accelerate"}, name


def test_modules_are_had_by_the_names_that_they_had():
    for name in former_names._MODULES:
        importlib.import_module(name)
    from posttrain.data.demonstrations import load_demonstrations
    from posttrain.data.preferences import load_preferences
    from posttrain.data.scored import load_scored
    from posttrain.mechanisms.reference_cache import ReferenceCache

    assert load_preferences is posttrain.data.load_preferences and load_scored is posttrain.data.load_scored
    assert load_demonstrations is posttrain.data.load_demonstrations
    assert ReferenceCache.__module__ == "posttrain.mechanisms.sequence_cache"
    with pytest.raises(ImportError, match="nothing"):
        from posttrain.data.schema import nothing  # noqa: F401
    with pytest.raises(ImportError):
        importlib.import_module("posttrain.data.never")
