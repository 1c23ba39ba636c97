"""Numbers of few bits in 32-bit words, as the format `pack-quantized` of compressed-tensors has them.

Along a row, number i takes the bits from `i * bits` on of a stream that fills words from their lowest bit: 32 numbers
are `bits` words, and no bit is lost but in the last word. Travels with checkpoints: torch alone.
"""

import sys

import torch
from torch import Tensor

WORD = 32


def words(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` numbers of `bits` bits."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`[rows, count]` numbers from 0 to `2^bits - 1` as `[rows, words]`, int32."""
    rows, count = codes.shape
    grouped = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % WORD)).view(rows, -1, WORD)
    packed = grouped.new_zeros(rows, grouped.shape[1], bits + 1)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        packed[..., word] |= grouped[..., i] << shift & 0xFFFFFFFF
        packed[..., word + 1] |= grouped[..., i] << shift >> WORD
    flat = packed[..., :bits].reshape(rows, -1)[:, : words(count, bits)]
    return (flat - (flat >> 31 << 32)).to(torch.int32)  # the upper half of the range are negative numbers


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The numbers of `pack`, `[rows, count]`, uint8."""
    if sys.byteorder == "big":  # the bytes of a word stand the other way round there
        return _unpack_words(packed, bits, count)
    octets = packed.reshape(-1).view(torch.uint8).view(len(packed), -1)
    if bits == 8:
        return octets[:, :count]
    if bits in (2, 4):
        parts = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)[:, :count]
    return _unpack_octets(octets, bits, count)


def _unpack_octets(octets: Tensor, bits: int, count: int) -> Tensor:
    """The same where numbers lie across bytes: 8 numbers are `bits` bytes, and 4 of them at most 28 bits."""
    rows, half = len(octets), 4 * bits
    grouped = torch.nn.functional.pad(octets, (0, -octets.shape[1] % bits)).view(rows, -1, bits)
    eights = grouped[..., 0].to(torch.int64)
    for place in range(1, bits):
        eights |= grouped[..., place].to(torch.int64) << 8 * place
    fours = (eights & (2**half - 1)).to(torch.int32), (eights >> half).to(torch.int32)
    mask = 2**bits - 1
    numbers = [((four >> shift) & mask).to(torch.uint8) for four in fours for shift in range(0, half, bits)]
    return torch.stack(numbers, -1).view(rows, -1)[:, :count]


def _unpack_words(packed: Tensor, bits: int, count: int) -> Tensor:
    rows, mask = len(packed), 2**bits - 1
    grouped = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    numbers = torch.empty(rows, grouped.shape[1], WORD, dtype=torch.uint8, device=packed.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        number = grouped[..., word] >> shift
        if shift + bits > WORD:  # the shift above has filled up with copies of the highest bit
            left = WORD - shift
            number = (number & (2**left - 1)) | (grouped[..., word + 1] << left)
        numbers[..., i] = (number & mask).to(torch.uint8)
    return numbers.view(rows, -1)[:, :count]
