"""What `dfpir audit` prints, without the libraries of networks, which take seconds to import."""

from collections import Counter

from rich.console import Console

from jobs.audit import Audit
from jobs.table import add, two_columns
from jobs.text import counted, harmless, several


def audited(console: Console, found: Audit) -> None:
    """What an audit looked at, then what does not hold, by kind and for the first of them one by one."""
    table = two_columns()
    add(table, "run", f"{found.run_id[:12]}, configuration {found.config_digest[:12]}")
    add(table, "rows", f"{found.rows} of {found.planned} planned images, {found.superseded} of earlier revisions")
    add(table, "status", counted(found.counts) or "none")
    add(table, "labels", counted(found.labels) or "none")
    add(table, "to review", f"{found.suspicious} suspicious, {found.with_warnings} with warnings")
    how = "read and hashed" if found.contents_read else "sizes compared"
    add(table, "results", f"{several(found.outputs, 'file')}, {found.output_bytes / 1e6:.1f} MB, {how}")
    add(table, "inputs", "not looked at" if found.sources is None else f"{several(found.sources, 'file')}, {how}")
    for name, values in found.made_by.items():
        short = [value[:12] if name.endswith("sha256") else value for value in values]
        add(table, name.replace("_", " "), ", ".join(short) or "none")
    console.print(table)
    if not found.findings:
        console.print("everything holds")
        return
    kinds = Counter[str](finding.kind for finding in found.findings)
    console.print(f"does not hold: {counted(kinds)}")
    for finding in found.findings[:20]:
        console.print(harmless(f"{finding.kind}: {finding.subject}: {finding.message}"), markup=False, soft_wrap=True)
    if len(found.findings) > 20:
        console.print(f"and {len(found.findings) - 20} more: --json has all")
