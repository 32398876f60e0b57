"""Ways to spoil a file: of any bytes, of words that mean something to its reader, and of a checkpoint's archive."""

import io
import struct
import zipfile

NUMBERS = [
    0,
    1,
    2,
    -1,
    -2,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**48,
    2**62,
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    10**9,
    10**12,
]
JSON_WORDS = [
    b"[" * 1200,
    b'{"a":' * 1200,
    b"\\ud800",
    b"\\udc00\\ud800",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"\x00",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"\xff\xfe",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b'"',
    b"\\",
    b"\r",
    b"\n",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"-1",
    b"1.5",
    b'"x"',
    b"\xe2\x80\xa8",
    b'"role"',
    b'"weight"',
    b'"messages"',
    b'"tools"',
    b'"text"',
    b"A" * 70000,
    b"[" * 300 + b"]" * 300,
]
YAML_WORDS = [
    b"!!python/object/apply:os.system ['touch hacked']",
    b"!!python/name:os.system",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"- " * 400,
    b"[" * 1200,
    b"{" * 700,
    b"? ",
    b"!!binary ",
    b"!!timestamp x",
    b"2001-99-99",
    b"!!int ",
    b"!!int ''",
    b"!!float ''",
    b"!!bool maybe",
    b"!!set ",
    b"!!omap ",
    b"\t",
    b"\x85",
    b"\x00",
    b"9" * 5000,
    b"1:" * 50 + b"1",
    b".inf",
    b".nan",
    b"0x" + b"f" * 3000,
    b"1e400",
    b"|\n ",
    b">\n ",
    b"%YAML 9.9\n",
    b"---\n",
    b"...\n",
    b"'",
    b'"\\x"',
    b"\xed\xa0\x80",
    b"\xff",
    b"null",
    b"~",
    b"- {layer: 0-99999999999, mode: lora, rank: 1}\n",
    b": ",
    b"\n",
    b"\\uD800",
    b"&a [*a]",
    b"a: &x [1]\nb: &y [*x,*x,*x]\nc: &z [*y,*y,*y]\nd: [*z,*z,*z]\n",
    b"config: x\n",
    b"=",
    b"!!null x",
]
TABLE_WORDS = [
    b'"',
    b'""',
    b",",
    b"\r",
    b"\n",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b",," * 500,
    b'"' + b"a" * 70000,
    b"'",
    b";",
    b"0-99999999999",
    b"-1",
    b"nan",
    b"1e999",
    b"9" * 5000,
    b"*",
    b"emb",
    b"\xc2\xb2",
    b"[" * 1200,
    b"\\ud800",
    b"{",
    b"}",
    b"[",
]
VOCABULARY_WORDS = [
    b"(" * 300,
    b"-" * 7000,
    b"'a'*9999999",
    b"__import__('os').system('touch hacked')",
    b"b'",
    b"'\\ud800'",
    b"16777215",
    b"16777216",
    b"-1",
    b"9" * 5000,
    b" ",
    b"\n",
    b"''",
    b"b'\\xff' 1",
    b"'''",
    b"[1]",
    b"{}",
    b"1+2j",
    b"\\N{BULLET}",
    b"lambda: 0",
    b"\x00",
    b"u'a'",
    b"f'{1}'",
    b"'a' 'b'",
]


def spoiled(random, data, others, words=()):
    """``data`` after a few random changes; ``others`` lend blocks."""
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        data = _once(random, data, others, words)
    return data


