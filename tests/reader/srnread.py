#!/usr/bin/python3
"""Reads a node's state directory, after appliance/docs/formats.md and nothing else.

    srnread.py groups DIR                     the groups, one line each
    srnread.py points DIR [GROUP]             lines of history and checkpoints, as JSON
    srnread.py verify DIR [GROUP]             every frame, run, layer and base page; 1 when damaged
    srnread.py export DIR GROUP DISK POINT    the disk at a point, to standard output

POINT is latest, a frame's number, or a checkpoint's label or id; EPOCH:POINT is one of another line.
It shares no code with the product and writes nothing. It is written to be read, not to be quick.
"""

import json
import os
import sys

import lz4.block
import xxhash
import zstandard

from b3 import blake3

SECTOR, PAGE, BLOCK = 512, 4096, 32768


class Damaged(Exception):
    """Something is not what was written."""


def check(holds, what):
    if not holds:
        raise Damaged(what)


def xxh3(data):
    return xxhash.xxh3_64_intdigest(data)


def round_up(value, to):
    return -(-value // to) * to


class Fields:
    """Fields one behind the other."""

    def __init__(self, data, at=0):
        self.data, self.at = data, at

    def take(self, length):
        check(0 <= length <= len(self.data) - self.at, "it ends early")
        self.at += length
        return self.data[self.at - length:self.at]

    def uint(self, length):
        return int.from_bytes(self.take(length), "little")

    def u8(self):
        return self.uint(1)

    def u16(self):
        return self.uint(2)

    def u32(self):
        return self.uint(4)

    def u64(self):
        return self.uint(8)

    def i64(self):
        return int.from_bytes(self.take(8), "little", signed=True)

    def id16(self):
        return self.take(16).hex()

    def position(self):
        return {"epoch": self.id16(), "seq": self.u64(), "hash": self.id16()}

    def text(self):
        length = self.u16()
        check(length <= 512, "a text is too long")
        return self.take(length).decode()

    def list(self, item):
        return [item() for _ in range(self.u32())]


# Frames.

def records(data):
    """The records of a table: kind, and what it holds."""
    fields, found = Fields(data), []
    while fields.at < len(data):
        kind, flags, length = fields.u8(), fields.u8(), fields.u16()
        check(flags == 0 and length % 4 == 0, "a record's prefix")
        body = Fields(fields.take(length))
        record = {"kind": kind}
        if kind == 1:
            record.update(disk=body.u32(), sectors=body.u32(), first=body.u64())
            check(1 <= record["sectors"] <= 512, "a write's length")
        elif kind in (2, 3):
            record.update(disk=body.u32(), first=body.u64(), sectors=body.u64())
        elif kind == 4:
            record.update(id=body.id16(), mark=body.u8(), application=body.u8() == 1)
            check(body.take(2) == bytes(2), "a mark's reserved bytes")
        elif kind == 5:
            record.update(disk=body.u32(), id=body.id16(), sectors=body.u64())
            record.update(name=body.take(body.u8()).decode())
        elif kind == 6:
            record.update(disk=body.u32())
        elif kind == 7:
            record.update(disk=body.u32(), sectors=body.u64())
        elif kind == 8:
            record.update(epoch=body.id16(), fork=body.position())
        elif kind == 9:
            record.update(disk=body.u32(), reason=body.u8())
        elif kind == 10:
            record.update(disk=body.u32())
        elif kind == 11:
            record.update(step=body.i64())
        else:
            raise Damaged(f"record kind {kind}")
        found.append(record)
    return found


def blocks_of(table):
    """Disk, first sector and sectors of each block, in the order of the content."""
    for record in table:
        if record["kind"] == 1:
            at, rest = record["first"], record["sectors"]
            while rest:
                some = min(rest, BLOCK // SECTOR)
                yield record["disk"], at, some
                at, rest = at + some, rest - some


def decode(codec, stored, length):
    """A stored block's content, which has this length."""
    try:
        if codec == 0:
            content = stored
        elif codec == 1:
            content = lz4.block.decompress(stored, uncompressed_size=length)
        elif codec == 2:
            content = zstandard.ZstdDecompressor().decompress(stored, max_output_size=length)
        else:
            raise Damaged(f"codec {codec}")
    except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
        raise Damaged(f"a block does not decode: {error}") from error
    check(len(content) == length, "a block decodes to another length")
    return content


class Frame:
    """One copy of a frame, at an offset of a segment file; Damaged if it is not sound."""

    def __init__(self, data, at, content=True):
        envelope = data[at:at + 64]
        fields = Fields(envelope)
        check(fields.take(4) == b"SRNe", "an envelope's magic")
        check(fields.u16() == 1, "an envelope's version")
        flags, self.segment = fields.u16(), fields.u64()
        head_length, entries, self.stored = fields.u32(), fields.u32(), fields.u32()
        check(fields.u32() == 0, "an envelope's reserved bytes")
        self.hash, self.watermark, total = fields.id16(), fields.u64(), fields.u64()
        check(flags == (1 if entries else 0), "an envelope's flags")
        check(head_length <= 131072 and entries <= 1032 and self.stored <= 262144, "lengths")
        head = data[at + 64:at + 64 + head_length]
        table = data[at + 64 + head_length:at + 64 + head_length + 4 * entries]
        check(xxh3(envelope[:56] + table) == total, "an envelope's checksum")
        front = round_up(64 + head_length + 4 * entries, PAGE)
        self.length = front + round_up(self.stored, PAGE)
        check(at + self.length <= len(data), "a frame beyond the end of the file")
        check(blake3(head)[:16].hex() == self.hash, "a frame's hash")
        self.read_head(head)
        self.place(at + front, table)
        if content:
            for block in self.blocks:
                stored = data[block["at"]:block["at"] + block["stored"]]
                found = decode(block["codec"], stored, block["sectors"] * SECTOR)
                check(xxh3(found) == block["sum"], f"content of frame {self.seq}")

    def read_head(self, head):
        fields = Fields(head)
        check(fields.take(4) == b"SRNf" and fields.u16() == 1, "a head's magic or version")
        check(fields.u16() == 128 and fields.u32() == len(head), "a head's lengths")
        count, self.block_count, self.content = fields.u32(), fields.u32(), fields.u32()
        self.seq, self.group, self.epoch = fields.u64(), fields.id16(), fields.id16()
        self.prev, self.durable = fields.id16(), fields.u64()
        self.log_time, self.wall_time = fields.u64(), fields.i64()
        check(fields.take(24) == bytes(24), "a head's reserved bytes")
        check(self.seq > 0 and self.durable < self.seq, "a head's numbers")
        end = len(head) - 8 * self.block_count
        check(end >= 128, "a head's blocks")
        self.records = records(head[128:end])
        check(len(self.records) == count, "a head's records")
        sums = Fields(head, end)
        self.sums = [sums.u64() for _ in range(self.block_count)]

    def place(self, at, table):
        self.blocks, fields = [], Fields(table)
        for number, (disk, first, sectors) in enumerate(blocks_of(self.records)):
            check(number < self.block_count, "more blocks than the head says")
            codec, stored = 0, sectors * SECTOR
            if table:
                entry = fields.u32()
                codec, stored = entry >> 24, entry & 0xFFFFFF
            self.blocks.append({"disk": disk, "first": first, "sectors": sectors, "codec": codec,
                                "stored": stored, "at": at, "sum": self.sums[number]})
            at += stored
        check(len(self.blocks) == self.block_count, "fewer blocks than the head says")
        check(sum(block["stored"] for block in self.blocks) == self.stored, "stored lengths")
        check(sum(block["sectors"] for block in self.blocks) * SECTOR == self.content, "content")


class Segment:
    """A log segment's file."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = file.read()
        self.path = path
        header = self.data[:PAGE]
        self.is_sound = (len(header) == PAGE and header[:4] == b"SRNg"
                         and xxh3(header[:4088]) == int.from_bytes(header[4088:], "little"))
        if self.is_sound:
            fields = Fields(header, 4)
            check(fields.u16() == 1, f"{path} has another version")
            fields.u16()
            self.id, self.group, self.epoch = fields.u64(), fields.id16(), fields.id16()
            self.first, self.prev = fields.u64(), fields.id16()

    def frame_at(self, at, content=True):
        try:
            frame = Frame(self.data, at, content)
        except Damaged:
            return None
        return frame if frame.segment == self.id and frame.group == self.group else None

    def frames(self, content=True):
        """Offset and frame, as long as each follows the one before."""
        at, last, prev = PAGE, self.first - 1, self.prev
        while at < len(self.data):
            frame = self.frame_at(at, content)
            if not frame or (frame.seq, frame.prev, frame.epoch) != (last + 1, prev, self.epoch):
                return
            yield at, frame
            at, last, prev = at + frame.length, frame.seq, frame.hash

    def tail(self):
        """The last frame that counts, the offset behind it, and the highest watermark."""
        end, last, prev, watermark = PAGE, self.first - 1, self.prev, 0
        for at, frame in self.frames():
            end, last, prev = at + frame.length, frame.seq, frame.hash
            watermark = max(watermark, frame.watermark)
        at = end
        while at < len(self.data):
            frame = self.frame_at(at)
            if frame:
                watermark = max(watermark, frame.watermark)
            at += frame.length if frame else PAGE
        return last, prev, end, watermark


# Catalogs.

def read_catalog(fields):
    catalog = {"at": fields.position(), "log_time": fields.u64(), "wall_time": fields.i64()}
    catalog["clean"] = fields.position() if fields.u8() else None
    catalog["next"] = fields.u32()
    count = fields.u32()
    check(count <= 4096, "a catalog's disks")
    catalog["disks"] = {}
    for _ in range(count):
        number = fields.u32()
        disk = {"id": fields.id16(), "sectors": fields.u64(), "content": fields.u8()}
        check(disk["content"] <= 2, "a disk's content")
        disk.update(reason=fields.u8(), joined=fields.u64(), since=fields.u64())
        disk["name"] = fields.take(fields.u8()).decode()
        catalog["disks"][number] = disk
    return catalog


def carry_on(catalog, frame):
    """The catalog behind the frame that follows."""
    disks = {number: dict(disk) for number, disk in catalog["disks"].items()}
    after = dict(catalog, disks=disks)
    for record in frame.records:
        disk = disks.get(record.get("disk"))
        if record["kind"] == 5:
            disks[record["disk"]] = {
                "id": record["id"], "sectors": record["sectors"], "content": 0, "reason": 0,
                "joined": frame.seq, "since": frame.log_time, "name": record["name"]}
            after["next"] = max(after["next"], record["disk"] + 1)
        elif record["kind"] == 6:
            disks.pop(record["disk"], None)
        elif record["kind"] == 7 and disk:
            disk["sectors"] = record["sectors"]
        elif record["kind"] == 9 and disk:
            seeding = record["reason"] == 1 or disk["content"] == 1
            disk.update(content=1 if seeding else 2, reason=record["reason"], since=frame.log_time)
        elif record["kind"] == 10 and disk:
            disk.update(content=0, reason=0, since=frame.log_time)
    after["at"] = {"epoch": frame.epoch, "seq": frame.seq, "hash": frame.hash}
    after["log_time"], after["wall_time"] = frame.log_time, frame.wall_time
    if disks and all(disk["content"] == 0 for disk in disks.values()):
        after["clean"] = after["at"]
    return after


# Index runs.

class Run:
    """An index run."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = file.read()
        self.path = path
        count = len(self.data) // PAGE
        check(count > 0 and len(self.data) % PAGE == 0, f"{path}: its length")
        fields = Fields(self.block(count - 1, 0xF3)[1])
        check(fields.take(4) == b"SRNx" and fields.u16() == 1, f"{path}: magic or version")
        self.level = fields.u8()
        fields.u8()
        self.group, self.first, self.last = fields.id16(), fields.u64(), fields.position()
        self.entry_count, self.leaves, self.root = fields.u64(), fields.u32(), fields.u32()
        self.height = fields.u32()
        self.parts = [(fields.u32(), fields.u32()) for _ in range(3)]
        fields.u32()
        self.hash = fields.take(32)

    def block(self, number, level=None):
        """A block's number of items and their bytes, checked."""
        block = self.data[number * PAGE:(number + 1) * PAGE]
        check(len(block) == PAGE, f"{self.path}: there is no block {number}")
        check(xxh3(block[:4088]) == int.from_bytes(block[4088:], "little"),
              f"{self.path}: block {number}")
        check(level is None or block[2] == level, f"{self.path}: block {number} has another level")
        return int.from_bytes(block[:2], "little"), block[8:4088]

    def entries(self):
        for number in range(self.leaves):
            count, items = self.block(number, 0)
            for at in range(count):
                yield self.entry(items[32 * at:32 * at + 32])

    @staticmethod
    def entry(item):
        fields = Fields(item)
        key, codec = fields.u64(), fields.u8()
        entry = {"disk": key >> 48, "first": key & (1 << 48) - 1, "codec": codec}
        if codec in (0xFE, 0xFF):
            fields.take(15)
            entry["sectors"] = fields.u64()
            return entry
        check(codec <= 2, "an entry's codec")
        entry.update(sectors=fields.u8(), before=fields.u8(), whole=fields.u8())
        entry.update(file=fields.u32(), at=fields.u32(), stored=fields.u32(), sum=fields.u64())
        check(entry["sectors"] >= 1 and entry["before"] + entry["sectors"] <= entry["whole"] <= 64,
              "an entry's sectors")
        return entry

    def find(self, key):
        """The entry that holds a key, or none: down the tree, as a reader of single sectors goes."""
        if not self.leaves:
            return None
        number = self.root
        for level in range(self.height, 0, -1):
            count, items = self.block(number, level)
            child = None
            for at in range(count):
                fields = Fields(items[12 * at:12 * at + 12])
                first, below = fields.u64(), fields.u32()
                if child is not None and first > key:
                    break
                child = below
            check(child is not None and child < number, f"{self.path}: block {number}")
            number = child
        count, items = self.block(number, 0)
        for at in range(count):
            entry = self.entry(items[32 * at:32 * at + 32])
            first = (entry["disk"] << 48) + entry["first"]
            if first <= key < first + entry["sectors"]:
                return entry
        return None

    def part(self, which, level, size):
        """The items of points (0), marks (1) or the catalog (2)."""
        number, count = self.parts[which]
        found = []
        while len(found) < count:
            here, items = self.block(number, level)
            check(here > 0, f"{self.path}: block {number} is empty")
            found.extend(items[size * at:size * at + size] for at in range(here))
            number += 1
        return found

    def marks(self):
        for item in self.part(1, 0xF1, 64):
            fields = Fields(item)
            mark = {"id": fields.id16(), "kind": fields.u8(), "clean": fields.u8() == 1}
            fields.take(6)
            mark.update(seq=fields.u64(), hash=fields.id16(), log_time=fields.u64(),
                        wall_time=fields.i64())
            yield mark

    def catalog(self):
        return read_catalog(Fields(b"".join(self.part(2, 0xF2, 1))))

    def verify(self):
        footer = len(self.data) // PAGE - 1
        for number in range(footer):
            self.block(number)
        check(blake3(self.data[:footer * PAGE]) == self.hash, f"{self.path}: its hash")
        check(sum(1 for _ in self.entries()) == self.entry_count, f"{self.path}: its entries")
        for entry in self.entries():
            found = self.find((entry["disk"] << 48) + entry["first"])
            check(found == entry, f"{self.path}: its tree does not lead to an entry")


# Manifests.

def read_manifest(path, generation):
    with open(path, "rb") as file:
        data = file.read()
    check(len(data) > 48 and data[:4] == b"SRNm", f"{path}: no manifest")
    check(int.from_bytes(data[4:6], "little") <= 1, f"{path}: a newer version")
    check(blake3(data[:-32]) == data[-32:], f"{path}: its hash")
    fields = Fields(data[:-32], 8)
    found = {"generation": fields.u64(), "group": fields.id16(), "name": fields.text()}
    check(found["generation"] == generation, f"{path}: its generation")
    found["role"] = ("primary", "secondary")[fields.u8()]
    found["keep"] = ("cache", "replica")[fields.u8()]

    def epochs():
        return [{"id": fields.id16(), "fork": fields.position()} for _ in range(fields.u16())]

    found["fence"] = fields.u8()
    if found["fence"]:
        fields.i64()
        if fields.u8():
            epochs()
    found["acked"] = fields.u64()
    fields.u32(), fields.u32(), fields.u32()
    found["main"] = fields.id16()

    def line():
        return {"epochs": epochs(), "purpose": ("main", "clone", "branch")[fields.u8()],
                "since": fields.i64(), "pieces": fields.list(piece)}

    def piece():
        return {"ordinal": fields.u32(), "first": fields.u64(), "last": fields.position(),
                "log_time": fields.u64(), "goes_on": fields.u8()}

    def segment():
        return {"ordinal": fields.u32(), "slot": fields.u32(), "id": fields.u64(),
                "epoch": fields.id16(), "first": fields.u64(), "prev": fields.id16(),
                "last": fields.position(), "end": fields.u32()}

    def layer():
        return {"ordinal": fields.u32(), "first": fields.u64(), "last": fields.position(),
                "files": fields.list(lambda: (fields.u32(), fields.u64()))}

    def run():
        return {"number": fields.u32(), "level": fields.u8(), "epoch": fields.id16(),
                "first": fields.u64(), "last": fields.u64(), "pieces": (fields.u32(), fields.u32()),
                "entries": fields.u64()}

    def note():
        found = {"id": fields.id16(), "flags": fields.u8(), "label": fields.text()}
        check(found["flags"] < 32, "a note's flags")
        return found

    found["lines"] = {line["epochs"][-1]["id"]: line for line in fields.list(line)}
    found["segments"] = {segment["ordinal"]: segment for segment in fields.list(segment)}
    found["layers"] = {layer["ordinal"]: layer for layer in fields.list(layer)}
    found["runs"] = fields.list(run)
    found["base"] = read_catalog(fields) if fields.u8() else None
    found["notes"] = {note["id"]: note for note in fields.list(note)}
    check(fields.at == len(fields.data), f"{path}: bytes behind its end")
    check(found["main"] in found["lines"], f"{path}: no main line")
    return found


# Groups.

class Group:
    """A group's directory."""

    def __init__(self, path):
        self.path = path
        names = [name for name in os.listdir(path)
                 if name.startswith("manifest-") and len(name) == 25]
        check(names, f"{path} holds no manifest")
        newest = max(names, key=lambda name: int(name[9:], 16))
        self.manifest = read_manifest(os.path.join(path, newest), int(newest[9:], 16))
        self.segments, self.loose, self.files, self.run_cache = {}, [], {}, {}
        self.open_log()
        self.intent = self.read_intent()
        self.tails = {epoch: self.find_tail(epoch) for epoch in self.manifest["lines"]}

    def file(self, *names):
        return os.path.join(self.path, *names)

    def open_log(self):
        by_slot = {segment["slot"]: segment for segment in self.manifest["segments"].values()}
        for name in sorted(os.listdir(self.file("log"))):
            if len(name) != 12 or not name.endswith(".seg"):
                continue
            segment, listed = Segment(self.file("log", name)), by_slot.get(int(name[:8], 16))
            if listed:
                check(segment.is_sound, f"{segment.path}: its header")
                check((segment.id, segment.first, segment.prev, segment.epoch)
                      == tuple(listed[key] for key in ("id", "first", "prev", "epoch")),
                      f"{segment.path}: another header than the manifest says")
                self.segments[listed["ordinal"]] = segment
            elif segment.is_sound and segment.group == self.manifest["group"]:
                self.loose.append(segment)
        for ordinal, listed in self.manifest["segments"].items():
            check(ordinal in self.segments, f"log segment {listed['slot']} is missing")

    def read_intent(self):
        """Where a retirement under way goes, and its pages; none when there is none to finish."""
        path = self.file("base", "retire.intent")
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            data = file.read()
        check(data[:4] == b"SRNi" and blake3(data[:-32]) == data[-32:], f"{path}: its hash")
        fields = Fields(data[:-32], 4)
        check(fields.u32() == 1, f"{path}: its version")
        to = fields.position()
        # Where the slice begins: of no use to who changes nothing.
        fields.u32(), fields.u64()
        pages = {}
        for _ in range(fields.u64()):
            disk, page, lost = fields.u32(), fields.u64(), fields.u8()
            pages[disk, page] = fields.take(PAGE), lost
        first = self.manifest["lines"][self.manifest["main"]]["pieces"][:1]
        return (to, pages) if first and first[0]["last"] == to else None

    def run(self, meta):
        if meta["number"] not in self.run_cache:
            run = Run(self.file("index", f"{meta['number']:08x}.idx"))
            same = (run.group, run.first, run.last["epoch"], run.last["seq"], run.entry_count)
            check(same == (self.manifest["group"], meta["first"], meta["epoch"], meta["last"],
                           meta["entries"]), f"{run.path}: not what the manifest says")
            self.run_cache[meta["number"]] = run
        return self.run_cache[meta["number"]]

    def run_of(self, piece):
        """The run of one piece alone."""
        for meta in self.manifest["runs"]:
            if meta["pieces"] == (piece["ordinal"],) * 2 and meta["first"] == piece["first"] \
                    and meta["last"] == piece["last"]["seq"]:
                return self.run(meta)
        raise Damaged(f"no index of the piece up to frame {piece['last']['seq']}")

    def cover(self, pieces):
        """The runs that cover the first pieces of a line, oldest first."""
        at = 0
        while at < len(pieces):
            best = None
            for meta in self.manifest["runs"]:
                if meta["pieces"][0] != pieces[at]["ordinal"] or meta["first"] != pieces[at]["first"]:
                    continue
                for end in range(at, len(pieces)):
                    piece = pieces[end]
                    if meta["pieces"][1] == piece["ordinal"] and meta["last"] == piece["last"]["seq"] \
                            and meta["epoch"] == piece["last"]["epoch"] \
                            and (best is None or end > best[0]):
                        best = (end, meta)
            check(best, f"no run begins at frame {pieces[at]['first']}")
            yield self.run(best[1])
            at = best[0] + 1

    def find_tail(self, epoch):
        """The unsealed segments of a line, in order, each with its frames that count."""
        line, found = self.manifest["lines"][epoch], []
        if line["pieces"]:
            seq, prev = line["pieces"][-1]["last"]["seq"], line["pieces"][-1]["last"]["hash"]
        else:
            at = self.manifest["base"]["at"] if self.manifest["base"] else line["epochs"][-1]["fork"]
            seq, prev = at["seq"], at["hash"]
        rest = [segment for segment in self.loose if segment.epoch == epoch]
        while True:
            best = None
            for segment in rest:
                if (segment.first, segment.prev) == (seq + 1, prev):
                    last, last_hash, _, watermark = segment.tail()
                    check(watermark <= last, f"frames {last + 1} to {watermark} are missing")
                    if best is None or last > best[1]:
                        best = (segment, last, last_hash)
            if best is None or best[1] == seq:
                break
            found.append(best[0])
            rest.remove(best[0])
            seq, prev = best[1], best[2]
        check(not any(segment.first > seq + 1 for segment in rest),
              f"frames from {seq + 1} on are missing")
        check(epoch != self.manifest["main"] or seq >= self.manifest["acked"],
              f"frames up to {self.manifest['acked']} were acknowledged and are missing")
        return found

    def behind(self, pieces):
        """The catalog behind the last of the pieces, or that of the base."""
        return self.run_of(pieces[-1]).catalog() if pieces else self.manifest["base"]

    def follow(self, epoch, seq):
        """Which pieces end at or before a frame; the frames from there up to it, each with its
        segment's bytes; and the catalog there."""
        pieces = self.manifest["lines"][epoch]["pieces"]
        whole = [piece for piece in pieces if piece["last"]["seq"] <= seq]
        segments = []
        if len(whole) < len(pieces) and pieces[len(whole)]["first"] <= seq:
            ordinal = pieces[len(whole)]["ordinal"]
            check(ordinal in self.segments, f"frame {seq} is no longer kept")
            segments = [self.segments[ordinal]]
        elif len(whole) == len(pieces):
            segments = self.tails[epoch]
        catalog, frames = self.behind(whole), []
        for segment in segments:
            for _, frame in segment.frames():
                if frame.seq > seq:
                    break
                frames.append((frame, segment.data))
                catalog = carry_on(catalog, frame)
        check(catalog["at"]["seq"] == seq, f"there is no frame {seq}")
        return whole, frames, catalog

    def head(self, epoch):
        line = self.manifest["lines"][epoch]
        if self.manifest["base"]:
            catalog = self.behind(line["pieces"])
        else:
            at = line["pieces"][-1]["last"] if line["pieces"] else line["epochs"][-1]["fork"]
            catalog = {"at": at, "disks": {}, "next": 0, "clean": None}
            if line["pieces"]:
                catalog = self.run_of(line["pieces"][-1]).catalog()
        for segment in self.tails[epoch]:
            for _, frame in segment.frames():
                catalog = carry_on(catalog, frame)
        return catalog

    def checkpoints(self, epoch):
        """Every mark of a line with its note."""
        marks, found = [], []
        for piece in self.manifest["lines"][epoch]["pieces"]:
            marks.extend(self.run_of(piece).marks())
        catalog = self.behind(self.manifest["lines"][epoch]["pieces"])
        for segment in self.tails[epoch]:
            for _, frame in segment.frames():
                catalog = carry_on(catalog, frame) if catalog else None
                for record in frame.records:
                    if record["kind"] == 4:
                        clean = catalog is not None and catalog["clean"] == catalog["at"]
                        marks.append({"id": record["id"], "kind": record["mark"], "clean": clean,
                                      "seq": frame.seq, "hash": frame.hash,
                                      "log_time": frame.log_time, "wall_time": frame.wall_time})
        base = self.manifest["base"]
        for mark in marks:
            note = self.manifest["notes"].get(mark["id"], {"flags": 0, "label": ""})
            is_deleted = note["flags"] & 4
            if not is_deleted and (not base or mark["seq"] > base["at"]["seq"]):
                found.append(dict(mark, pinned=bool(note["flags"] & 1), label=note["label"]))
        return found

    # Content.

    def stored_file(self, ordinal):
        """The bytes of a segment or a layer file."""
        if ordinal in self.segments:
            return self.segments[ordinal].data
        if ordinal not in self.files:
            for layer in self.manifest["layers"].values():
                if ordinal in dict(layer["files"]):
                    self.files[ordinal] = self.layer_file(layer, ordinal)
        check(ordinal in self.files, f"an entry names file {ordinal}, which is not listed")
        return self.files[ordinal]

    def layer_file(self, layer, ordinal):
        path = self.file("layer", f"{ordinal:08x}.lay")
        with open(path, "rb") as file:
            data = file.read()
        check(len(data) >= dict(layer["files"])[ordinal], f"{path}: too short")
        check(xxh3(data[:4088]) == int.from_bytes(data[4088:4096], "little"), f"{path}: its header")
        fields = Fields(data)
        check(fields.take(4) == b"SRNl" and fields.u16() == 1, f"{path}: magic or version")
        fields.u16()
        found = (fields.u32(), fields.id16(), fields.u64(), fields.position())
        check(found == (ordinal, self.manifest["group"], layer["first"], layer["last"]),
              f"{path}: not what the manifest says")
        return data

    def entry_content(self, entry):
        stored = self.stored_file(entry["file"])[entry["at"]:entry["at"] + entry["stored"]]
        whole = decode(entry["codec"], stored, entry["whole"] * SECTOR)
        check(xxh3(whole) == entry["sum"], f"content in file {entry['file']} at {entry['at']}")
        return whole[entry["before"] * SECTOR:(entry["before"] + entry["sectors"]) * SECTOR]

    def base_content(self, number, disk, sectors):
        """A disk's content in the base; zeros where it has none."""
        content = bytearray(round_up(sectors, 8) * SECTOR)
        if not self.manifest["base"] or number not in self.manifest["base"]["disks"]:
            return content
        sums = open(self.file("base", f"{disk['id']}.sum"), "rb").read()
        with open(self.file("base", f"{disk['id']}.raw"), "rb") as raw:
            for page in range(min(len(sums), len(content) // PAGE * 8) // 8):
                total = int.from_bytes(sums[page * 8:page * 8 + 8], "little")
                if self.intent and (number, page) in self.intent[1]:
                    # A retirement that was cut short: what it was to write here is in the intent.
                    found, lost = self.intent[1][number, page]
                    check(not lost, f"{raw.name}: sectors of page {page} are lost")
                    content[page * PAGE:(page + 1) * PAGE] = found
                elif total:
                    raw.seek(page * PAGE)
                    found = raw.read(PAGE)
                    ordinary = max(xxh3(found), 1)
                    check(max(ordinary ^ (1 << 64) - 1, 1) != total or self.intent,
                          f"{raw.name}: sectors of page {page} are lost")
                    if ordinary != total:
                        # Either damage, or a whole page of a retirement that was cut short; that
                        # is covered by the log.
                        check(self.intent, f"{raw.name}: page {page}")
                    content[page * PAGE:(page + 1) * PAGE] = found
        return content

    def content(self, epoch, seq, name):
        """A disk behind a frame, and the catalog there."""
        check(self.manifest["base"], "a local cache holds no disks")
        floor = self.intent[0]["seq"] if self.intent else self.manifest["base"]["at"]["seq"]
        check(seq >= floor, f"frame {seq} is no longer kept")
        whole, frames, catalog = self.follow(epoch, seq)
        found = [(number, disk) for number, disk in catalog["disks"].items() if disk["name"] == name]
        check(found, f"there is no disk {name} at frame {seq}")
        (number, disk), = found
        image = self.base_content(number, disk, disk["sectors"])

        def put(first, data):
            data = data[:max(0, len(image) - first * SECTOR)]
            image[first * SECTOR:first * SECTOR + len(data)] = data

        for run in self.cover(whole):
            for entry in run.entries():
                if entry["disk"] == number:
                    zeros = entry["codec"] >= 0xFE
                    put(entry["first"], bytes(entry["sectors"] * SECTOR) if zeros
                        else self.entry_content(entry))
        for frame, data in frames:
            self.apply(frame, data, number, put)
        return bytes(image[:disk["sectors"] * SECTOR]), catalog

    @staticmethod
    def apply(frame, data, number, put):
        """What one frame does to a disk, in the order of its records."""
        blocks = iter(frame.blocks)
        for record in frame.records:
            if record["kind"] == 1:
                for _ in range(-(-record["sectors"] // (BLOCK // SECTOR))):
                    block = next(blocks)
                    if block["disk"] == number:
                        stored = data[block["at"]:block["at"] + block["stored"]]
                        put(block["first"],
                            decode(block["codec"], stored, block["sectors"] * SECTOR))
            elif record["kind"] in (2, 3) and record["disk"] == number:
                put(record["first"], bytes(record["sectors"] * SECTOR))

    def verify(self):
        """Every frame, run, layer and page of the base; says what was read."""
        counts = {"frames": 0, "encoded": 0, "runs": 0, "entries": 0, "pages": 0}
        for ordinal, segment in self.segments.items():
            listed, last = self.manifest["segments"][ordinal], None
            for at, frame in segment.frames():
                last, end = frame, at + frame.length
                counts["frames"] += 1
                counts["encoded"] += sum(1 for block in frame.blocks if block["codec"])
                if frame.seq == listed["last"]["seq"]:
                    break
            check(last and (last.hash, end) == (listed["last"]["hash"], listed["end"]),
                  f"{segment.path}: its frames do not reach frame {listed['last']['seq']}")
        for tail in self.tails.values():
            counts["frames"] += sum(1 for segment in tail for _ in segment.frames())
        for meta in self.manifest["runs"]:
            run = self.run(meta)
            run.verify()
            counts["runs"] += 1
            for entry in run.entries():
                counts["entries"] += 1
                if entry["codec"] < 0xFE:
                    self.entry_content(entry)
        for number, disk in (self.manifest["base"] or {"disks": {}})["disks"].items():
            content = self.base_content(number, disk, disk["sectors"])
            counts["pages"] += sum(1 for at in range(0, len(content), PAGE)
                                   if any(content[at:at + PAGE]))
        return counts


# The command line.

def groups_in(path):
    if os.path.isdir(os.path.join(path, "groups")):
        path = os.path.join(path, "groups")
        return [Group(os.path.join(path, name)) for name in sorted(os.listdir(path))]
    return [Group(path)]


def chosen(path, name):
    return [group for group in groups_in(path) if name in (group.manifest["name"], None)]


def points(group):
    base, lines = group.manifest["base"], []
    for epoch, line in group.manifest["lines"].items():
        head = group.head(epoch)
        lines.append({"epoch": epoch, "purpose": line["purpose"], "to": head["at"]["seq"],
                      "hash": head["at"]["hash"], "from": base["at"]["seq"] if base else None,
                      "disks": [disk["name"] for disk in head["disks"].values()],
                      "checkpoints": group.checkpoints(epoch)})
    lines.sort(key=lambda line: line["purpose"] != "main")
    return {"group": group.manifest["name"], "id": group.manifest["group"], "lines": lines}


def find_point(group, text):
    epoch, _, point = text.rpartition(":")
    epoch = epoch or group.manifest["main"]
    if point == "latest":
        clean = group.head(epoch)["clean"]
        check(clean, "nothing can be recovered yet")
        return epoch, clean["seq"]
    for checkpoint in group.checkpoints(epoch):
        if point in (checkpoint["id"], checkpoint["label"]):
            return epoch, checkpoint["seq"]
    return epoch, int(point)


def main(command, path, name=None, disk=None, point=None):
    if command == "export":
        (group,) = chosen(path, name)
        content, _ = group.content(*find_point(group, point), disk)
        sys.stdout.buffer.write(content)
        return
    for group in chosen(path, name):
        if command == "groups":
            manifest = group.manifest
            print(manifest["group"], manifest["name"], manifest["role"], manifest["keep"])
        elif command == "points":
            print(json.dumps(points(group), indent=1))
        elif command == "verify":
            print(json.dumps(group.verify()))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Damaged as error:
        sys.exit(f"srnread: {error}")
