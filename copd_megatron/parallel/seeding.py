"""Noise that depends on what it is for, never on which rank draws it or in which order.

Counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the number is a hash of its
key, (seed, expert, step, prompt, sample, position) for sampling. The hash absorbs one word after the other
through the finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants by Stafford, variant 13):

    h <- mix(seed + G);   for each word: h <- mix((C h xor mix(word + G)) + G)
    uniform = (floor(h / 2^12) + 1/2) / 2^52

`mix` and the product with the odd constant C are bijections of 64 bits, so keys that differ in one word never
collide; C keeps a word from cancelling an equal one before it. Not for cryptography.
"""
from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import ArrayLike

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CHAIN = np.uint64(0xD1342543DE82EF95)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
WORD_MASK = (1 << 64) - 1


def uniform(seed: int, *keys: ArrayLike) -> np.ndarray:
    """Uniform numbers in the open interval (0, 1), one per key.

    Args:
        seed: any integer, taken modulo 2^64.
        keys: integers or integer arrays that broadcast against each other; their order matters.

    Returns:
        float64 of the broadcast shape (0-dimensional if all keys are integers), with 52 random bits each:
        the largest of 53 bits would round to 1.0.
    """
    return _unit(bits(seed, *keys))


def bits(seed: int, *keys: ArrayLike) -> np.ndarray:
    """64 random bits per key as uint64; keys as in `uniform`."""
    with np.errstate(over="ignore"):
        state = _mix(_words(seed) + GOLDEN)
        for key in keys:
            state = _mix((state * CHAIN ^ _mix(_words(key) + GOLDEN)) + GOLDEN)
    return np.asarray(state)


def permutation(seed: int, count: int, *keys: int) -> np.ndarray:
    """A random order of 0..count-1, [count] int64, for shuffling data."""
    return np.argsort(bits(seed, *keys, np.arange(count)), kind="stable")


def stable_hash(text: str) -> int:
    """A hash in 0..2^63-1 that is the same in every process and on every machine, unlike ``hash``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for what is named, e.g. ``generator_for(seed, "text", "layers.0.mlp.up_proj", "A")``.

    Draw the full tensor from it and slice, so that a shard does not depend on the layout.
    """
    words = [stable_hash(name) if isinstance(name, str) else name for name in names]
    return torch.Generator().manual_seed(int(bits(seed, *words)) >> 1)


def _unit(word: np.ndarray) -> np.ndarray:
    """uint64 to the middle of one of 2^52 equal parts of (0, 1); every value is exact in float64."""
    return ((word >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _words(key: ArrayLike) -> np.ndarray:
    """Integers of any signed or unsigned dtype as uint64, modulo 2^64; TypeError for anything else."""
    if isinstance(key, int):
        return np.uint64(key & WORD_MASK)
    array = np.asarray(key)
    if array.dtype.kind not in "iu":
        raise TypeError(f"keys must be integers, not {array.dtype}")
    return array.astype(np.uint64)


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint64(30))) * MIX_1
    word = (word ^ (word >> np.uint64(27))) * MIX_2
    return word ^ (word >> np.uint64(31))
