"""Bytes of layouts 21..23 -> four tiles of int8: 2**SHIFT * code, or multiplier * code.

SHIFT = 6, 4, 3 for 1, 2, 3 planes. Field j of a chunk (columns 64 j .. 64 j + 63) is tile j.
With multipliers, u = code + BIAS is an unsigned field and, byte by byte,
    u * m + (128 - BIAS * m) = 128 + m * code,  xor 128 -> int8 m * code:
one 32-bit multiply-add for four codes, since every final byte is within 1..255.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHIFTS: tl.constexpr = tl.constexpr((0, 6, 4, 3))
"""By planes: decoded bytes are 2**SHIFT * code."""

BIASES: tl.constexpr = tl.constexpr((0, 0x02020202, 0x08080808, 0x10101010))
"""By planes: BIAS in every byte."""

TOP_BITS: tl.constexpr = tl.constexpr(0x80808080 - (1 << 32))

NO_GROUPS: tl.constexpr = tl.constexpr(0)
HALVES: tl.constexpr = tl.constexpr(1)
"""group_size is a multiple of 128: one multiplier for the fields 0 and 1, one for 2 and 3."""
ANY_GROUPS: tl.constexpr = tl.constexpr(2)


def _results(planes: int) -> int:
    """Tiles that the asm decodes: fields 0..3 or, of three planes, their halves of 32 columns."""
    return 8 if planes == 3 else 4


def _words(planes: int) -> int:
    """Byte tiles of a chunk."""
    return 5 if planes == 3 else planes


def _word(planes: int, i: int) -> str:
    """The register with the upper bits of result i; behind the results come the byte tiles."""
    if planes == 3:
        return f"${8 + 2 * (i // 4) + i % 2}"
    return f"${4 + (i // 2 if planes == 2 else 0)}"


def _fields(planes: int) -> list[str]:
    """PTX that leaves result i, shifted to its place in 2**SHIFT * code, in register $i."""
    lines = []
    for i in range(_results(planes)):
        word = _word(planes, i)
        if planes == 1:
            lines += [f"shl.b32 ${i}, {word}, {6 - 2 * i};", f"and.b32 ${i}, ${i}, 0xC0C0C0C0;"]
            continue
        field = i // 2 if planes == 3 else i
        lines += [
            f"shl.b32 ${i}, {word}, {4 - 4 * (field % 2)};",
            f"and.b32 ${i}, ${i}, 0xF0F0F0F0;",
        ]
        if planes == 3:
            shift = f"shl.b32 t, $12, {3 - i};" if i < 3 else f"shr.b32 t, $12, {i - 3};"
            lines += [shift, f"lop3.b32 ${i}, t, 0x08080808, ${i}, 0xEA;"]
    return lines


def _biased_fields(planes: int) -> list[str]:
    """PTX that leaves code + BIAS of result i in register $i: masked and biased in one lop3."""
    lines = [f"mov.b32 bias, 0x{BIASES.value[planes]:08X};"]
    for i in range(_results(planes)):
        word = _word(planes, i)
        if planes < 3:
            place = 2 * i if planes == 1 else 4 * (i % 2)
            mask = "0x03030303" if planes == 1 else "0x0F0F0F0F"
            lines += [
                f"shr.b32 ${i}, {word}, {place};",
                f"lop3.b32 ${i}, ${i}, {mask}, bias, 0x6A;",
            ]
        else:
            shift = f"shr.b32 ${i}, {word}, 3;" if i // 2 % 2 else f"shl.b32 ${i}, {word}, 1;"
            lines += [shift, f"lop3.b32 ${i}, ${i}, 0x1E1E1E1E, bias, 0x6A;"]
            lines += [f"shr.b32 t, $12, {i};", f"lop3.b32 ${i}, t, 0x01010101, ${i}, 0xEA;"]
    return lines


def _program(planes: int, halves: bool) -> tl.constexpr:
    """The asm of one 32-bit word of every tile. Operands: the results, the words of the byte tiles,
    then four registers for every int32 argument, equal in all of them."""
    results, lines = _results(planes), [".reg .b32 t, bias;"]
    if halves:
        operand = results + _words(planes)
        lines += _biased_fields(planes)
        for i in range(results):
            multiplier = operand + 8 * (2 * i // results)
            lines.append(f"mad.lo.u32 ${i}, ${i}, ${multiplier}, ${multiplier + 4};")
            lines.append(f"xor.b32 ${i}, ${i}, 0x80808080;")
    else:
        lines += _fields(planes)
    return tl.constexpr("{ " + " ".join(lines) + " }")


def _constraints(planes: int, halves: bool) -> tl.constexpr:
    registers = _words(planes) + (16 if halves else 0)
    return tl.constexpr(",".join(["=&r"] * _results(planes) + ["r"] * registers))


_PLAIN_1, _PLAIN_2, _PLAIN_3 = (_program(planes, False) for planes in (1, 2, 3))
_HALVES_1, _HALVES_2, _HALVES_3 = (_program(planes, True) for planes in (1, 2, 3))
_TYPES_1, _TYPES_2, _TYPES_3 = (_constraints(planes, False) for planes in (1, 2, 3))
_GROUP_TYPES_1, _GROUP_TYPES_2, _GROUP_TYPES_3 = (_constraints(p, True) for p in (1, 2, 3))
_BYTES: tl.constexpr = tl.constexpr((tl.int8,) * 4)
_HALF_BYTES: tl.constexpr = tl.constexpr((tl.int8,) * 8)


@triton.jit
def beside(a, b):
    """int8 [n, k] and [n, k] -> [n, 2 k]; in the layout of a product's operand nothing moves."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def load_bytes(weight_row, chunk, PLANES: tl.constexpr):
    """Byte tiles of chunk `chunk` of rows: int8 [n, 64], one a plane (five with repeats); of three
    planes five of [n, 32], since the lowest bits of a field's halves lie in the same bytes.
    """
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    place = weight_row + chunk * CHUNK_BYTES
    if PLANES == 3:
        k = tl.arange(0, 32)[None, :]
        first, second = tl.load(place + k), tl.load(place + 32 + k)
        third, fourth = tl.load(place + 64 + k), tl.load(place + 96 + k)
        tiles = (first, second, third, fourth, tl.load(place + 128 + k))
    else:
        k = tl.arange(0, 64)[None, :]
        first = tl.load(place + k)
        second = tl.load(place + 64 + k) if PLANES == 2 else first
        tiles = (first, second, first, first, first)
    return tiles


