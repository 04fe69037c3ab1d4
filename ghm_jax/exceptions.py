"""What can go wrong that the person who started it can fix. Each message is one line.

A message has the form `key: problem; remedy`. In problem and remedy a parameter of the function or
a setting that is meant to be typed stands in backticks, `run_dir` or `data.on_error`: the command
line shows it as the option that it is there, --run-dir or --data.on-error.
"""


class UserError(ValueError):
    """Something that a person can fix; raised before any compute starts where that is possible."""

    def __init__(self, key: str, problem: str = "", remedy: str = "") -> None:
        """
        Args:
            key: the thing that is wrong: a setting, a parameter, a file; empty where there is none.
            problem: what is wrong with it.
            remedy: what to do about it.
        """
        super().__init__(key, problem, remedy)
        self.key, self.problem, self.remedy = key, problem, remedy

    def __str__(self) -> str:
        said = "; ".join(filter(None, (self.problem, self.remedy)))
        return ": ".join(filter(None, (self.key, said)))


class ConfigError(UserError):
    """A setting, a file or a place that cannot work. The key is its dotted name or its path."""


class ArgumentError(UserError):
    """An argument of a function that a command calls. The key is the name of the parameter."""


class DataError(UserError):
    """Images or annotations that cannot be used. The key says which ones."""


class StoppedElsewhere(RuntimeError):  # noqa: N818 (it is what happened)
    """Another process of the job cannot go on. The message is what it says, which is enough."""
