import pytest

from dq.errors import DQError, check_known, inside, unknown


def test_unknown_names_the_nearest_and_then_all() -> None:
    text = str(unknown("recipe", "w4a9", ["w8a8", "w4a8"]))
    assert text == "unknown recipe 'w4a9'. Did you mean 'w4a8'? Known: w4a8, w8a8."


def test_unknown_without_a_near_name_does_not_guess() -> None:
    assert str(unknown("recipe", "zzz", ["w8a8"])) == "unknown recipe 'zzz'. Known: w8a8."
    assert str(unknown("recipe", "zzz", [])) == "unknown recipe 'zzz'. Known: none."


def test_unknown_takes_names_that_are_not_text() -> None:
    assert "unknown recipe 4" in str(unknown("recipe", 4, ["w8a8"]))


def test_inside_puts_places_in_front_from_the_outermost() -> None:
    with pytest.raises(DQError, match=r"^file: layer: broken$"), inside("file"), inside("layer"):
        raise DQError("broken")


def test_inside_keeps_the_cause() -> None:
    with pytest.raises(DQError) as caught, inside("file"):
        try:
            raise KeyError("x")
        except KeyError as error:
            raise DQError("broken") from error
    assert isinstance(caught.value.__cause__, KeyError)


def test_inside_leaves_other_exceptions_alone() -> None:
    with pytest.raises(KeyError, match=r"^'x'$"), inside("file"):
        raise KeyError("x")


def test_the_first_name_that_is_not_known_is_refused() -> None:
    check_known("colour", ["red", "blue"], ["red", "blue", "green"])
    with pytest.raises(DQError, match="Did you mean 'green'"):
        check_known("colour", ["red", "gren", "bleu"], ["red", "blue", "green"])