@triton.jit
def decode(tiles, PLANES: tl.constexpr, ASM: tl.constexpr):
    """Byte tiles of a chunk -> its four fields int8 [n, 64] of 2**SHIFT * code."""
    if PLANES == 1:
        if ASM:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _PLAIN_1, _TYPES_1, [tiles[0]], _BYTES, is_pure=True, pack=4
            )
        else:
            f0 = (tiles[0] << 6) & -64
            f1 = (tiles[0] << 4) & -64
            f2 = (tiles[0] << 2) & -64
            f3 = tiles[0] & -64
    elif PLANES == 2:
        if ASM:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _PLAIN_2, _TYPES_2, [tiles[0], tiles[1]], _BYTES, is_pure=True, pack=4
            )
        else:
            f0 = (tiles[0] << 4) & -16
            f1 = tiles[0] & -16
            f2 = (tiles[1] << 4) & -16
            f3 = tiles[1] & -16
    else:
        if ASM:
            a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
                _PLAIN_3,
                _TYPES_3,
                [tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]],
                _HALF_BYTES,
                is_pure=True,
                pack=4,
            )
        else:
            bits = tiles[4].to(tl.int32)
            a0 = ((tiles[0] << 4) & -16) | ((bits << 3) & 8).to(tl.int8)
            b0 = ((tiles[1] << 4) & -16) | ((bits << 2) & 8).to(tl.int8)
            a1 = (tiles[0] & -16) | ((bits << 1) & 8).to(tl.int8)
            b1 = (tiles[1] & -16) | (bits & 8).to(tl.int8)
            a2 = ((tiles[2] << 4) & -16) | ((bits >> 1) & 8).to(tl.int8)
            b2 = ((tiles[3] << 4) & -16) | ((bits >> 2) & 8).to(tl.int8)
            a3 = (tiles[2] & -16) | ((bits >> 3) & 8).to(tl.int8)
            b3 = (tiles[3] & -16) | ((bits >> 4) & 8).to(tl.int8)
        f0, f1, f2, f3 = beside(a0, b0), beside(a1, b1), beside(a2, b2), beside(a3, b3)
    return f0, f1, f2, f3


