"""python read_checkpoint.py FOLDER TENSOR [KIND]: one tensor, verified, by checkpoint_format.md."""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np

TABLE = list(range(256))
for _ in range(8):
    TABLE = [(row >> 1) ^ (0x82F63B78 if row & 1 else 0) for row in TABLE]


def crc32c(data: bytes) -> int:
    """CRC-32C of Castagnoli, bit-reflected; of b"123456789" it is 0xE3069283."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def read(folder: Path, name: str, kind: str = "param") -> np.ndarray:
    """The whole tensor; raises ValueError or OSError if a byte of it is missing or wrong."""
    data = (folder / "manifest.json").read_bytes()
    manifest = json.loads(data)
    if (manifest["format"], manifest["version"]) != ("ringworld-checkpoint", 3):
        raise ValueError(f"{manifest['format']} version {manifest['version']} is not known here")
    digest = manifest["sha256"]
    if hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() != digest:
        raise ValueError("the manifest's digest is wrong")
    shape, step = manifest["tensors"][name], manifest["chunk_bytes"]
    tensor, wanted = sorted(manifest["tensors"]).index(name), manifest["kinds"].index(kind)
    flat, found = np.zeros(math.prod(shape), "<f4"), 0
    for stored in manifest["objects"]:
        if "/" in stored["name"] or stored["name"].startswith("."):
            raise ValueError(f"{stored['name']} may lie outside of the folder")
        for row in stored["ranges"]:
            if row[:2] != [tensor, wanted]:
                continue
            start, numel, offset, length, dtype, checksums = row[2:]
            if manifest["dtypes"][dtype] != "float32" or length != numel * 4:
                raise ValueError(f"{stored['name']} holds values of an unknown type")
            with (folder / stored["name"]).open("rb") as file:
                file.seek(offset)
                raw = file.read(length)
            sums = [crc32c(raw[first : first + step]) for first in range(0, length, step)]
            if len(raw) != length or sums != checksums:
                raise ValueError(f"{stored['name']}: bytes {offset} to {offset + length} are wrong")
            flat[start : start + numel] = np.frombuffer(raw, "<f4")
            found += numel
    if found != flat.size:
        raise ValueError(f"{name} has {flat.size} elements, of which {found} are stored")
    return flat.reshape(shape)


if __name__ == "__main__":
    print(read(Path(sys.argv[1]), *sys.argv[2:]))
