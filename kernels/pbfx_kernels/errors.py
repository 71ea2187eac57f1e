"""The one error that a caller of this package can cause."""

from collections.abc import Sequence


class ArgumentError(ValueError):
    """Say which arguments of an operation do not fit together, all faults at once.

    Args:
        where: the operation that was called, such as `pbfx::dendrites`.
        faults: one sentence each, naming the argument, what was expected and what was got.
    """

    def __init__(self, where: str, faults: Sequence[str]) -> None:
        self.where = where
        self.faults = tuple(faults)
        super().__init__(f"{where}: " + "; ".join(self.faults))

    def __reduce__(self) -> tuple[type["ArgumentError"], tuple[str, tuple[str, ...]]]:
        # Exception.__reduce__ would rebuild from the joined message; worker processes pickle
        # errors.
        return type(self), (self.where, self.faults)
