"""Recipes are checked to the last key, and the bundled ones say what the papers say."""

from __future__ import annotations

import pytest

from crowdexit.models import zoo
from crowdexit.training.recipe import RecipeError, bundled, read_recipe
from crowdexit.training.suite import read_suite

GOOD = "stage: density\nmodel: audiocsrnet-s\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD + "epoch: 3\n", "epoch: unknown key"),
        (GOOD + "data: {crop: 3}\n", "data.crop: unknown key"),
        (GOOD + "epochs: 0\n", "epochs: Input should be greater than 0"),
        (GOOD + "loss: mae\n", "recipe: the loss 'mae' is not for the stage 'density'"),
        (GOOD + "exits: [{name: a, place: V1, kind: cnn}]\n", "recipe: the stage 'density' trains no exits"),
        (GOOD + "start: a\nweights: {vgg16: b}\n", "recipe: start and weights exclude each other"),
        (GOOD + "data: {canvas: [100, 64]}\n", "data: canvas sides have to be multiples of 8"),
        (GOOD + "data: {scale: [1.3, 0.7]}\n", "data: scale is a lowest and a highest factor"),
        (GOOD + "data: {balance: {A: 0}}\n", "data: balance: each group"),
        (GOOD + "data: {conditions: {brightness: [0.5, 0.1]}}\n", "data.conditions: brightness is a lowest"),
        ("stage: branches\nmodel: audiocsrnet-s\n", "recipe: the stage 'branches' needs exits"),
        ("stage: classes\nmodel: resnet18\nloss: cross-entropy\nwatch: audio\n", "recipe: a classifier is validated"),
        ("stage: hearing\nmodel: audiocsrnet-s\nwatch: no-audio\n", "recipe: the stage 'hearing' is validated with"),
        ("stage: [\n", "not YAML"),
        ("- a\n", "a recipe is a mapping"),
    ],
)
def test_bad_recipe_is_one_line(tmp_path, text, problem):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "\n" not in message


def test_no_such_recipe():
    with pytest.raises(RecipeError, match=r"nothing: no such recipe .*audiocsrnet-density"):
        read_recipe("nothing")


def test_changes_by_dotted_key(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    recipe = read_recipe(path, {"data.conditions.share": 1, "optimiser.lr": "1e-4", "epochs": 2})
    assert (recipe.data.conditions.share, recipe.optimiser.lr, recipe.epochs) == (1, 1e-4, 2)
    with pytest.raises(RecipeError, match="'epochs' is not a group of keys"):
        read_recipe(path, {"epochs": 2, "epochs.x": 1})


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_build(name):
    recipe = read_recipe(name)
    exits = tuple(zoo.ExitSpec(e.name, e.place, e.kind, e.options) for e in recipe.exits)
    small = {"width": 0.0625, "audio_width": 0.0625} if recipe.model.startswith("audio") else {"dim": 12, "heads": 2}
    view = {key: value for key, value in recipe.changes.items() if key in ("view", "size")}
    zoo.build(zoo.Spec(recipe.model, exits, {**small, **view, "hidden": 4}))
    if name.startswith("audio") and name.endswith("-branches"):
        assert {(e.place, e.kind) for e in exits} == {(p, k) for p in ("V1", "AV1", "AV2") for k in ("cnn", "slvit")}


def test_every_pair_of_kinds_and_places(tmp_path):
    recipe = read_recipe("transcrowd-branches")
    assert len(recipe.exits) == 77
    assert [(e.name, e.place, e.kind) for e in recipe.exits[:2]] == [
        ("1-mlp", "1", "mlp"),
        ("1-cnn-ignore", "1", "cnn-ignore"),
    ]
    three = read_recipe("transcrowd-end-to-end", {"exits.places": [3, 6, 9], "exits.kinds": ["vit"]})
    assert [e.name for e in three.exits] == ["3-vit", "6-vit", "9-vit"]
    for exits in ("{kinds: [mlp]}", "{kinds: mlp, places: [1]}", "7"):
        (tmp_path / "r.yaml").write_text(f"stage: branches\nmodel: transcrowd-token\nexits: {exits}\n")
        with pytest.raises(RecipeError, match=r"exits"):
            read_recipe(tmp_path / "r.yaml")


def test_the_papers_settings():
    one, two, three = (read_recipe(f"audiocsrnet-{stage}") for stage in ("density", "count", "branches"))
    o = one.optimiser
    assert (one.loss, one.data.stride, one.data.whole, one.epochs, one.batch) == ("l2", 1, True, 100, 4)
    assert (o.name, o.lr, o.weight_decay, o.schedule, o.factor) == ("adamw", 1e-5, 1e-4, "exponential", 0.99)
    o = two.optimiser
    assert (two.loss, two.data.whole, two.epochs, two.changes) == ("mae", True, 100, {"regressor": True})
    assert (o.name, o.lr, o.weight_decay, o.schedule, o.factor) == ("adamw", 1e-6, 1e-5, "exponential", 0.99)
    o = three.optimiser
    assert (three.loss, three.data.whole, three.stop, three.batch, three.tied, three.ema) == (
        "mae",
        True,
        5,
        4,
        False,
        0,
    )
    assert (o.name, o.lr, o.schedule, o.factor, o.patience, o.warmup) == ("adam", 1e-4, "plateau", 0.6, 2, 0)
    # Published with audio, so that this is what the best checkpoint is chosen by.
    assert {recipe.watch for recipe in (one, two, three)} == {"audio"}
    assert read_suite("table-viii").branches["watch"] == "audio"