def _once(random, data, others, words):
    kinds = [
        "flip",
        "flip",
        "byte",
        "byte",
        "number",
        "number",
        "cut",
        "extend",
        "drop",
        "double",
        "splice",
        "swap",
        "zeros",
    ]
    kind = random.choice(kinds + ["word"] * (8 if words else 0))
    size = len(data)
    at = random.randrange(size + 1)
    if random.random() < 0.4:
        # headers and directories are at the ends
        at = (
            random.randrange(min(64, size + 1))
            if random.random() < 0.6
            else size - random.randrange(min(200, size + 1))
        )
    length = random.choice((1, 2, 4, 8, 16, 64, 500, max(size // 3, 1)))
    block = data[at : at + length]
    if kind == "word":
        return data[:at] + random.choice(words) + data[at + random.choice((0, 0, 1, length)) :]
    if kind == "flip" and at < size:
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == "byte" and at < size:
        return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
    if kind == "number":
        return edited(
            data, random.choice((at, at // 4 * 4, at // 8 * 8)), random.choice((1, 2, 4, 8)), number(random, size)
        )
    if kind == "cut":
        return data[:at]
    if kind == "extend":
        return data + random.choice((bytes(length), random.randbytes(length), data[:length]))
    if kind == "drop":
        return data[:at] + data[at + length :]
    if kind == "double":
        return data[:at] + block * random.choice((2, 2, 3, 50)) + data[at + length :]
    if kind == "splice":
        other = random.choice(others)
        start = random.randrange(len(other) + 1)
        return data[:at] + other[start : start + length] + data[at + random.choice((0, length)) :]
    if kind == "swap":
        to = random.randrange(size + 1)
        return data[:to] + block + data[to + len(block) :]
    return data[:at] + bytes(len(block)) + data[at + len(block) :]


def number(random, size):
    """A number that a reader may not expect."""
    return random.choice(
        (random.choice(NUMBERS), size + random.choice((-2, -1, 0, 1, 2)), random.randrange(2 * size + 1))
    )


def edited(data, at, width, value):
    """``data`` with a little-endian number put in at ``at``."""
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def spoiled_index(random, data, others):
    """An .idx whose header, sizes, pointers or marks are changed and whose size fits what it announces."""
    magic, version, code, count, marks = struct.unpack_from("<9sQBQQ", data)
    sizes = list(struct.unpack_from(f"<{count}i", data, 34))
    pointers = list(struct.unpack_from(f"<{count}q", data, 34 + 4 * count))
    doc_idx = list(struct.unpack_from(f"<{marks}q", data, 34 + 12 * count))
    for _ in range(random.randrange(1, 4)):
        where = random.randrange(count)
        choice = random.randrange(7)
        if choice == 0:
            sizes[where] = number(random, len(data)) % 2**32 - 2**31
        elif choice == 1:
            pointers[where] = (number(random, len(data)) + 2**63) % 2**64 - 2**63
        elif choice == 2:
            doc_idx[random.randrange(len(doc_idx))] = (number(random, count) + 2**63) % 2**64 - 2**63
        elif choice == 3:
            code = random.randrange(12)
        elif choice == 4:
            sizes[where] += random.choice((-1, 1, -sizes[where]))
        elif choice == 5:
            other = random.randrange(count)
            pointers[where], pointers[other] = pointers[other], pointers[where]
        else:
            version, marks = random.choice(((1, marks), (version, number(random, count) % 2**64), (2, marks)))
    return struct.pack(
        f"<9sQBQQ{count}i{count}q{len(doc_idx)}q", magic, version, code, count, marks, *sizes, *pointers, *doc_idx
    )


def spoiled_archive(random, data, others):
    """A .pth whose archive is whole, with parts changed, left out, doubled, renamed or compressed."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return spoiled(random, data, others)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    bombs = random.random() < 0.1
    for _ in range(random.randrange(1, 3)):
        place = next((i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl")), 0)
        if random.random() < 0.4:
            place = random.randrange(len(parts))
        name, content = parts[place]
        choice = random.randrange(10)
        if choice < 6:
            parts[place] = (
                name,
                _spoiled_pickle(random, content) if name.endswith(".pkl") else spoiled(random, content, others),
            )
        elif choice == 6 and len(parts) > 1:
            del parts[place]
        elif choice == 7:
            parts[place] = (random.choice((name[:-1], "../" + name, name + "\n", "/etc/" + name, "x")), content)
        elif choice == 8:
            parts.append((name, content))
        else:
            parts[place] = (name, content + bytes(random.choice((1, 1000, 5_000_000 if bombs else 10))))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if bombs else zipfile.ZIP_STORED) as archive:
        for name, content in parts:
            archive.writestr(zipfile.ZipInfo(name) if not bombs else name, content)
    made = stream.getvalue()
    return spoiled(random, made, others) if random.random() < 0.1 else made


def _spoiled_pickle(random, data):
    choice = random.randrange(5)
    at = random.randrange(len(data))
    if choice == 0:
        # BININT1, BININT, LONG1 in place of what is there
        return (
            data[:at]
            + random.choice((b"K\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 9, b"\x8a\x08" + b"\x7f" * 8))
            + data[at + 2 :]
        )
    if choice == 1:
        places = [i for i in range(len(data)) if data[i : i + 1] in (b"K", b"M", b"J")] or [0]
        at = random.choice(places)
        return edited(data, at + 1, {75: 1, 77: 2}.get(data[at], 4), number(random, len(data)))
    if choice == 2:
        word = random.choice(
            (
                b"cposix\nsystem\n",
                b"cbuiltins\neval\n",
                b"ctorch._utils\n_rebuild_qtensor\n",
                b"ctorch\nFloatStorage\n",
                b"ccollections\nOrderedDict\n",
                b"c__builtin__\nbytearray\n",
                b"(" * 500,
                b"\x85" * 3000,
                b"}" * 3000,
                b"r\xff\xff\xff\x7f",
                b"R",
                b"b",
                b"Q",
                b"0",
                b"2",
                b"\x96" + b"\xff" * 7 + b"\x7f",
                b"X\xff\xff\xff\x7f",
            )
        )
        return data[:at] + word + data[at + random.choice((0, 1, 8)) :]
    if choice == 3:
        return data[:at] + bytes([random.choice(b"(.)]}tRbsuaehjqrKMJXcQ\x85\x86\x87\x88\x89N")]) + data[at + 1 :]
    return spoiled(random, data, [data])
