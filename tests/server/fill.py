#!/usr/bin/env python3
"""Unpacks the regular files of a tar from standard input until a number of bytes is reached.

usage: fill.py FOLDER BYTES NAME <TAR

Files go to FOLDER/NAME; the one that would go past BYTES is cut there. Prints how many bytes were
written. Links, devices and names that leave the folder are passed over.
"""

import os
import shutil
import sys
import tarfile


class Limited:
    """Reads at most so many bytes of a file."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def read(self, count):
        piece = self.file.read(min(count, self.left))
        self.left -= len(piece)
        return piece


def main(folder, limit, name):
    written = 0
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
        for member in tar:
            path = os.path.normpath(os.path.join(name, member.name))
            if not member.isreg() or not path.startswith(name + "/"):
                continue
            path = os.path.join(folder, path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            size = min(member.size, limit - written)
            with open(path, "wb") as file:
                shutil.copyfileobj(Limited(tar.extractfile(member), size), file, 1 << 20)
            os.utime(path, (member.mtime, member.mtime))
            written += size
            if written == limit:
                break
    # The rest is read and dropped, or the unpacker before us would fail on a closed pipe.
    while sys.stdin.buffer.read(1 << 20):
        pass
    print(written)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
