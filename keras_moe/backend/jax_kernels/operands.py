"""Operands of a kernel, which Pallas hands over as one sequence."""


def split(sequence, *counts):
    """Consecutive parts of a sequence, of the lengths `counts`, and the rest."""
    parts = []
    for count in counts:
        parts.append(sequence[:count])
        sequence = sequence[count:]
    return *parts, sequence