@triton.jit
def decode_halves(tiles, m0, m1, PLANES: tl.constexpr, ASM: tl.constexpr):
    """As `decode`, times the multipliers int32 [n, 1] of the two halves of the chunk."""
    if ASM:
        k0 = TOP_BITS - m0 * BIASES[PLANES]
        k1 = TOP_BITS - m1 * BIASES[PLANES]
        if PLANES == 1:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _HALVES_1, _GROUP_TYPES_1, [tiles[0], m0, k0, m1, k1], _BYTES, is_pure=True, pack=4
            )
        elif PLANES == 2:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _HALVES_2,
                _GROUP_TYPES_2,
                [tiles[0], tiles[1], m0, k0, m1, k1],
                _BYTES,
                is_pure=True,
                pack=4,
            )
        else:
            a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
                _HALVES_3,
                _GROUP_TYPES_3,
                [tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], m0, k0, m1, k1],
                _HALF_BYTES,
                is_pure=True,
                pack=4,
            )
            f0, f1, f2, f3 = beside(a0, b0), beside(a1, b1), beside(a2, b2), beside(a3, b3)
    else:
        SHIFT: tl.constexpr = SHIFTS[PLANES]
        f0, f1, f2, f3 = decode(tiles, PLANES, ASM)
        f0 = (f0 >> SHIFT) * m0.to(tl.int8)
        f1 = (f1 >> SHIFT) * m0.to(tl.int8)
        f2 = (f2 >> SHIFT) * m1.to(tl.int8)
        f3 = (f3 >> SHIFT) * m1.to(tl.int8)
    return f0, f1, f2, f3


@triton.jit
def half_multipliers(multiplier_row, chunk, groups, HALVES_A_GROUP: tl.constexpr):
    """Multipliers int32 [n, 1] of the two halves of a chunk; int16 pointers: to pairs of them.

    Padded columns lie in no group; their code is 0, any multiplier does.
    """
    if multiplier_row.dtype.element_ty == tl.int16:
        pair = tl.load(multiplier_row + chunk).to(tl.int32)
        m0 = pair & 255
        m1 = pair >> 8
    else:
        g0 = tl.minimum(2 * chunk // HALVES_A_GROUP, groups - 1)
        g1 = tl.minimum((2 * chunk + 1) // HALVES_A_GROUP, groups - 1)
        m0 = tl.load(multiplier_row + g0).to(tl.int32)
        m1 = tl.load(multiplier_row + g1).to(tl.int32)
    return m0, m1


@triton.jit
def load_chunk(
    weight_row,
    multiplier_row,
    chunk,
    groups,
    group_size,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Chunk `chunk` of rows -> int8 [n, 256] of 2**SHIFT * code or, with GROUPS, m * code.

    weight_row [n, 1] and multiplier_row [n, 1] point at the first byte of every row.
    """
    SHIFT: tl.constexpr = SHIFTS[PLANES]
    tiles = load_bytes(weight_row, chunk, PLANES)
    if GROUPS == HALVES:
        m0, m1 = half_multipliers(multiplier_row, chunk, groups, HALVES_A_GROUP)
        f0, f1, f2, f3 = decode_halves(tiles, m0, m1, PLANES, ASM)
    else:
        f0, f1, f2, f3 = decode(tiles, PLANES, ASM)
        if GROUPS == ANY_GROUPS:
            first = chunk * 256 + tl.arange(0, 64)[None, :]
            last = groups - 1
            g0 = tl.minimum(first // group_size, last)
            g1 = tl.minimum((first + 64) // group_size, last)
            g2 = tl.minimum((first + 128) // group_size, last)
            g3 = tl.minimum((first + 192) // group_size, last)
            f0 = (f0 >> SHIFT) * tl.load(multiplier_row + g0).to(tl.int8)
            f1 = (f1 >> SHIFT) * tl.load(multiplier_row + g1).to(tl.int8)
            f2 = (f2 >> SHIFT) * tl.load(multiplier_row + g2).to(tl.int8)
            f3 = (f3 >> SHIFT) * tl.load(multiplier_row + g3).to(tl.int8)
    return beside(beside(f0, f1), beside(f2, f3))


@triton.jit
def load_halves(weight_row, chunk, PLANES: tl.constexpr, ASM: tl.constexpr):
    """Chunk `chunk` of rows -> two tiles int8 [n, 128] of 2**SHIFT * code: its halves."""
    f0, f1, f2, f3 = decode(load_bytes(weight_row, chunk, PLANES), PLANES, ASM)
    return beside(f0, f1), beside(f2, f3)


@triton.jit
def prefetch_lines(pointers):
    """Ask for the 128-byte lines that hold the bytes pointed at; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def keep(values):
    """Needs int8 values here, so that the loads they come from happen."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.int8, is_pure=False, pack=4
    )
