import gc

import torch

from dq.kernels import copies

FORM = (torch.zeros(3, dtype=torch.uint8), torch.zeros(2))


def test_a_form_is_made_once_and_counted() -> None:
    weight, made = torch.zeros(4), []

    def make():
        made.append(1)
        return FORM

    assert copies.resident_bytes(weight) == 0
    for _ in range(3):
        assert copies.kept(weight, "one", make) is FORM
    assert len(made) == 1
    assert copies.resident_bytes(weight) == 3 + 8
    copies.kept(weight, "two", make)
    assert len(made) == 2
    assert copies.resident_bytes(weight) == 2 * (3 + 8)
    copies.forget(weight)
    assert copies.resident_bytes(weight) == 0
    copies.forget(weight)  # nothing to forget is no error


def test_a_weight_that_changes_in_place_or_moves_is_another() -> None:
    weight, made = torch.zeros(4), []

    def make():
        made.append(1)
        return (weight.clone(),)

    copies.kept(weight, "one", make)
    weight.fill_(2)
    assert torch.equal(copies.kept(weight, "one", make)[0], weight)
    weight.data = torch.full((4,), 3.0)
    assert torch.equal(copies.kept(weight, "one", make)[0], weight)
    assert len(made) == 3


def test_forms_die_with_the_weight() -> None:
    gc.collect()
    known = len(copies._copies)
    weight = torch.zeros(4)
    copies.kept(weight, "one", lambda: FORM)
    assert len(copies._copies) == known + 1
    del weight
    gc.collect()
    assert len(copies._copies) == known


def test_weights_of_inference_mode_work() -> None:
    with torch.inference_mode():
        weight = torch.zeros(4)
        assert copies.kept(weight, "one", lambda: FORM) is FORM
        assert copies.kept(weight, "one", lambda: ()) is FORM
