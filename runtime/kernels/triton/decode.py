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


def _fields(planes: int) -> list[str]:
    """PTX that leaves field j, shifted to its place in 2**SHIFT * code, in register $j."""
    lines = []
    for j in range(4):
        if planes == 1:
            lines += [f"shl.b32 ${j}, $4, {6 - 2 * j};", f"and.b32 ${j}, ${j}, 0xC0C0C0C0;"]
        else:
            word = "$4" if j < 2 else "$5"
            lines += [
                f"shl.b32 ${j}, {word}, {4 - 4 * (j % 2)};",
                f"and.b32 ${j}, ${j}, 0xF0F0F0F0;",
            ]
        if planes == 3:
            place = 3 - 2 * j
            shift = f"shl.b32 t, b, {place};" if place > 0 else f"shr.b32 t, b, {-place};"
            lines += [shift, "and.b32 t, t, 0x08080808;", f"or.b32 ${j}, ${j}, t;"]
    return lines


def _biased_fields(planes: int) -> list[str]:
    """PTX that leaves code + BIAS of field j in register $j."""
    lines = []
    for j in range(4):
        if planes == 1:
            lines += [f"shr.b32 ${j}, $4, {2 * j};", f"and.b32 ${j}, ${j}, 0x03030303;"]
        elif planes == 2:
            word = "$4" if j < 2 else "$5"
            lines += [f"shr.b32 ${j}, {word}, {4 * (j % 2)};", f"and.b32 ${j}, ${j}, 0x0F0F0F0F;"]
        else:
            word = "$4" if j < 2 else "$5"
            shift = f"shr.b32 ${j}, {word}, 3;" if j % 2 else f"shl.b32 ${j}, {word}, 1;"
            lines += [shift, f"and.b32 ${j}, ${j}, 0x1E1E1E1E;", f"shr.b32 t, b, {2 * j};"]
            lines += ["and.b32 t, t, 0x01010101;", f"or.b32 ${j}, ${j}, t;"]
        lines.append(f"xor.b32 ${j}, ${j}, 0x{BIASES.value[planes]:08X};")
    return lines


def _program(planes: int, halves: bool) -> tl.constexpr:
    """The asm of one 32-bit word of every tile. Operands, after the results $0..$3: the words of
    the byte tiles, then four registers for every int32 argument, equal in all of them."""
    lines = [".reg .b32 t, b;"]
    operand = 4 + planes
    if planes == 3:
        lines.append(f"shr.b32 b, $6, ${operand};")
        operand += 4
    if halves:
        lines += _biased_fields(planes)
        for j in range(4):
            multiplier, constant = operand + 8 * (j // 2), operand + 4 + 8 * (j // 2)
            lines.append(f"mad.lo.u32 ${j}, ${j}, ${multiplier}, ${constant};")
            lines.append(f"xor.b32 ${j}, ${j}, 0x80808080;")
    else:
        lines += _fields(planes)
    return tl.constexpr("{ " + " ".join(lines) + " }")


def _constraints(planes: int, halves: bool) -> tl.constexpr:
    registers = planes + (4 if planes == 3 else 0) + (16 if halves else 0)
    return tl.constexpr(",".join(["=&r"] * 4 + ["r"] * registers))


_PLAIN_1, _PLAIN_2, _PLAIN_3 = (_program(planes, False) for planes in (1, 2, 3))
_HALVES_1, _HALVES_2, _HALVES_3 = (_program(planes, True) for planes in (1, 2, 3))
_TYPES_1, _TYPES_2, _TYPES_3 = (_constraints(planes, False) for planes in (1, 2, 3))
_GROUP_TYPES_1, _GROUP_TYPES_2, _GROUP_TYPES_3 = (_constraints(p, True) for p in (1, 2, 3))
_BYTES: tl.constexpr = tl.constexpr((tl.int8, tl.int8, tl.int8, tl.int8))


@triton.jit
def decode(b0, b1, low, half, PLANES: tl.constexpr, ASM: tl.constexpr):
    """Byte tiles int8 [n, 64] -> four tiles int8 [n, 64] of 2**SHIFT * code.

    b0 (and, from two planes on, b1) are the bytes of 64 columns each; `low` the lowest bits, byte
    k % 32 for column k, and `half` int32 [1, 64] = k // 32, of three planes. Unused tiles: b0.
    """
    if ASM:
        if PLANES == 1:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _PLAIN_1, _TYPES_1, [b0], _BYTES, is_pure=True, pack=4
            )
        elif PLANES == 2:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _PLAIN_2, _TYPES_2, [b0, b1], _BYTES, is_pure=True, pack=4
            )
        else:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _PLAIN_3, _TYPES_3, [b0, b1, low, half], _BYTES, is_pure=True, pack=4
            )
    elif PLANES == 1:
        f0 = (b0 << 6) & -64
        f1 = (b0 << 4) & -64
        f2 = (b0 << 2) & -64
        f3 = b0 & -64
    else:
        f0 = (b0 << 4) & -16
        f1 = b0 & -16
        f2 = (b1 << 4) & -16
        f3 = b1 & -16
        if PLANES == 3:
            bits = low.to(tl.int32) >> half
            f0 = f0 | ((bits << 3) & 8).to(tl.int8)
            f1 = f1 | ((bits << 1) & 8).to(tl.int8)
            f2 = f2 | ((bits >> 1) & 8).to(tl.int8)
            f3 = f3 | ((bits >> 3) & 8).to(tl.int8)
    return f0, f1, f2, f3


