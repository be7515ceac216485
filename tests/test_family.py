import pytest
import torch
from torch import nn

from dq.errors import DQError
from dq.family import Role, assign_roles, families, family_of, quantizable
from tests.models import MODELS, VIDEOS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.block = nn.ModuleList([nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())])
        self.norm = nn.LayerNorm(2)


def test_families_describe_classes_once() -> None:
    described = [name for _, family in families.items() for name in family.classes]
    assert len(set(described)) == len(described)
    for name, family in families.items():
        assert family.name == name


def test_every_family_has_a_tiny_model() -> None:
    networks = [case.network(case.build()) for case in {**MODELS, **VIDEOS}.values()]
    tried = {type(network).__name__ for network in networks}
    for _, family in families.items():
        assert set(family.classes) <= tried, "add a tiny model to tests/models"


def test_the_family_of_a_model_knows_its_component(model_case, model_pipe) -> None:
    family = family_of(model_case.network(model_pipe))
    assert family.denoiser == model_case.denoiser


def test_a_model_without_a_family_lists_the_known_classes() -> None:
    text = "no family describes Net; known: .*DiTTransformer2DModel, .*UNet2DConditionModel.*CONTR"
    with pytest.raises(DQError, match=text):
        family_of(Net())


def test_linears_and_convolutions_are_quantizable_in_order() -> None:
    assert list(quantizable(Net())) == ["first", "block.0.0"]


def test_the_first_pattern_that_matches_gives_the_role() -> None:
    table = (("block.*", Role.SKIP), ("*", Role.IO), ("first", Role.TIME))
    assert assign_roles(Net(), table) == {"first": Role.IO, "block.0.0": Role.SKIP}


def test_a_layer_without_a_role_is_an_error() -> None:
    with pytest.raises(DQError, match=r"Net: the family has no role for layer block\.0\.0"):
        assign_roles(Net(), (("first", Role.IO),))


def test_samples_repeat_and_follow_batch_and_seed(model_case, model_pipe) -> None:
    model = model_case.network(model_pipe)
    family = family_of(model)

    def sample(batch: int, seed: int) -> dict:
        return family.sample_inputs(model, batch, torch.Generator().manual_seed(seed))

    first, again, other, wide = sample(1, 0), sample(1, 0), sample(1, 1), sample(3, 0)
    main = next(n for n in ("sample", "hidden_states", "input_ids") if n in first)
    assert torch.equal(first[main], again[main])
    assert not torch.equal(first[main], other[main])
    assert wide[main].shape == (3, *first[main].shape[1:])
