"""Files that one rank writes: what the operating system refuses there is raised on every rank.

Raised on that rank alone, it would leave the others waiting in their next collective until it times out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tulu_hpc.parallel.layout import Groups


class WriteError(RuntimeError):
    """Some rank could not write a file; says which rank, what and why."""


class WriteFailures:
    """Keeps the first refusal of this rank until `check` tells everybody; writing goes on meanwhile.

    For writes in a loop that has no collective to spare in every turn.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._first: Exception | None = None

    @contextmanager
    def writing(self, what: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Keep an OSError of the block, or one of `also`. No collective may be called inside."""
        try:
            yield
        except OSError as error:
            self._first = self._first or WriteError(f"{what} cannot be written: {error} (rank {self._groups.rank})")
        except also as error:
            self._first = self._first or error

    def check(self) -> None:
        """Collective.

        Raises:
            WriteError: on every rank, the first refusal of the lowest rank that had one; or what of `also` it was.
        """
        for failure in self._groups.all_gather_object(self._first):
            if failure is not None:
                raise failure


@contextmanager
def shared_writing(groups: Groups, what: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """A block in which some ranks write `what`; every rank enters it. Collective at its end, and nowhere inside.

    Raises:
        WriteError: on every rank, if the operating system refused on one; what of `also` was raised likewise.
    """
    failures = WriteFailures(groups)
    with failures.writing(what, also):
        yield
    failures.check()
