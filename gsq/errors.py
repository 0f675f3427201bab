"""Errors meant for users: what is wrong, where, and what to do. The command line prints them and exits with 2."""


class UserError(Exception):
    """Something the user can mend: a config key, a file, a full disk."""