@triton.jit
def decode_halves(b0, b1, low, half, m0, m1, PLANES: tl.constexpr, ASM: tl.constexpr):
    """As `decode`, times the multipliers int32 [n, 1] of the two halves of the chunk."""
    SHIFT: tl.constexpr = SHIFTS[PLANES]
    if ASM:
        k0 = TOP_BITS - m0 * BIASES[PLANES]
        k1 = TOP_BITS - m1 * BIASES[PLANES]
        if PLANES == 1:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _HALVES_1, _GROUP_TYPES_1, [b0, m0, k0, m1, k1], _BYTES, is_pure=True, pack=4
            )
        elif PLANES == 2:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _HALVES_2, _GROUP_TYPES_2, [b0, b1, m0, k0, m1, k1], _BYTES, is_pure=True, pack=4
            )
        else:
            f0, f1, f2, f3 = tl.inline_asm_elementwise(
                _HALVES_3,
                _GROUP_TYPES_3,
                [b0, b1, low, half, m0, k0, m1, k1],
                _BYTES,
                is_pure=True,
                pack=4,
            )
    else:
        f0, f1, f2, f3 = decode(b0, b1, low, half, PLANES, ASM)
        f0 = (f0 >> SHIFT) * m0.to(tl.int8)
        f1 = (f1 >> SHIFT) * m0.to(tl.int8)
        f2 = (f2 >> SHIFT) * m1.to(tl.int8)
        f3 = (f3 >> SHIFT) * m1.to(tl.int8)
    return f0, f1, f2, f3


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
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    SHIFT: tl.constexpr = SHIFTS[PLANES]
    k = tl.arange(0, 64)[None, :]
    half = k // 32
    place = weight_row + chunk * CHUNK_BYTES
    b0 = tl.load(place + k)
    b1, low = b0, b0
    if PLANES > 1:
        b1 = tl.load(place + 64 + k)
    if PLANES == 3:
        low = tl.load(place + 128 + k % 32)
    if GROUPS == HALVES:
        # Padded columns lie in no group; their code is 0, any multiplier does.
        g0 = tl.minimum(2 * chunk // HALVES_A_GROUP, groups - 1)
        g1 = tl.minimum((2 * chunk + 1) // HALVES_A_GROUP, groups - 1)
        m0 = tl.load(multiplier_row + g0).to(tl.int32)
        m1 = tl.load(multiplier_row + g1).to(tl.int32)
        f0, f1, f2, f3 = decode_halves(b0, b1, low, half, m0, m1, PLANES, ASM)
    else:
        f0, f1, f2, f3 = decode(b0, b1, low, half, PLANES, ASM)
        if GROUPS == ANY_GROUPS:
            first = chunk * 256 + k
            last = groups - 1
            g0 = tl.minimum(first // group_size, last)
            g1 = tl.minimum((first + 64) // group_size, last)
            g2 = tl.minimum((first + 128) // group_size, last)
            g3 = tl.minimum((first + 192) // group_size, last)
            f0 = (f0 >> SHIFT) * tl.load(multiplier_row + g0).to(tl.int8)
            f1 = (f1 >> SHIFT) * tl.load(multiplier_row + g1).to(tl.int8)
            f2 = (f2 >> SHIFT) * tl.load(multiplier_row + g2).to(tl.int8)
            f3 = (f3 >> SHIFT) * tl.load(multiplier_row + g3).to(tl.int8)
    # Tile j becomes columns 64 j .. 64 j + 63; in the operand's layout nothing moves.
    fields = tl.join(tl.join(f0, f2), tl.join(f1, f3))
    return tl.reshape(tl.permute(fields, (0, 2, 3, 1)), [b0.shape[0], 256])


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
