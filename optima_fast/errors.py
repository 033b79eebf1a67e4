"""The one exception that an entry point prints as a single line."""


class UserError(ValueError):
    """A mistake outside the program (a file, a flag, a data set) that one line can explain.

    The entry points print it and leave with exit code 2; library users can catch ``ValueError``.
    """
