"""Every config that is shipped is one that its recipe takes."""

import importlib.util
import sys

import pytest

from posttrain import config
from posttrain.paths import configs_dir, recipes_dir

CONFIGS = sorted(path for path in configs_dir().glob("*/*.yaml") if path.parent.name != "accelerate")


class Parsed(Exception):
    """A recipe's sections as it read them."""


def test_every_recipe_has_configs():
    assert {path.parent.name for path in CONFIGS} == {path.stem for path in recipes_dir().glob("*.py")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_is_valid(path, monkeypatch):
    def parsed(sections, *args):
        raise Parsed(config.parse(sections, *args))

    recipe = recipes_dir() / f"{path.parent.name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_of_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reader = module if hasattr(module, "parse") else sys.modules[module.run.__module__]
    monkeypatch.setattr(reader, "parse", parsed)
    monkeypatch.setattr(sys, "argv", [str(recipe), "--config", str(path)])
    with pytest.raises(Parsed) as found:
        module.main()
    (sections,) = found.value.args
    data, model, args = sections
    assert data.dataset_name and model.model_name_or_path and args.output_dir
