"""Files of all kinds to train on: any bytes, and what belongs there with changes."""

import gzip
import io
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

TEXT = "".join(f"On day {i} the cat sat on mat {i * i}, 猫.\n" for i in range(60)).encode()
ROWS = b"".join(json.dumps({"text": f"row {i} has {i * i}"}).encode() + b"\n" for i in range(60))
TABLE = pa.table({"text": [f"row {i} has {i * i} words" for i in range(60)]})


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(TABLE, out)
    return out.getvalue()


def arrow() -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return out.getvalue()


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(500, dtype=np.uint16) % 256)
    return out.getvalue()


WHOLE = {
    "txt": TEXT,
    "md": TEXT,
    "jsonl": ROWS,
    "json": json.dumps([{"text": f"row {i}"} for i in range(60)]).encode(),
    "csv": b"text,n\n" + b"".join(b'"row %d, so",%d\n' % (i, i) for i in range(60)),
    "tsv": b"text\tn\n" + b"".join(b"row %d\t%d\n" % (i, i) for i in range(60)),
    "txt.gz": gzip.compress(TEXT),
    "jsonl.gz": gzip.compress(ROWS),
    "txt.xz": lzma.compress(TEXT),
    "jsonl.zst": b"\x28\xb5\x2f\xfd" + TEXT[:50],
    "parquet": parquet(),
    "arrow": arrow(),
    "npy": npy(),
    "bin": (np.arange(500, dtype=np.uint16) % 256).tobytes(),
    "": TEXT,
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The ending of a name, and a content: any, or what belongs there with some bytes changed."""
    ending = draw(st.sampled_from(sorted(WHOLE)))
    if draw(st.integers(0, 3)) == 0:
        return ending, draw(st.binary(max_size=400))
    data = bytearray(
        WHOLE[draw(st.sampled_from(sorted(WHOLE)))]
        if draw(st.integers(0, 9)) == 0
        else WHOLE[ending]
    )
    for _ in range(draw(st.integers(0, 5))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["flip", "insert", "cut", "truncate", "double"]))
        if how == "flip" and data:
            data[place] ^= draw(st.integers(1, 255))
        elif how == "insert":
            data[place:place] = draw(st.binary(max_size=9))
        elif how == "cut":
            del data[place : place + draw(st.integers(1, 60))]
        elif how == "truncate":
            del data[place:]
        else:
            data += data[place:]
    return ending, bytes(data)


@st.composite
def deep(draw: st.DrawFn) -> tuple[str, bytes]:
    """JSON that is nested far, has huge numbers or keys, or texts of all kinds of characters."""
    depth = draw(st.sampled_from([3, 200, 990, 20_000]))
    odd = [
        b"[" * depth + b"]" * depth,
        b'{"text":' * depth + b'"a"' + b"}" * depth,
        b"[" * depth,
        b"9" * depth,
        b'{"text": ' + b"9" * depth + b"}",
        b'{"text": 1e' + b"9" * min(depth, 400) + b"}",
        b'{"text": "' + rb"\ud800" * depth + b'"}',
        b'{"text": "' + b"\xff" * depth + b'"}',
        b'{"text": null}',
        b'{"text": ["a", {"b": NaN}]}',
        b'{"te\\u0000xt": "a"}',
        b"\x00" * depth,
        json.dumps({"text": draw(st.text(max_size=200))}).encode("utf-8", "surrogatepass"),
        json.dumps({"text": "a" * depth}).encode(),
    ]
    rows = draw(st.lists(st.sampled_from(odd), min_size=1, max_size=4))
    before = draw(st.sampled_from([b"", ROWS[:700], b"\xef\xbb\xbf", b"["]))
    separator = draw(st.sampled_from([b"\n", b",", b"\r\n", b""]))
    return draw(st.sampled_from(["jsonl", "json", "jsonl.gz", "txt"])), before + separator.join(
        rows
    )
