# SPDX-License-Identifier: Apache-2.0
"""A small writer and reader of TIFF structures, independent of the program and of tifffile, byte by byte."""
import struct

import numpy as np

KINDS = {1: 'B', 2: 'B', 3: 'H', 4: 'I', 6: 'b', 7: 'B', 8: 'h', 9: 'i', 11: 'f', 12: 'd', 13: 'I', 16: 'Q', 18: 'Q'}
SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 18: 8}
HEIGHT, WIDTH = 90, 120


def pack_directory(out, tags, order, bigtiff):
    """Append a directory to a bytearray and return its offset; tags are {code: (type, values or bytes or a dict)}."""
    entry, pointer, count = ('HHQ', 'Q', 'Q') if bigtiff else ('HHI', 'I', 'H')
    tags = {code: (18 if bigtiff else 4, [pack_directory(out, value[1], order, bigtiff)])
            if isinstance(value[1], dict) else value for code, value in tags.items()}
    offset = len(out)
    table, values = struct.pack(order + count, len(tags)), b''
    behind = offset + len(table) + len(tags) * struct.calcsize('=' + entry + pointer) + struct.calcsize(pointer)
    for code, (type_, value) in sorted(tags.items()):
        raw = value if isinstance(value, bytes) else struct.pack(f'{order}{len(value)}{KINDS[type_]}', *value)
        table += struct.pack(order + entry, code, type_, len(raw) // SIZES.get(type_, 1))
        if len(raw) <= struct.calcsize(pointer):
            table += raw.ljust(struct.calcsize(pointer), b'\0')
        else:
            table += struct.pack(order + pointer, behind + len(values))
            values += raw + bytes(len(raw) % 2)
    out += table + bytes(struct.calcsize(pointer)) + values
    return offset


def write_tiff(path, tags, strips, order='<', bigtiff=False, pages=()):
    """Write a TIFF; StripOffsets and StripByteCounts are filled in unless given, None leaves a tag out.

    Further pages are dicts of tags without data.
    """
    out = bytearray(16 if bigtiff else 8)
    offsets = []
    for strip in strips:
        offsets.append(len(out))
        out += strip + bytes(len(strip) % 2)
    tags = {273: (4, offsets), 279: (4, [len(strip) for strip in strips])} | tags
    head = b'II' if order == '<' else b'MM'
    head += struct.pack(order + 'HHH', 43, 8, 0) if bigtiff else struct.pack(order + 'H', 42)
    out[:len(head)] = head
    link, pointer = len(head), order + ('Q' if bigtiff else 'I')
    for page in (tags, *pages):
        page = {code: value for code, value in page.items() if value is not None}
        offset = pack_directory(out, page, order, bigtiff)
        struct.pack_into(pointer, out, link, offset)
        link = offset + (8 + 20 * len(page) if bigtiff else 2 + 12 * len(page))
    path.write_bytes(out)


def read_tags(path):
    """Return {code: (type, count, bytes)} of the first directory, sub-directories as dicts, and check its order."""
    data = path.read_bytes()
    order = '<' if data[:2] == b'II' else '>'
    big = struct.unpack(order + 'H', data[2:4])[0] == 43
    pointer = order + ('Q' if big else 'I')

    def directory(offset):
        n, = struct.unpack_from(order + ('Q' if big else 'H'), data, offset)
        found = {}
        for i in range(n):
            place = offset + (8 + i * 20 if big else 2 + i * 12)
            code, type_, count = struct.unpack_from(order + ('HHQ' if big else 'HHI'), data, place)
            place += 12 if big else 8
            size = SIZES.get(type_, 1) * count
            if size > (8 if big else 4):
                place, = struct.unpack_from(pointer, data, place)
                assert place % 2 == 0
            raw = data[place:place + size]
            assert len(raw) == size
            is_directory = code in (34665, 34853, 40965)
            found[code] = directory(int.from_bytes(raw, 'little' if order == '<' else 'big')) if is_directory else (
                type_, count, raw)
        assert list(found) == sorted(found)
        return found
    return directory(struct.unpack_from(pointer, data, 8 if big else 4)[0])


def gray_tags(height=HEIGHT, width=WIDTH, **more):
    """Return the tags of a gray picture of 16 bits in one strip; t259=... and so on change them."""
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [16]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]),
            278: (4, [height])}
    return tags | {int(code[1:]): value for code, value in more.items()}


def write_rich(path, gray, order, bigtiff):
    """Write a file with all the metadata that programs leave, EXIF with Interoperability and GPS included."""
    r = lambda *values: struct.pack(f'{order}{len(values)}I', *values)
    exif = {33434: (5, r(30, 1)), 34855: (3, [800]), 36864: (7, b'0232'), 37500: (7, bytes(range(99))),
            40965: (4, {1: (2, b'R98\0'), 2: (7, b'0100')})}
    gps = {0: (1, b'\2\3\0\0'), 1: (2, b'N\0'), 2: (5, r(52, 1, 31, 1, 0, 1))}
    write_tiff(path, gray_tags(
        t254=(4, [0]), t269=(2, b'name\0'), t270=(2, b'SIMPLE = T\0 FITS \xe9 \xc2\xa9\0'), t271=(2, b'ZWO\0'),
        t272=(2, b'ASI\0'), t274=(3, [3]), t280=(3, [7]), t281=(3, [9]), t282=(5, r(144, 2)), t283=(5, r(72, 1)),
        t296=(3, [3]), t305=(2, b'Siril 1.4\0'), t306=(2, b'2026:01:02 03:04:05\0'), t315=(2, b'\xc3\x84nne\0'),
        t316=(2, b'host\0'), t318=(5, r(1, 3, 2, 6)), t340=(3, [0]), t341=(3, [65535]), t700=(1, b'<x:xmpmeta/>' * 9),
        t33432=(2, b'(c) me\0'), t33723=(7, b'\x1c\x02\0\0\0' * 5), t34377=(1, b'8BIM' * 99),
        t34675=(7, b'icc!' * 150000), t37724=(7, b'layers' * 50), t50000=(2, b'12\0'), t50002=(11, [1.5]),
        t50005=(12, [300.25]), t50011=(4, [1]), t60001=(9, [-5, 6]), t60002=(8, [-1]), t60003=(6, [-1, -2, -3, -4, -5]),
        t60004=(10, r(2**32 - 1, 3)), t34665=(4, exif), t34853=(4, gps)),
        [np.asarray(gray, order + 'u2').tobytes()], order, bigtiff)
