"""What can go wrong that a person can do something about. Each message is one line."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the key, what it is, the remedy."""


class StoppedElsewhere(ConfigError):  # noqa: N818 (it is what happened)
    """Another process of the job cannot go on. The message is what it says, which is enough."""
