"""placeholder, being written"""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what and where."""
