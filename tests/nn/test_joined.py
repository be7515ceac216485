import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.nn.joined import JOINED, companions_in, join, part
from dq.nn.stored import COMPANIONS

SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
STATES = st.dictionaries(
    st.tuples(st.sampled_from(["a", "a.b", "c.0", "to_k"]), st.sampled_from(COMPANIONS)).map(
        ".".join
    ),
    SHAPES,
)


@given(STATES)
def test_parts_are_what_was_joined(shapes: dict[str, tuple[int, ...]]) -> None:
    layers = {name.rpartition(".")[0] for name in shapes}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    plain = {"a.weight": torch.ones(2, dtype=torch.uint8), "a.bias": torch.ones(2)}
    file = join({**state, **plain}, layers)
    assert file.keys() == plain.keys() | ({JOINED} if shapes else set())
    assert all(file[name] is plain[name] for name in plain)
    if not shapes:
        return
    assert file[JOINED].shape == (sum(map(math.prod, shapes.values())),)
    parts = part(file[JOINED], {name: tensor.shape for name, tensor in state.items()})
    assert parts.keys() == state.keys()
    assert all(torch.equal(parts[name], state[name]) for name in state)


@given(STATES, st.randoms())
def test_the_order_is_that_of_the_names(shapes: dict[str, tuple[int, ...]], random) -> None:
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    names = list(state)
    random.shuffle(names)
    layers = {name.rpartition(".")[0] for name in names}
    assert companions_in(names, layers) == sorted(names)
    other = join({name: state[name] for name in names}, layers)
    assert all(torch.equal(tensor, other[name]) for name, tensor in join(state, layers).items())


def test_only_packed_layers_have_companions() -> None:
    """A model may have a parameter of such a name: tables of PixArt's modulation nearly are."""
    state = {"blocks.0.table": torch.ones(2), "blocks.0.ff.table": torch.ones(3)}
    assert companions_in(state, {"blocks.0.ff"}) == ["blocks.0.ff.table"]
    assert join(state, {"blocks.0.ff"}).keys() == {"blocks.0.table", JOINED}


def test_parts_do_not_keep_each_other_in_memory() -> None:
    shapes = {"a.weight_scale": torch.Size([4]), "b.weight_scale": torch.Size([1])}
    for tensor in part(torch.arange(5.0), shapes).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
