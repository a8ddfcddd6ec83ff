"""Directed graphs on expert numbers 0..N-1, as (teacher, student) pairs: pure functions, no self-edges, no edge twice.

``expander`` is the digraph of Imase and Itoh (1983, "A design for directed graphs with minimum diameter"; the
generalised Kautz digraph): i teaches (-d i - a) mod N for a = 1..d. The d N numbers d i + a tile 0..N-1 exactly
d times, so every expert has d teachers and d students, for any N, and its diameter is at most ceil(log_d N),
the least that any family reaches within one. It needs no search and no seed. Circulant graphs are as simple,
but with d offsets their diameter grows as N^(1/d); random permutations reach log N only in expectation.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from copd_megatron.parallel.seeding import permutation, stable_hash

Arrows = list[tuple[int, int]]
Gaps = Mapping[tuple[int, int], float]
"""(a, b) with a < b -> behaviour gap of the two, >= 0; absent where it was not measured."""


def hub(count: int, centre: int) -> Arrows:
    """The centre exchanges with every spoke, spokes not with each other (the paper; text is its centre)."""
    spokes = [e for e in range(count) if e != centre]
    return [(centre, s) for s in spokes] + [(s, centre) for s in spokes]


def full(count: int) -> Arrows:
    """Everyone teaches everyone."""
    return [(t, s) for s in range(count) for t in range(count) if t != s]


def ring(count: int) -> Arrows:
    """Each expert teaches the next one."""
    return [((i - 1) % count, i) for i in range(count) if count > 1]


def expander(count: int, degree: int) -> Arrows:
    """min(degree, N - 1) teachers and as many students each; any two experts are at most ceil(log_d N) + 1 apart.

    Where d + 1 does not divide N the construction has up to d self-edges. Each is swapped with another edge
    (i -> i and u -> v become u -> i and i -> v), which keeps the degrees and lengthens a path by 1.

    Args:
        degree: d, 2 or more (the connected digraph of degree 1 is the ring).
    """
    degree = min(degree, count - 1)
    students = [[(-degree * i - a) % count for a in range(1, degree + 1)] for i in range(count)]
    for i in range(count):
        if i in students[i]:
            u, v = next((u, v) for k in range(1, count) if i not in students[u := (i + k) % count]
                        for v in students[u] if v != i and v not in students[i])
            students[u][students[u].index(v)] = i
            students[i][students[i].index(i)] = v
    return [(teacher, student) for teacher, own in enumerate(students) for student in own]


def gossip(count: int, seed: int, opd_step: int) -> Arrows:
    """Random pairs teach each other, drawn anew in every OPD step from (seed, opd_step).

    A matching: every expert has one partner, but for one expert where N is odd.
    """
    order = permutation(seed, count, stable_hash("gossip"), opd_step).tolist()
    pairs = list(zip(order[::2], order[1::2]))
    return [arrow for a, b in pairs for arrow in ((a, b), (b, a))]


def adaptive(count: int, degree: int, gaps: Gaps, cap: float) -> Arrows:
    """Each student's ``degree`` teachers of largest gap among those at most ``cap`` away.

    Who is near has nothing to teach, who is too far is not understood. A student with nobody within the cap
    takes the nearest, so that nobody drifts away alone; one whose gaps are unknown has its teachers of
    ``expander`` (``ring`` for degree 1). Of equal gaps the lower number wins.
    """
    fallback = expander(count, degree) if degree > 1 else ring(count)
    arrows: Arrows = []
    for student in range(count):
        known = {t: gaps[pair] for t in range(count) if (pair := (min(t, student), max(t, student))) in gaps}
        useful = sorted((t for t in known if known[t] <= cap), key=lambda t: (-known[t], t))[:degree]
        if not known:
            useful = [t for t, s in fallback if s == student]
        elif not useful:
            useful = [min(known, key=lambda t: (known[t], t))]
        arrows += [(t, student) for t in useful]
    return arrows


def distance(count: int, arrows: Sequence[tuple[int, int]]) -> int | None:
    """The diameter: most hops from any expert to any other; None if some cannot be reached."""
    students: list[list[int]] = [[] for _ in range(count)]
    for teacher, student in arrows:
        students[teacher].append(student)
    longest = 0
    for start in range(count):
        reached, edge, hops = {start}, {start}, 0
        while edge := {s for t in edge for s in students[t]} - reached:
            reached |= edge
            hops += 1
        if len(reached) < count:
            return None
        longest = max(longest, hops)
    return longest
