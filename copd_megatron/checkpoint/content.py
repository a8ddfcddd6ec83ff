"""What a backbone is: a hash of its weights and configuration, the same however its files are cut.

    h(backbone) = SHA-256(config, sum over tensors of SHA-256(name, dtype, shape, bytes) mod 2^256)

A sum has no order, so every rank hashes some of the files (streamed) and a backbone that was downloaded in
other pieces is the same backbone. Sums of large files are kept in a cache under (path, size, modification
time), so that a restart reads no weights.
"""
from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed import ProcessGroup

from copd_megatron.model.hf_config import read_json
from copd_megatron.model.safetensor_reader import TensorEntry, check_files
from copd_megatron.parallel.collectives import all_gather_objects, broadcast_object
from copd_megatron.types import UserError

log = logging.getLogger(__name__)
WEIGHTLESS_KEYS = ("transformers_version", "_name_or_path", "_commit_hash")
"""Entries of config.json that say who wrote the file, not what the model computes."""

CACHED_BYTES = 64 << 20
"""Files below this size are hashed faster than a cache is kept tidy."""

_BLOCK_BYTES = 8 << 20
_MODULUS = 1 << 256


def backbone_hash(path: str | Path, world: ProcessGroup | None, cache: Path | None = None) -> str:
    """Hex name of the backbone in directory ``path``, the same on every rank. Every rank calls it.

    Args:
        world: the ranks that share the reading; None: this process alone.
        cache: file of known sums; None takes ``~/.cache/copd_megatron/weights.json``. One that cannot be
            read or written costs time only.

    Raises:
        UserError: on every rank, if weights or config.json are missing, broken or unreadable.
    """
    path, rank, ranks = Path(path), world.rank() if world else 0, world.size() if world else 1
    by_file = _tensors_by_file(path)
    cache = cache or _default_cache()
    known = _known(cache, by_file) if rank == 0 else None
    known = broadcast_object(known, 0, world) if world else known
    missing = [file for file in by_file if file not in known]
    if rank == 0 and sum(file.stat().st_size for file in missing) >= CACHED_BYTES:
        log.info("hashing %d weight files of %s (once; they are remembered)", len(missing), path)
    mine, problem = {}, None
    try:
        mine = {file: _file_sum(file, by_file[file]) for file in missing[rank::ranks]}
    except OSError as error:
        problem = UserError(f"model.path: {path}: a weight file cannot be read ({error}); all must be readable "
                            "on every rank; check the disk and permissions")
    for part, failure in all_gather_objects((mine, problem), world) if world else [(mine, problem)]:
        if failure is not None:
            raise failure
        known |= part
    if rank == 0 and missing:
        _remember(cache, by_file, known)
    config = {key: value for key, value in read_json(path / "config.json").items() if key not in WEIGHTLESS_KEYS}
    total = sum(known[file] for file in by_file) % _MODULUS
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + total.to_bytes(32)).hexdigest()


def _tensors_by_file(path: Path) -> dict[Path, dict[str, TensorEntry]]:
    """Every weight file with its tensors, in an order that all ranks share."""
    by_file: dict[Path, dict[str, TensorEntry]] = {}
    for name, entry in sorted(check_files(path).items()):
        by_file.setdefault(entry.file, {})[name] = entry
    return dict(sorted(by_file.items()))


def _file_sum(file: Path, tensors: Mapping[str, TensorEntry]) -> int:
    """Sum of the hashes of a file's tensors, read once from front to back."""
    total, buffer = 0, memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        data = 8 + struct.unpack("<Q", stream.read(8))[0]
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
            digest = hashlib.sha256(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
            stream.seek(data + entry.begin)
            left = entry.end - entry.begin
            while left:
                count = stream.readinto(buffer[:min(left, _BLOCK_BYTES)])
                if not count:
                    raise OSError(f"{file} ends too early")
                digest.update(buffer[:count])
                left -= count
            total = (total + int.from_bytes(digest.digest())) % _MODULUS
    return total


def _default_cache() -> Path | None:
    try:
        return Path.home() / ".cache/copd_megatron/weights.json"
    except RuntimeError:  # no home directory
        return None


def _stamp(file: Path, tensors: Sequence[str] | Mapping[str, TensorEntry]) -> list:
    """What must be unchanged for a remembered sum to hold."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, hashlib.sha256("\0".join(sorted(tensors)).encode()).hexdigest()]


def _read_cache(cache: Path | None) -> dict[str, list]:
    """Path -> [stamp, hex sum]; empty if there is no readable cache."""
    try:
        entries = json.loads(cache.read_text()) if cache else {}
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _known(cache: Path | None, by_file: Mapping[Path, Mapping[str, TensorEntry]]) -> dict[Path, int]:
    """Sums of the files that have not changed since they were hashed."""
    entries, known = _read_cache(cache), {}
    for file, tensors in by_file.items():
        entry = entries.get(str(file.resolve()))
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == _stamp(file, tensors):
            known[file] = int(entry[1], 16)
    return known


def _remember(cache: Path | None, by_file: Mapping[Path, Mapping[str, TensorEntry]],
              known: Mapping[Path, int]) -> None:
    """Add the sums of large files to the cache; forget files that are gone."""
    entries = {str(file.resolve()): [_stamp(file, tensors), f"{known[file]:064x}"]
               for file, tensors in by_file.items() if file.stat().st_size >= CACHED_BYTES}
    if not cache or not entries:
        return
    entries = {path: entry for path, entry in _read_cache(cache).items() if Path(path).exists()} | entries
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".tmp")
        partial.write_text(json.dumps(entries))
        partial.rename(cache)
    except OSError as error:
        log.warning("%s cannot be written (%s); weights are hashed again at the next start", cache, error)
