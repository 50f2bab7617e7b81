"""The parts of Xet's storage service that hf_xet needs: it stores xorbs and shards and assembles files from them.

Formats and requests follow https://huggingface.co/docs/xet. Chunks must be uncompressed: the client is started with
``HF_XET_DATA_XORB_COMPRESSION_POLICY=none``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

TOKEN = "xet_never_to_be_seen"

_ENTRY = 48
_END = b"\xff" * 32
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30


def hash_name(raw: bytes) -> str:
    """Format of a hash in paths: four little-endian integers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


@dataclasses.dataclass
class Storage:
    """Uploaded data: serialized xorbs, and for each file its chunks (xorb, first, last + 1)."""

    xorbs: dict[str, bytes] = dataclasses.field(default_factory=dict)
    files: dict[str, list[tuple[str, int, int]]] = dataclasses.field(default_factory=dict)
    by_sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def chunks(self, xorb: str) -> list[tuple[int, int]]:
        """Start and end of each chunk in a xorb, including the eight-byte header."""
        content, position, found = self.xorbs[xorb], 0, []
        while position < len(content):
            version, scheme = content[position], content[position + 4]
            size = int.from_bytes(content[position + 1 : position + 4], "little")
            if (version, scheme) != (0, 0):
                raise ValueError(f"chunk of version {version}, compressed by scheme {scheme}")
            found.append((position, position + 8 + size))
            position += 8 + size
        return found

    def content(self, file: str) -> bytes:
        parts = []
        for xorb, first, end in self.files[file]:
            parts += [self.xorbs[xorb][start + 8 : stop] for start, stop in self.chunks(xorb)[first:end]]
        return b"".join(parts)

    def add_shard(self, shard: bytes) -> list[bytes]:
        """Register a shard's files and return their contents; raise ValueError if one does not match its SHA-256."""
        entries = (shard[at : at + _ENTRY] for at in range(_ENTRY, len(shard), _ENTRY))
        contents = []
        while (header := next(entries))[:32] != _END:
            flags, count = struct.unpack("<2I", header[32:40])
            terms = [next(entries) for _ in range(count)]
            for _ in range(count if flags & _VERIFIED else 0):
                next(entries)
            name = hash_name(header[:32])
            self.files[name] = [(hash_name(term[:32]), *struct.unpack("<2I", term[40:48])) for term in terms]
            if not flags & _WITH_SHA256:
                raise ValueError("a file without SHA-256")
            contents.append(self.content(name))
            # The hash is also stored as four little-endian integers.
            sha256 = hash_name(next(entries)[:32])
            if hashlib.sha256(contents[-1]).hexdigest() != sha256:
                raise ValueError("a file whose content is not what its SHA-256 says")
            self.by_sha256[sha256] = name
        return contents

    def reconstruction(self, file: str, address: str) -> dict[str, Any]:
        """Instructions to assemble a file: its terms, and the URLs and ranges of their bytes."""
        terms, fetch = [], {}
        for xorb, first, end in self.files[file]:
            places = self.chunks(xorb)
            size = sum(stop - start - 8 for start, stop in places[first:end])
            terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": first, "end": end}})
            fetch[xorb] = [
                {
                    "range": {"start": 0, "end": len(places)},
                    "url": f"{address}/xorb/{xorb}?X-Amz-Signature=secret",
                    "url_range": {"start": 0, "end": places[-1][1] - 1},
                }
            ]
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": fetch}
