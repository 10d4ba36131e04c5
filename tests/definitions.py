"""Algorithms as their papers write them down: short, slow, and nothing shared with the package."""

import math
from fractions import Fraction


def hyperband_brackets(epochs, factor):
    """n and r_0, r_1, ... of the brackets of algorithm 1 in Li et al. 2018, as they stand there, epochs
    rounded down."""
    s_max = max(s for s in range(100) if factor**s <= epochs)  # floor(log_eta(R)), without rounding errors
    budget = (s_max + 1) * epochs
    for s in range(s_max, -1, -1):
        n = math.ceil(Fraction(budget, epochs) * Fraction(factor**s, s + 1))
        r = Fraction(epochs, factor**s)
        yield n, [math.floor(r * factor**i) for i in range(s + 1)]


def hyperband(trials, value, fails=(), epochs=9, factor=3):
    """State and last epoch of each trial. `fails`: the epoch that a trial can't do. In the last bracket are
    what trials there are, and at least one trial goes on."""
    ends, fails, numbers = {}, dict(fails), list(range(trials))
    while numbers:
        for n, rungs in hyperband_brackets(epochs, factor):
            left, numbers = numbers[:n], numbers[n:]
            n = len(left)
            for i, rung in enumerate(rungs):
                for number in list(left):
                    if fails.get(number, math.inf) <= rung:
                        ends[number] = ("failed", fails[number] - 1)
                        left.remove(number)
                ranked = sorted(left, key=lambda number: (-value(number, rung), number))
                left = ranked if rung == epochs else ranked[: max(1, n // factor ** (i + 1))]
                state = "completed" if rung == epochs else "pruned"
                ends |= {number: (state, rung) for number in ranked if rung == epochs or number not in left}
    return ends
