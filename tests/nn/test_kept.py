"""The table of `dq.nn.kept`, row by row, on simulated and packed layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn import PackedLinear, QuantLinear
from dq.nn.kept import KNOWN, OTHER, ZERO, kinds, note
from dq.nn.simulated import simulate
from dq.plan import LayerSpec
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec

STATIC = TensorSpec("int8", Granularity("tensor"), symmetric=False)
EVERY, WIDTH, ROWS = 7, 64, 24


def reference() -> Tensor:
    token = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    token[5] = 400.0
    return token


def layers(
    bits: int = 8, bias: bool = True, every: int = EVERY
) -> tuple[nn.Linear, QuantLinear, PackedLinear]:
    """A float layer, its simulated form for inputs within [-4, 4], and its packed one."""
    torch.manual_seed(3)
    float_layer = nn.Linear(WIDTH, ROWS, bias=bias).requires_grad_(False)
    spec = LayerSpec(weight_preset(f"int{bits}"), STATIC, kept_every=every)
    simulated = simulate(float_layer, spec)
    simulated.set_input(torch.tensor([-4.0]), torch.tensor([4.0]), reference())
    packed = PackedLinear(float_layer, spec)
    packed.load_layer(simulated)
    return float_layer, simulated, packed


def prompts(*firsts: Tensor, length: int = EVERY) -> Tensor:
    """One prompt for each first token; the others are ordinary ones."""
    x = torch.randn(len(firsts), length, WIDTH, generator=torch.Generator().manual_seed(2))
    x[:, 0] = torch.stack(firsts)
    return x


def expected(layer: nn.Linear, packed: PackedLinear, token: Tensor) -> Tensor:
    """What the rule says about one token."""
    if torch.equal(token, reference()):
        return layer(token)
    if not token.any():
        return torch.zeros(ROWS) if layer.bias is None else layer.bias
    return nn.functional.linear(token, packed.float_weight(), layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_each_row_of_a_batch_follows_the_rule(bits: int, bias: bool) -> None:
    layer, simulated, packed = layers(bits, bias)
    firsts = [reference(), torch.zeros(WIDTH), 1.3 * reference(), reference(), torch.ones(WIDTH)]
    x = prompts(*firsts)
    for quantized in (simulated, packed):
        y = quantized(x)
        assert y.shape == (5, EVERY, ROWS)
        for row, token in zip(y[:, 0], firsts, strict=True):
            torch.testing.assert_close(row, expected(layer, packed, token), rtol=1e-5, atol=1e-4)


def test_other_tokens_are_what_they_are_without_the_rule() -> None:
    _, simulated, packed = layers()
    _, _, plain = layers(every=0)
    x = prompts(reference(), torch.ones(WIDTH))
    assert torch.equal(packed(x)[:, 1:], plain(x)[:, 1:])
    torch.testing.assert_close(simulated(x), packed(x), rtol=1e-4, atol=1e-4)


def test_every_chunk_of_a_long_prompt_has_its_own_first_token() -> None:
    layer, _, packed = layers()
    x = prompts(reference(), length=3 * EVERY)
    x[:, EVERY], x[:, 2 * EVERY] = reference(), 2 * reference()
    y = packed(x)
    for place, token in ((0, reference()), (EVERY, reference()), (2 * EVERY, 2 * reference())):
        wanted = expected(layer, packed, token)
        torch.testing.assert_close(y[0, place], wanted, rtol=1e-5, atol=1e-3)


def test_a_step_of_bfloat16_is_still_the_known_token_and_a_changed_one_is_not() -> None:
    known = reference()
    tokens = torch.stack([known, known.bfloat16().float(), torch.zeros(WIDTH), 1.05 * known])
    moved = known.clone()
    moved[9] += 2.0  # as much as an ordinary value, nothing beside the largest
    found = kinds(torch.cat([tokens, moved[None]]), known)
    assert found.tolist() == [KNOWN, KNOWN, ZERO, OTHER, OTHER]
    assert kinds(torch.zeros(2, WIDTH), torch.zeros(WIDTH)).tolist() == [ZERO, ZERO]


def test_a_note_is_made_once_and_made_again_when_the_prompt_changes() -> None:
    _, _, packed = layers()
    assert packed.kept_input is not None
    x = prompts(reference())
    note(x, EVERY, packed.kept_input)
    first = x._dq_kept  # type: ignore[attr-defined]
    note(x, EVERY, packed.kept_input)
    assert x._dq_kept is first  # type: ignore[attr-defined]
    before = packed(x)
    x[:, 0] = 0
    assert torch.equal(packed(x)[0, 0], packed.bias)  # the stale note is not believed
    note(x, EVERY, packed.kept_input)
    assert x._dq_kept is not first  # type: ignore[attr-defined]
    assert torch.equal(packed(x)[:, 1:], before[:, 1:])


@torch.inference_mode()
def test_inference_tensors_have_no_version_and_are_looked_at_each_time() -> None:
    _, _, packed = layers()
    assert packed.kept_input is not None
    x = prompts(reference())
    for token in (reference(), torch.zeros(WIDTH)):
        x[:, 0] = token
        note(x, EVERY, packed.kept_input)
        wanted = packed.bias if not token.any() else packed.kept_output
        assert torch.equal(packed(x)[0, 0], wanted)


def test_a_compiled_layer_follows_the_rule_in_one_graph() -> None:
    _, _, packed = layers(4)
    x = prompts(reference(), torch.zeros(WIDTH), 2 * reference())
    compiled = torch.compile(packed, fullgraph=True)
    torch.testing.assert_close(compiled(x), packed(x), rtol=1e-4, atol=1e-3)


def test_gradients_of_adapters_reach_the_prompt() -> None:
    _, _, packed = layers()
    x = prompts(reference(), torch.ones(WIDTH)).requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    assert not x.grad[0, 0].any()  # a stored output does not depend on its token
    assert x.grad[1, 0].any()
    assert x.grad[:, 1:].any()


def test_it_needs_a_static_linear_layer_that_was_calibrated() -> None:
    weight = weight_preset("int8")
    with pytest.raises(DQError, match="kept tokens need a static input"):
        LayerSpec(weight, kept_every=77)
    dynamic = TensorSpec("int8", Granularity("token"), dynamic=True)
    with pytest.raises(DQError, match="kept tokens need a static input"):
        LayerSpec(weight, dynamic, kept_every=77)
    with pytest.raises(DQError, match="kept tokens are those of a linear layer"):
        simulate(nn.Conv2d(4, 4, 1), LayerSpec(weight, STATIC, kept_every=77))
    layer = nn.Linear(WIDTH, ROWS)
    simulated = simulate(layer, LayerSpec(weight, STATIC, kept_every=77))
    simulated.set_input(torch.tensor([-1.0]), torch.tensor([1.0]))
    packed = PackedLinear(layer, simulated.spec)
    with pytest.raises(DQError, match="does not know its kept token"):
        packed.load_layer(simulated)
