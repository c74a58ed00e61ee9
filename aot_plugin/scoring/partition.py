"""Cuts of sequences into micro-batches and of prompts into rows."""

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heapreplace

Block = tuple[int, list[int]]
"""Tokens of a row of the model's input, and the numbers of the sequences that it holds."""


def split_by_tokens(blocks: Sequence[Block], parts: int) -> list[list[int]]:
    """Cut blocks, ordered from long to short, into ``parts`` runs that hold at least one each.

    A run costs its padded tokens: its number of blocks times the tokens of its longest. The cost of
    the most expensive run, which sets the peak of memory, is minimal: few long rows share a batch,
    many short ones another. The most expensive runs come first, so that each batch fits into the
    memory that the one before it has freed.
    """

    def runs(limit: int) -> list[list[Block]]:
        """Greedy from the left: as many blocks as the limit allows, and one for each other run."""
        found: list[list[Block]] = []
        start = 0
        for waiting in reversed(range(parts)):
            fits = limit // max(blocks[start][0], 1) if waiting else len(blocks)
            end = min(start + max(fits, 1), len(blocks) - waiting)
            found.append(list(blocks[start:end]))
            start = end
        return found

    def cost(run: list[Block]) -> int:
        return len(run) * run[0][0]

    most = len(blocks) * blocks[0][0]
    limit = bisect_left(range(most), True, key=lambda limit: max(map(cost, runs(limit))) <= limit)
    return [[row for _, rows in run for row in rows] for run in sorted(runs(limit), key=cost)[::-1]]


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``parts`` groups of about equal sums, the largest sum first.

    In descending order, each size goes to the group with the smallest sum so far (LPT scheduling,
    Graham 1969: the largest sum is at most 4/3 of the optimum). No group is empty if there are
    enough sizes.
    """
    groups: list[tuple[int, int, list[int]]] = [(0, 0, []) for _ in range(parts)]
    heapify(groups)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        total, count, members = groups[0]
        heapreplace(groups, (total + sizes[index], count + 1, [*members, index]))
    return [members for _, _, members in sorted(groups, reverse=True)]


def doubled(most: int) -> list[int]:
    """2, 4, 8, ... up to the first number that is not below ``most``; none if that is 1."""
    return [2**power for power in range(1, (most - 1).bit_length() + 1)]
