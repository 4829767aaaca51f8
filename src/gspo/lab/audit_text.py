"""An audit as text: two small tables and a verdict."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table

from gspo.lab.audit_report import AuditReport, LengthBucket, Summary


def render(report: AuditReport) -> str:
    """The whole report, at most 120 columns wide."""
    console = Console(file=io.StringIO(), width=120, highlight=False, markup=False)
    total = report.total
    print_ = console.print
    print_(
        f"{report.model}, sampled in {report.rollout_dtype}, scored in float32, unchanged weights: "
        f"{total.sequences} sequences, {total.tokens} tokens",
        soft_wrap=True,
    )
    print_(_tokens(report))
    print_(_sequences(report))
    routing = report.routing_agreement
    if routing is not None:
        print_(f"routing agreement  {routing:.2%} of the experts' slots")
    low, high = report.epsilon_low, report.epsilon_high
    print_(f"clip range         [1 - {low:g}, 1 + {high:g}]")
    print_(f"noise allows       epsilon >= {total.epsilon_needed:.2g} (clips 5 % of the sequences)")
    print_(f"verdict            {report.advice}", soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _tokens(report: AuditReport) -> Table:
    table = _table("d_t = log pi - log mu of the sampled tokens")
    for name in ("length", "tokens", *_SUMMARY, "KL", "KL (k3)"):
        table.add_column(name, justify="right")
    for label, bucket in _rows(report):
        kl = (_number(bucket.kl), _number(bucket.kl_k3))
        table.add_row(label, str(bucket.tokens), *_cells(bucket.token_log_ratio), *kl)
    return table


def _sequences(report: AuditReport) -> Table:
    table = _table("l_i = mean of d_t over a sequence; shares that noise alone would clip")
    for name in ("length", "sequences", *_SUMMARY, "clip A>0", "clip A<0"):
        table.add_column(name, justify="right")
    for label, bucket in _rows(report):
        clipped = (f"{bucket.clipped_positive:.1%}", f"{bucket.clipped_negative:.1%}")
        table.add_row(label, str(bucket.sequences), *_cells(bucket.sequence_log_ratio), *clipped)
    return table


_SUMMARY = ("mean", "spread", "p01", "p50", "p99")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="")


def _rows(report: AuditReport) -> list[tuple[str, LengthBucket]]:
    rows = [(f"{b.longer_than + 1}..{b.up_to}", b) for b in report.buckets]
    return [*rows, ("all", report.total)] if len(rows) > 1 else rows


def _cells(values: Summary) -> list[str]:
    return [_number(x) for x in (values.mean, values.std, values.p01, values.p50, values.p99)]


def _number(value: float) -> str:
    return f"{value:.2g}"
