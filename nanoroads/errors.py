"""The one exception that this project raises for what its user gave."""


class InputError(ValueError):
    """Something the user gave is wrong: a flag, a file, a row. The message is one line that says what,
    where and what to do.

    `run.flags.run_script` prints it and exits with code 2; every other exception is a bug and keeps its
    traceback."""
