# Drives a server with libnbd, politely and then with every check of libnbd's own turned off.
# Arguments: the URI of a writable export of at least 64 MiB whose minimum block size is 512.

import errno
import random
import sys

import nbd

URI = sys.argv[1]
SEED = int(sys.argv[2])
MIB = 1 << 20


def connect(strict=True, options=False):
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    if not strict:
        handle.set_strict_mode(0)
    if options:
        handle.set_opt_mode(True)
    handle.connect_uri(URI)
    return handle


def expect(number, act, *arguments):
    try:
        act(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, (error, number)
    else:
        raise AssertionError("no error, expected %s" % errno.errorcode[number])


def test_negotiation():
    handle = connect(options=True)
    names = []
    handle.opt_list(lambda name, description: names.append((name, description)) or 0)
    assert ("disk", "memory to test with") in names, names
    contexts = []
    handle.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    assert contexts == ["base:allocation"], contexts
    handle.set_export_name("none")
    expect(errno.ENOENT, handle.opt_info)
    handle.set_export_name("secret")
    expect(errno.ENOTSUP, handle.opt_go)  # libnbd's word for a policy
    handle.set_export_name("disk")
    handle.opt_info()
    assert handle.get_size() == 64 * MIB
    handle.opt_go()
    assert handle.get_structured_replies_negotiated()
    assert handle.can_meta_context("base:allocation")
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == 512
    assert handle.get_block_size(nbd.SIZE_PREFERRED) == 4096
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MIB
    handle.pwrite(b"x" * 512, 0)
    handle.shutdown()
    handle = connect(options=True)
    handle.opt_abort()


def test_illegal_requests():
    handle = connect(strict=False)
    size = handle.get_size()
    expect(errno.EINVAL, handle.pread, 512, size)
    expect(errno.EINVAL, handle.pread, 512, 100)
    expect(errno.EINVAL, handle.pread, 100, 0)
    expect(errno.EINVAL, handle.pread, 33 * MIB, 0)
    expect(errno.ENOSPC, handle.pwrite, bytes(512), size)
    expect(errno.ENOSPC, handle.pwrite, bytes(1024), size - 512)
    expect(errno.EINVAL, handle.pwrite, bytes(33 * MIB), 0)
    expect(errno.EINVAL, handle.pwrite, bytes(100), 0)
    expect(errno.ENOSPC, handle.zero, 512, size)
    expect(errno.EINVAL, handle.trim, 512, size)
    expect(errno.EINVAL, handle.trim, 100, 0)
    expect(errno.EINVAL, handle.block_status, 512, size, lambda *_: 0)
    expect(errno.EINVAL, handle.block_status, 0, 0, lambda *_: 0)
    expect(errno.EINVAL, handle.pwrite, bytes(512), 0, nbd.CMD_FLAG_REQ_ONE)
    expect(errno.EINVAL, handle.pread, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
    # After all of that the stream is in step.
    handle.pwrite(b"y" * 512, 512)
    assert handle.pread(512, 512) == b"y" * 512
    handle.shutdown()


def test_flags():
    handle = connect()
    handle.pwrite(b"f" * 4096, 0, nbd.CMD_FLAG_FUA)
    handle.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    handle.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    handle.trim(4096, 0, nbd.CMD_FLAG_FUA)
    handle.cache(4096, 0)
    handle.flush()
    chunks = []
    handle.pwrite(b"z" * 65536, 0)
    handle.trim(65536, 65536)
    note = lambda data, offset, status, error: chunks.append((offset, status)) or 0
    handle.pread_structured(131072, 0, note, nbd.CMD_FLAG_DF)
    assert chunks == [(0, nbd.READ_DATA)], chunks
    chunks.clear()
    handle.pread_structured(131072, 0, note)
    assert chunks == [(0, nbd.READ_DATA), (65536, nbd.READ_HOLE)], chunks
    extents = []
    handle.block_status(131072, 0, lambda name, offset, found, error: extents.extend(found) or 0)
    assert extents == [65536, 0, 65536, 3], extents
    extents.clear()
    one = nbd.CMD_FLAG_REQ_ONE
    handle.block_status(131072, 0, lambda name, offset, found, error: extents.extend(found) or 0, one)
    assert extents == [65536, 0], extents
    handle.shutdown()


def test_model():
    """Random operations, many in flight, against a bytearray."""
    source = random.Random(SEED)
    handle = connect()
    model = bytearray(8 * MIB)
    base = 32 * MIB
    handle.zero(len(model), base)
    for _ in range(60):
        cookies = []
        # Within a round ranges do not overlap, so that the order does not matter.
        for slot in range(16):
            start = slot * (len(model) // 16)
            length = source.randrange(1, 256) * 512
            at = start + source.randrange(0, (len(model) // 16 - length) // 512 + 1) * 512
            kind = source.randrange(4)
            if kind == 0:
                data = source.randbytes(length)
                model[at:at + length] = data
                cookies.append((handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), base + at), None))
            elif kind == 1:
                model[at:at + length] = bytes(length)
                cookies.append((handle.aio_zero(length, base + at), None))
            else:
                buffer = nbd.Buffer(length)
                cookies.append((handle.aio_pread(buffer, base + at), (buffer, bytes(model[at:at + length]))))
        while handle.aio_in_flight() > 0:
            handle.poll(-1)
        for cookie, wanted in cookies:
            assert handle.aio_command_completed(cookie)
            if wanted:
                assert wanted[0].to_bytearray() == wanted[1]
    assert handle.pread(len(model), base) == model
    handle.shutdown()


for name, test in sorted(globals().items()):
    if name.startswith("test_"):
        test()
        print("passed", name)
