"""BLAKE3, hash mode without key, in plain Python: after section 2 of the BLAKE3 paper.

Slow, but frame heads, manifests and index runs are small, and Debian has no package of it.
"""

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
QUARTERS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
            (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
MASK = 0xFFFFFFFF


def _compress(value, block, counter, length, flags):
    state = list(value) + [IV[0], IV[1], IV[2], IV[3],
                           counter & MASK, counter >> 32, length, flags]
    for turn in range(7):
        for quarter, (a, b, c, d) in enumerate(QUARTERS):
            va, vb, vc, vd = state[a], state[b], state[c], state[d]
            va = (va + vb + block[2 * quarter]) & MASK
            vd ^= va
            vd = (vd >> 16) | (vd << 16) & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 12) | (vb << 20) & MASK
            va = (va + vb + block[2 * quarter + 1]) & MASK
            vd ^= va
            vd = (vd >> 8) | (vd << 24) & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 7) | (vb << 25) & MASK
            state[a], state[b], state[c], state[d] = va, vb, vc, vd
        if turn < 6:
            block = [block[at] for at in ORDER]
    return [state[at] ^ state[at + 8] for at in range(8)]


def _words(data):
    data = data.ljust(64, b"\0")
    return [int.from_bytes(data[at:at + 4], "little") for at in range(0, 64, 4)]


def _chunk(data, counter, root):
    value = IV
    blocks = [data[at:at + 64] for at in range(0, len(data), 64)] or [b""]
    for at, block in enumerate(blocks):
        flags = CHUNK_START if at == 0 else 0
        if at == len(blocks) - 1:
            flags |= CHUNK_END | root
        value = _compress(value, _words(block), counter, len(block), flags)
    return value


def _tree(data, counter, root):
    if len(data) <= 1024:
        return _chunk(data, counter, root)
    # The left part is the largest power of two of chunks that leaves something to the right.
    left = 1024
    while left * 2 < len(data):
        left *= 2
    block = _tree(data[:left], counter, 0) + _tree(data[left:], counter + left // 1024, 0)
    return _compress(IV, block, 0, 64, PARENT | root)


def blake3(data):
    """The 32 bytes of the hash."""
    return b"".join(word.to_bytes(4, "little") for word in _tree(bytes(data), 0, ROOT))


# The empty input and one that takes two chunks, from the test vectors of the BLAKE3 project
# (there the input's bytes count 0 to 250 again and again).
assert blake3(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
assert blake3(bytes(at % 251 for at in range(1025))).hex() == \
    "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"
