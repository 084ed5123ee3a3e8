"""What a wrong configuration is told: the key as it stands in the file, and the right one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, Field

from pipeline_lib.errors import ConfigError
from pipeline_lib.validation import Frozen, validate


class Inner(Frozen):
    """Nested once more."""

    depth: int = 1


class Round(Frozen):
    """A variant."""

    name: Literal["round"] = "round"
    kind: Literal["shape"] = "shape"
    radius: int = Field(1, ge=1)
    inner: Inner | None = None


class Square(Frozen):
    """Another."""

    name: Literal["square"] = "square"
    kind: Literal["shape"] = "shape"
    side: int = 1


def _named(value: Any) -> Any:
    return {"name": "round", **value} if isinstance(value, dict) else value


Shape = Annotated[Round | Square, Field(discriminator="name")]


class Model(Frozen):
    """Every way in which a union may stand."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"colour": "'paint' with {name: ...}"}

    paint: Inner = Inner()
    shape: Shape = Round()
    perhaps: Shape | None = None
    within: Annotated[Round | Square | None, Field(discriminator="name")] = None
    default: Annotated[Round | Square, Field(discriminator="name"), BeforeValidator(_named)] | None = Round()
    by_name: Mapping[str, Shape] = Field(default_factory=dict)
    listed: tuple[Shape, ...] = ()
    size: int | Literal["auto"] = "auto"
    pair: tuple[int, Inner] = (1, Inner())


def complaint(values: dict[str, Any]) -> str:
    """The message that values are refused with."""
    with pytest.raises(ConfigError) as caught:
        validate(Model, values, where="file.yaml")
    text = caught.value.cause
    assert text.startswith("file.yaml: ")
    return text.removeprefix("file.yaml: ")


UNION_PLACES = ["shape", "perhaps", "within", "default", "by_name.big", "listed.0"]


def at(place: str, value: Any) -> dict[str, Any]:
    """Values with one value at a place of the model."""
    outer, _, inner = place.partition(".")
    if not inner:
        return {outer: value}
    return {outer: [value] if inner == "0" else {inner: value}}


@pytest.mark.parametrize("place", UNION_PLACES)
def test_a_key_inside_a_variant_is_named_without_the_variant(place: str) -> None:
    assert complaint(at(place, {"name": "round", "radius": 0})).startswith(f"{place}.radius = 0: ")
    assert complaint(at(place, {"name": "round", "inner": {"depht": 1}})) == (
        f"unknown key '{place}.inner.depht'; did you mean 'depth'?"
    )


@pytest.mark.parametrize("place", UNION_PLACES)
def test_an_unknown_key_of_a_variant_gets_the_nearest_or_the_variants_that_have_it(place: str) -> None:
    assert complaint(at(place, {"name": "round", "raduis": 2})) == (
        f"unknown key '{place}.raduis'; did you mean 'radius'?"
    )
    assert complaint(at(place, {"name": "round", "side": 2})) == (
        f"unknown key '{place}.side': round has none, only square"
    )


@pytest.mark.parametrize("place", UNION_PLACES)
def test_an_unknown_variant_gets_the_nearest_and_all(place: str) -> None:
    assert complaint(at(place, {"name": "sqare"})) == (
        f"{place}.name: unknown 'sqare'; did you mean 'square'? it is one of round, square"
    )
    assert complaint(at(place, {"name": "xyz"})) == f"{place}.name: unknown 'xyz'; it is one of round, square"


@pytest.mark.parametrize("place", [place for place in UNION_PLACES if place != "default"])
def test_a_missing_variant_is_said(place: str) -> None:
    assert complaint(at(place, {})) == f"{place}.name: missing; it is one of round, square"


@pytest.mark.parametrize("place", UNION_PLACES)
def test_a_bare_word_is_told_to_be_a_section(place: str) -> None:
    assert complaint(at(place, "square")) == f"{place} = 'square': it is a section like {{name: round}}"


def test_a_default_variant_needs_no_name() -> None:
    assert validate(Model, {"default": {"radius": 3}}, where="x").default == Round(radius=3)
    assert validate(Model, {"default": None}, where="x").default is None


def test_a_renamed_key_gets_its_new_name() -> None:
    assert complaint({"colour": 1}) == "unknown key 'colour'; did you mean 'paint' with {name: ...}?"


def test_plain_places_are_named_as_they_stand() -> None:
    assert complaint({"paintt": 1}) == "unknown key 'paintt'; did you mean 'paint'?"
    assert complaint({"size": "aut"}).startswith("size = 'aut': ")
    assert complaint({"pair": [1, {"depthh": 2}]}) == "unknown key 'pair.1.depthh'; did you mean 'depth'?"
    assert complaint({"pair": ["x", {}]}).startswith("pair.0 = 'x': ")
    assert complaint({"by_name": [1]}).startswith("by_name = [1]: ")
    assert complaint({"by_name": {1: {"name": "round"}}}).startswith("by_name.1 = 1: ")


def test_every_complaint_is_in_the_message() -> None:
    text = complaint({"by_name": {"a": {"name": "round", "radius": "x"}, "b": {"name": "squar"}}, "nope": 1})
    assert "by_name.a.radius = 'x'" in text
    assert "by_name.b.name: unknown 'squar'; did you mean 'square'?" in text
    assert "unknown key 'nope'" in text
