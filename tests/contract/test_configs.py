"""Every config that is shipped is one that its recipe takes, and every recipe draws rows by the run's seed."""

import runpy
import sys

import pytest

from posttrain import recipe
from posttrain.paths import configs_dir, recipes_dir
from tests.recipe.in_process import RECIPES, settings_of, shipped, words

CONFIGS = sorted(path for path in configs_dir().glob("*/*.yaml") if path.parent.name != "accelerate")


def test_every_recipe_has_configs():
    assert {path.parent.name for path in CONFIGS} == set(RECIPES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_is_valid(path):
    data, model, args = settings_of(path.parent.name, "--config", str(path))
    assert data.dataset_name and model.model_name_or_path and args.output_dir


@pytest.mark.parametrize("name", RECIPES)
def test_rows_that_are_held_out_are_drawn_by_the_runs_seed(name, tmp_path, monkeypatch):
    class Loaded(Exception):
        """The seed that rows are held out by."""

    def load_splits(load, data_args, evaluate, seed=None):
        raise Loaded(seed)

    monkeypatch.setattr(recipe, "load_splits", load_splits)
    given = words(dict(model_name_or_path="embedded:tiny", output_dir=tmp_path / "run", seed=7))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--config", str(shipped(name)), *given])
    with pytest.raises(Loaded, match="^7$"):
        runpy.run_path(str(recipes_dir() / f"{name}.py"))["main"]()
