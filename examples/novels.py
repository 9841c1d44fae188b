"""Fetch six novels of Jane Austen for jobs/demo.yaml, as plain text.

    python examples/novels.py                   # needs apt-get: Debian or Ubuntu
    python examples/novels.py --package FILE    # r-cran-janeaustenr, downloaded elsewhere

They come from Debian's r-cran-janeaustenr (public-domain texts, packaged under the MIT licence) and
go to data/novels/. R is not needed: its data file is a row of zlib records, each one character
vector with a line of text an entry.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
NOVELS = Path(__file__).parents[1] / "data" / "novels"
_STRINGS, _STRING = 16, 9
"""Type numbers in R's serialization: a character vector, and one of its entries."""


def main() -> None:
    """Fetch the package, take the novels out, write one file each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, help=f"a downloaded {PACKAGE} .deb")
    parser.add_argument("--out", type=Path, default=NOVELS, help="folder to write to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        package = arguments.package or _download(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
        content = (unpacked / DATA).read_bytes()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for lines in vectors(content):
        title = next(line for line in lines if line).lower().replace(" ", "-")
        target = arguments.out / f"{title}.txt"
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{target}  {target.stat().st_size:,} bytes")


def _download(folder: Path) -> Path:
    if shutil.which("apt-get") is None:
        sys.exit(f"apt-get is not here; download {PACKAGE} elsewhere and pass it with --package")
    subprocess.run(["apt-get", "-q", "download", PACKAGE], cwd=folder, check=True)
    return next(folder.glob("*.deb"))


def vectors(content: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load data file.

    Args:
        content: records of a length (4 bytes, big endian) and a zlib stream that unpacks to it.

    Raises:
        ValueError: a record is something else.
    """
    while content:
        stream = zlib.decompressobj()
        record = stream.decompress(content[4:])
        content = stream.unused_data
        (version,) = struct.unpack(">I", record[2:6])
        at = 14
        if version == 3:  # the name of the encoding follows
            at += 4 + struct.unpack(">I", record[at : at + 4])[0]
        flags, length = struct.unpack(">II", record[at : at + 8])
        if record[:2] != b"X\n" or flags & 0xFF != _STRINGS:
            raise ValueError("the record is no character vector in R's XDR serialization")
        yield _strings(record[at + 8 :], length)


def _strings(content: bytes, number: int) -> list[str]:
    found, at = [], 0
    for _ in range(number):
        flags, length = struct.unpack(">Ii", content[at : at + 8])
        if flags & 0xFF != _STRING:
            raise ValueError("an entry of the vector is no string")
        at += 8
        found.append(content[at : at + max(0, length)].decode())
        at += max(0, length)
    return found


if __name__ == "__main__":
    main()
