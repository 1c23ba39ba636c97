"""Packing: every width and odd shapes, bit for bit, against a stream of bits written by hand."""

import pytest
import torch

from eckart.storages._packing import _unpack_words, pack, unpack, words

SHAPES = ((1, 1), (3, 31), (2, 32), (5, 33), (4, 64), (7, 97))


def stream(row, bits):
    """The words of a row, from its numbers as text: lowest bit first."""
    text = "".join(format(number, f"0{bits}b")[::-1] for number in row)
    text += "0" * (-len(text) % 32)
    found = [int(text[i : i + 32][::-1], 2) for i in range(0, len(text), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_stream_of_bits(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    codes[0, 0] = 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [stream(row, bits) for row in codes.tolist()]
    assert packed.shape[1] == words(shape[1], bits)
    assert torch.equal(unpack(packed, bits, shape[1]), codes)
    assert torch.equal(_unpack_words(packed, bits, shape[1]), codes)


def test_it_is_that_of_compressed_tensors():
    """Where the package is installed; `pack_to_int32` of 0.20 takes signed numbers."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in range(1, 9):
        for shape in SHAPES:
            codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
            signed = (codes - 2 ** (bits - 1)).to(torch.int8)
            assert torch.equal(helpers.pack_to_int32(signed, bits), pack(codes, bits)), (bits, shape)
            assert torch.equal(helpers.pack_to_int32(signed, bits, packed_dim=0), pack(codes.T, bits).T), (bits, shape)
