"""Recipes: what is read, what is refused, and the words of each refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
import yaml

from ostro.config import Options, PathField, dump_recipe, json_schema, load_recipe, shipped_recipes
from ostro.errors import RecipeError
from ostro.train import recipe as train_recipe


class Source(Options):
    type: Literal["beir", "jsonl"] = "beir"
    path: PathField
    weight: float = pydantic.Field(1.0, gt=0)


class Texts(Options):
    form: Literal["texts"]
    words: int = pydantic.Field(3, ge=1, le=9)


class Pairs(Options):
    form: Literal["pairs"]
    names: tuple[str, ...] = ()


class Data(Options):
    train: tuple[Source, ...] = pydantic.Field(min_length=1)
    form: Annotated[Texts | Pairs, pydantic.Field(discriminator="form")] = Texts(form="texts")


class Loss(Options):
    temperature: float = pydantic.Field(0.05, gt=0)
    dims: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @pydantic.model_validator(mode="after")
    def _lengths_agree(self) -> Loss:
        if self.weights and len(self.weights) != len(self.dims):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(self.dims)} dims; give one per dim or none"
            )
        return self


class Evaluate(Options):
    every: int = 10


class Toy(Options):
    """A recipe with every kind of field the real ones have."""

    kind: Literal["toy"]
    seed: int = 0
    output: PathField = "runs/toy"
    title: str | None = None
    shuffle: bool = True
    data: Data
    loss: Loss = Loss()
    evaluate: Evaluate | None = None
    prompts: dict[str, str] = {}


KINDS = {"toy": Toy}
SMALL = "kind: toy\ndata: {train: [{path: corpus}]}\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str = SMALL, *overrides: str) -> Toy:
        file = tmp_path / "toy.yaml"
        file.write_text(text, encoding="utf-8")
        return load_recipe(file, overrides, KINDS)

    return load


def refusal(load: Any, text: str = SMALL, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-6", 2e-6), ("1e3", 1000.0), ("-1.5E+2", -150.0), (".5", 0.5), ("5.", 5.0), ("1_000.5", 1000.5)],
)
def test_floats_are_read_as_people_write_them(load: Any, text: str, value: float) -> None:
    weight = f"data.train.0.weight={text}"
    if value > 0:
        assert load(SMALL, weight).data.train[0].weight == value
    else:
        assert refusal(load, SMALL, weight) == f"data.train.0.weight: must be > 0, got {value}"


def test_only_core_schema_scalars_are_special(load: Any) -> None:
    recipe = load(
        SMALL + "prompts: {a: no, b: on, c: 010, d: 12:30, e: 2024-01-01, f: 1e, g: .inf, h: e5}\n", "seed=1_000"
    )
    assert recipe.prompts == {
        "a": "no",
        "b": "on",
        "c": "010",
        "d": "12:30",
        "e": "2024-01-01",
        "f": "1e",
        "g": ".inf",
        "h": "e5",
    }
    assert recipe.seed == 1000


def test_overrides_edit_blocks_lists_and_absent_blocks(load: Any) -> None:
    recipe = load(
        SMALL + "evaluate: null\n",
        "seed=7",
        "data.train.0.path=other=place",
        "loss.dims=[8, 16]",
        "evaluate.every=3",
        "title=null",
        "shuffle=false",
        "data.form={form: pairs, names: [x]}",
        "seed=8",
    )
    assert recipe.seed == 8
    assert recipe.data.train[0].path == "other=place"
    assert recipe.loss.dims == (8, 16)
    assert recipe.evaluate == Evaluate(every=3)
    assert recipe.title is None
    assert recipe.shuffle is False
    assert recipe.data.form == Pairs(form="pairs", names=("x",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperture=1.0", "loss.temperture: unknown key; nearest valid key: loss.temperature"),
        ("temperature=1.0", "temperature: unknown key; nearest valid key: loss.temperature"),
        ("data.train.0.pth=x", "data.train.0.pth: unknown key; nearest valid key: data.train.0.path"),
        ("evaluate.evry=3", "evaluate.evry: unknown key; nearest valid key: evaluate.every"),
        ("data.form={form: texts, zz: 3}", "data.form.zz: unknown key; valid keys here: form, words, names"),
        ("loss.temperature=-1.0", "loss.temperature: must be > 0, got -1.0"),
        ("loss.temperature=0", "loss.temperature: must be > 0, got 0"),
        ("loss.temperature=1e999", "loss.temperature: must be finite, got Infinity"),
        ("loss.temperature=hot", 'loss.temperature: must be a number, got "hot"'),
        ("loss.temperature=null", "loss.temperature: must be a number, got null"),
        ("loss.dims=8", "loss.dims: must be a list, got 8"),
        ("loss.dims=[8, x]", 'loss.dims.1: must be an integer, got "x"'),
        ("loss=3", "loss: must be a block with keys, got 3"),
        ("seed=1.5", "seed: must be an integer, got 1.5"),
        ('seed="1"', 'seed: must be an integer, got "1"'),
        ("seed=true", "seed: must be an integer, got true"),
        ("shuffle=1", "shuffle: must be true or false, got 1"),
        ("title=1", "title: must be text, got 1"),
        ("data.train=[]", "data.train: must have at least 1 entries, got []"),
        ("data.train=[{}]", "data.train.0.path: required, but not given"),
        ("data.train.0.type=bier", "data.train.0.type: must be 'beir' or 'jsonl', got \"bier\""),
        ("data.form={form: texts, words: 10}", "data.form.words: must be <= 9, got 10"),
        ("data.form.words=0", "data.form: 'form' is required, but not given"),
        ("data.form={form: words}", "data.form: 'form' must be one of 'texts', 'pairs', got 'words'"),
        ("prompts=[]", "prompts: must be a block with keys, got []"),
        ("prompts.query=2", "prompts.query: must be text, got 2"),
        ("data.train.1.path=x", "data.train.1.path: data.train is a list of 1; items are 0 to 0, got 1"),
        ("data.train.first.path=x", "data.train.first.path: data.train is a list of 1; items are 0 to 0, got first"),
        ("kind.x=1", 'kind.x: kind is "toy", not a block with keys'),
        ("kind=tot", 'kind: must be one of toy; got "tot"'),
        ("seed", "seed: an override is written key.sub=value"),
        ("loss..dims=1", "loss..dims=1: an override is written key.sub=value"),
        ("seed=[1", "seed:1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_refusals_begin_with_the_key_and_show_the_value(load: Any, override: str, message: str) -> None:
    assert refusal(load, SMALL, override) == message


def test_cross_field_checks_speak_for_their_block(load: Any) -> None:
    message = refusal(load, SMALL, "loss.weights=[1.0]", "loss.dims=[8, 16]")
    assert message == "loss: weights has 1 entries for 2 dims; give one per dim or none"


def test_all_faults_are_reported_at_once(load: Any) -> None:
    message = refusal(load, "kind: toy\ndata: {train: [{pth: corpus}]}\nseed: x\n")
    assert message.split("; ")[0] == 'seed: must be an integer, got "x"'
    assert "data.train.0.path: required, but not given" in message
    assert "data.train.0.pth: unknown key" in message


def test_environment_only_in_paths(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTRO_TEST_CORPUS", "/data/corpus")
    assert load(SMALL, "data.train.0.path=${env:OSTRO_TEST_CORPUS}/en").data.train[0].path == "/data/corpus/en"
    monkeypatch.delenv("OSTRO_TEST_CORPUS")
    assert refusal(load, SMALL, "output=${env:OSTRO_TEST_CORPUS}").startswith(
        "output: environment variable OSTRO_TEST_CORPUS is not set"
    )
    for override in (
        "title=${env:HOME}",
        "output=${HOME}",
        "prompts.query=${env:HOME}",
        "data.form={form: pairs, names: ['${x}']}",
    ):
        assert "only ${env:NAME} in a path field is expanded" in refusal(load, SMALL, override)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("kind: toy\nseed: 1\nseed: 2\n", 3, "duplicate key 'seed'"),
        ("kind: toy\ndata:\n  train: []\n  train: []\n", 4, "duplicate key 'train'"),
        ("kind: toy\n1: x\n", 2, "key 1 is not text"),
        ("kind: toy\nseed: [1\n", 3, "expected ',' or ']', but got '<stream end>'"),
        ("kind: toy\nseed: !!timestamp 2024-01-01\n", 2, "could not determine a constructor"),
        ("kind: toy\nseed: !!python/name:os.system x\n", 2, "could not determine a constructor"),
        ("kind: toy\n---\nkind: toy\n", 2, "but found another document"),
    ],
)
def test_faults_of_the_text_name_file_and_line(load: Any, tmp_path: Path, text: str, line: int, problem: str) -> None:
    message = refusal(load, text)
    assert message.startswith(f"{tmp_path / 'toy.yaml'}:{line}: ")
    assert problem in message


@pytest.mark.parametrize("text", ["", "- kind\n", "toy\n"])
def test_a_recipe_is_a_mapping(load: Any, text: str) -> None:
    assert "must hold a mapping of keys" in refusal(load, text)


def test_kind_is_required(load: Any) -> None:
    assert refusal(load, "seed: 1\n") == "kind: must be one of toy; not given"


def test_unreadable_sources(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("title: caf\u00e9".encode("latin-1"))
    expectations = {
        tmp_path / "none.yaml": "no such file",
        "embde-demo": "neither a file nor a shipped recipe",
        tmp_path: "cannot be read",
        latin: "not UTF-8 text (byte 10)",
    }
    for source, message in expectations.items():
        with pytest.raises(RecipeError, match=r"^\S") as caught:
            load_recipe(source, [], KINDS)
        assert str(source) in str(caught.value)
        assert message in str(caught.value)
        assert caught.value.exit_code == 2


def test_dump_round_trips(load: Any, tmp_path: Path) -> None:
    recipe = load(
        SMALL,
        "title='1e3'",
        "prompts={a: 'true', b: 'null', c: '', d: ' x: y', e: '2e-6', f: 'é', g: 'no', h: '1_0'}",
        "data.train.0.weight=2e-6",
        "loss.dims=[4]",
    )
    text = dump_recipe(recipe)
    assert load(text) == recipe
    assert text.startswith("kind: toy\nseed: 0\n"), "keys stay in the order of the classes"
    assert "temperature: 0.05" in text, "defaults are written out"


def test_recipes_cannot_change(load: Any) -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load().seed = 1


def test_json_schema_agrees_with_the_loader(load: Any) -> None:
    schema = json_schema(KINDS)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(yaml.safe_load(SMALL))
    assert validator.is_valid(yaml.safe_load(dump_recipe(load())))
    for wrong in ("loss: {temperature: -1}", "sed: 1", "data: {train: []}", "kind: tot"):
        assert not validator.is_valid({**yaml.safe_load(SMALL), **yaml.safe_load(wrong)}), wrong


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [], train_recipe.KINDS)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy, [], train_recipe.KINDS) == recipe
