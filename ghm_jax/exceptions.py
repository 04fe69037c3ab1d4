"""Errors that the user can fix. Each message is one line.

A message has the form `key: problem; remedy`. In problem and remedy, a parameter of the function or
a setting that the user may want to change is put in backticks, `run_dir` or `data.on_error`, and
nothing else is: the command line shows it as its option, --run-dir or --data.on-error.
"""


class UserError(ValueError):
    """Something that the user can fix; raised before any compute starts if possible."""

    def __init__(self, key: str, problem: str, remedy: str = "") -> None:
        """
        Args:
            key: what is wrong: a setting, a parameter or a file; empty if there is none.
            problem: what is wrong with it.
            remedy: how to fix it.
        """
        super().__init__(key, problem, remedy)
        self.key, self.problem, self.remedy = key, problem, remedy

    def __str__(self) -> str:
        text = "; ".join(filter(None, (self.problem, self.remedy)))
        whole = ": ".join(filter(None, (self.key, text)))
        return " ".join(whole.splitlines())  # a path may have line breaks


class ConfigError(UserError):
    """A setting, a file or a directory that cannot be used. The key is its dotted name or path."""


class ArgumentError(UserError):
    """A wrong argument of a function that a command calls. The key is the parameter's name."""


class DataError(UserError):
    """Images or annotations that cannot be used. The key says which ones."""


class StoppedElsewhere(RuntimeError):  # noqa: N818 (it is what happened)
    """Another process of the job failed. The message is that process's, which also reports it."""
