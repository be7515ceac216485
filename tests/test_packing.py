import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.errors import DQError
from dq.packing import pack, packed_length, unpack

WIDTHS = st.integers(1, 8)
LENGTHS = st.integers(1, 70)


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(1 << bits, shape, dtype=torch.uint8)


@given(WIDTHS, LENGTHS, st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, length: int, batch: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    codes = random_codes(bits, *batch, length)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.shape == (*batch, packed_length(length, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, length), codes)
    assert torch.equal(codes, before)


@given(WIDTHS, LENGTHS)
def test_shapes_are_the_same_on_the_meta_device(bits: int, length: int) -> None:
    packed = pack(torch.empty(3, length, dtype=torch.uint8, device="meta"), bits)
    assert packed.is_meta
    assert packed.shape == (3, packed_length(length, bits))
    assert unpack(packed, bits, length).shape == (3, length)


@given(WIDTHS, LENGTHS)
def test_every_bit_of_the_codes_is_paid_once(bits: int, length: int) -> None:
    # Each of the at most three fields may waste less than a byte.
    waste = packed_length(length, bits) - bits * length / 8
    assert 0 <= waste < bin(bits).count("1")
    assert packed_length(8 * length, bits) == bits * length


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_independent(bits: int) -> None:
    codes = random_codes(bits, 5, 13)
    rows = torch.cat([pack(row[None], bits) for row in codes])
    assert torch.equal(pack(codes, bits), rows)


def test_the_layout_is_the_documented_one() -> None:
    # Written checkpoints depend on it.
    four = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.uint8)
    assert pack(four, 4).tolist() == [[1 | 4 << 4, 2 | 5 << 4, 3 | 6 << 4]]
    three = torch.tensor([[0b101, 0b010, 0b111]], dtype=torch.uint8)  # fields of 2 and 1 bits
    assert pack(three, 3).tolist() == [[0b01 | 0b10 << 2 | 0b11 << 4, 0b1 | 0b0 << 1 | 0b1 << 2]]


def test_packed_bytes_of_another_length_are_refused() -> None:
    text = "4 bytes cannot hold 9 codes of 4 bits; expected 5 bytes"
    with pytest.raises(DQError, match=text):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_codes_have_one_to_eight_bits(bits: int) -> None:
    with pytest.raises(DQError, match=f"a code has 1 to 8 bits, not {bits}"):
        packed_length(8, bits)
