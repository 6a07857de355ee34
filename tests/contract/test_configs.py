"""Every config that is shipped is one that its recipe takes."""

import pytest

from posttrain.paths import configs_dir
from tests.recipe.in_process import RECIPES, settings_of

CONFIGS = sorted(path for path in configs_dir().glob("*/*.yaml") if path.parent.name != "accelerate")


def test_every_recipe_has_configs():
    assert {path.parent.name for path in CONFIGS} == set(RECIPES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_is_valid(path):
    data, model, args = settings_of(path.parent.name, "--config", str(path))
    assert data.dataset_name and model.model_name_or_path and args.output_dir
