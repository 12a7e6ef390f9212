"""How the lines of a verdict begin, and which of them do not hold."""


def outcomes(lines):
    """Of each line "yes", "NO" or "NO, undecided"."""
    return [line.split(":")[0] for line in lines]


def not_held(lines):
    """{place: "NO" or "NO, undecided"} of the lines that do not begin with yes."""
    found = {}
    for place, outcome in enumerate(outcomes(lines)):
        if outcome != "yes":
            found[place] = outcome
    return found


NO, UNDECIDED = "NO", "NO, undecided"
