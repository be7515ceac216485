import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from dq.calibrate import CalibrationSpec
from dq.errors import DQError
from dq.method import methods
from dq.recipe import Recipe, templates
from tests.modules import ROOT

STEPS = {"steps": [{"method": "ptq"}]}


@pytest.mark.parametrize("name", [name for name in templates.names() if "X" not in name])
def test_every_name_that_is_listed_is_a_recipe(name: str) -> None:
    recipe = Recipe.get(name)
    assert recipe.name == name
    assert recipe.steps
    assert templates[name].help


@pytest.mark.parametrize("name", [name for name in templates.names() if "X" not in name])
def test_recipes_survive_json_and_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.get(name)
    text = json.dumps(recipe.to_dict())
    assert Recipe.from_dict(json.loads(text)) == recipe
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.get(tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(text)))
    assert Recipe.get(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "recipes").iterdir()), ids=lambda f: f.stem
)
def test_recipes_of_the_documentation_are_read(file: Path) -> None:
    recipe = Recipe.get(file)
    assert recipe.name == file.stem
    assert recipe.steps


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_frozen_and_works_by_default(name: str) -> None:
    recipe = Recipe.from_dict({"steps": [{"method": name}]})
    (step,) = recipe.steps
    assert type(step) is methods[name]
    assert step == methods[name]()
    assert recipe.to_dict()["steps"][0]["method"] == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.anything = 1  # type: ignore[attr-defined]


def test_recipes_are_taken_as_they_are() -> None:
    recipe = Recipe.get("w8a8")
    assert Recipe.get(recipe) is recipe
    assert Recipe.get(recipe.to_dict()) == recipe


def test_calibration_is_read() -> None:
    values = {**STEPS, "name": "mine", "calibration": {"prompts": ["a cat"], "n": 3, "seed": 7}}
    recipe = Recipe.get(values)
    assert recipe.name == "mine"
    assert recipe.calibration == CalibrationSpec(prompts=("a cat",), n=3, seed=7)
    for nothing in ({}, None):
        assert Recipe.from_dict({**STEPS, "calibration": nothing}).calibration == CalibrationSpec()
    assert Recipe.from_dict(STEPS).calibration == CalibrationSpec()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("w8a8-dynamc", "unknown recipe 'w8a8-dynamc'. Did you mean 'w8a8'"),
        ("w9a8", r"unknown recipe 'w9a8'. Did you mean 'w\da8'"),
        ("W8A8", "unknown recipe 'W8A8'"),
        ("wXaY", "unknown recipe 'wXaY'"),
        ("", "unknown recipe ''"),
        ("missing.yaml", "recipe file missing.yaml does not exist"),
        ({}, "the recipe has no steps; add one such as"),
        ({**STEPS, "step": []}, "unknown key of the recipe 'step'. Did you mean 'steps'?"),
        ({"steps": [{"method": "pqt"}]}, r"steps\[0\]: unknown method 'pqt'. Did you mean 'ptq'"),
        ({"steps": [{"weights": "int8"}]}, r"steps\[0\]: unknown method ''"),
        (
            {"steps": [{"method": "ptq"}, {"method": "ptq", "weigths": "int4"}]},
            r"steps\[1\]: unknown key of the PTQ 'weigths'. Did you mean 'weights'?",
        ),
        (
            {"steps": [{"method": "ptq", "weights": "int9"}]},
            r"steps\[0\]: unknown weight format 'int9'. Did you mean 'int",
        ),
        ({"steps": ["ptq"]}, r"steps\[0\]: a step is a mapping such as {method: ptq}, not 'ptq'"),
        ({"steps": {"method": "ptq"}}, "steps is a list of mappings such as {method: ptq}, not"),
        (
            {"steps": [{"method": "ptq", "smallest": "4"}]},
            r"steps\[0\]: smallest takes int, not '4'",
        ),
        (
            {"steps": [{"method": "ptq", "smallest": True}]},
            r"steps\[0\]: smallest takes int, not True",
        ),
        (
            {"steps": [{"method": "ptq", "skip_roles": "io"}]},
            r"steps\[0\]: skip_roles takes list\[str, ...\], not 'io'",
        ),
        (
            {**STEPS, "calibration": {"prompts": "a cat"}},
            r"calibration: prompts takes list\[str, ...\] \| None, not 'a cat'",
        ),
        ({**STEPS, "calibration": [3]}, r"calibration: settings are a mapping, not \[3\]"),
        (
            {**STEPS, "calibration": {"promts": ["x"]}},
            "calibration: unknown key of the CalibrationSpec 'promts'. Did you mean 'prompts'?",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(asked: str | dict, text: str) -> None:
    with pytest.raises(DQError, match=text):
        Recipe.get(asked)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("steps: [", "recipe.yaml: not valid YAML or JSON"),
        ("- ptq", "recipe.yaml: a recipe is a mapping with the keys name, steps"),
        ("", "recipe.yaml: a recipe is a mapping"),
        (
            "steps: [{method: ptq, weight_bit: 4}]",
            r"recipe.yaml: steps\[0\]: unknown key of the PTQ",
        ),
    ],
)
def test_mistakes_in_a_file_name_the_file(content: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(DQError, match=text):
        Recipe.get(path)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "recipes").glob("*.yaml")), ids=str)
def test_recipes_of_the_documentation_are_recipes(path: Path) -> None:
    made = Recipe.get(path)
    assert made.name == path.stem
    assert Recipe.from_dict(made.to_dict()) == made
