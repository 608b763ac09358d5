"""Names and values in two columns."""

from rich.table import Table
from rich.text import Text

from jobs.text import harmless


def two_columns() -> Table:
    """For `add`."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def add(table: Table, name: str, value: str) -> None:
    """A row whose value may come from files: it shows as it is, brackets and control characters included."""
    table.add_row(name, Text(harmless(value)))
