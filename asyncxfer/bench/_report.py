"""Tables for people and JSON for programs, from the results of a run.

Tables are plain aligned text, or rich's where it is installed and the output is a terminal. It
measures nothing and starts nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._compare import OURS, Line, Measured
from ._file_cases import FileCase
from ._idle import Idle
from ._loop import Flood, Stall
from ._notify import Notified
from ._object_cases import ObjectCase
from ._post import Posted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._shapes import Case

__all__ = [
    "Table",
    "file_table",
    "flood_table",
    "idle_table",
    "line_table",
    "machine",
    "network_table",
    "notify_table",
    "object_table",
    "post_table",
    "show",
    "stall_table",
    "to_plain",
    "ucx_table",
]

#: Below this many bytes a transfer is told by its time, not by its throughput.
_SMALL = 256 << 10


@dataclass(frozen=True, slots=True)
class Table:
    """Headers and rows of text, and a line below them."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def line_table(lines: Sequence[Line]) -> Table:
    """Ours beside NIXL, one row a case."""
    headers = ["shape", "op", "memory", "backend", "ours", "NIXL", "x NIXL", "CPU s/GiB"]
    headers += ["NIXL CPU", "loop late", "bytes"]
    rows = []
    for line in lines:
        theirs = line.nixl
        assert not isinstance(line.case, FileCase | ObjectCase)
        cells = [*_case(line.case), line.ours.samples[-1].backend, _speed(line.ours)]
        cells += [_speed(theirs) if theirs else "-", f"{line.ratio:.2f}" if line.ratio else "-"]
        cells += [f"{line.ours.cpu_seconds_per_gib:.3f}"]
        cells += [f"{theirs.cpu_seconds_per_gib:.3f}" if theirs else "-"]
        cells += [_ms(line.lateness["max"]), _verdict(*_problems(line))]
        rows.append(cells)
    note = (
        "Medians. x NIXL: how many times as fast, median over neighbouring rounds. CPU: both "
        "processes.\nLoop late: latest tick of a 1 ms ticker while ours is repeated, untimed."
    )
    return Table(headers, rows, note)


def network_table(lines: Sequence[Line]) -> Table:
    """Every system that ran, one row a case and system."""
    headers = ["shape", "op", "system", "by", "speed", "ours is x", "CPU s/GiB", "initiator", "target", "loop late"]
    rows = []
    for line in lines:
        for name, system in {OURS: line.ours, **line.rivals}.items():
            both, target = system.cpu_seconds_per_gib, system.target_cpu_seconds_per_gib
            own = system is line.ours
            cells = [str(line.case.shape), line.case.action, name, system.samples[-1].backend, _speed(system)]
            cells += ["" if own else f"{line.ratio_to(system):.2f}", f"{both:.3f}", f"{both - target:.3f}"]
            rows.append([*cells, f"{target:.3f}", _ms(line.lateness["max"]) if own else "", _verdict(system.problem)])
    note = (
        "Medians. Ours is x: how many times as fast, median over neighbouring rounds. Behind socket and iperf3: how "
        "many\nstreams; nobody looks at the bytes of iperf3, and it never encrypts. Loop late: latest tick of a 1 ms "
        "ticker while\nours is repeated, untimed."
    )
    return Table([*headers, "bytes"], rows, note)


def ucx_table(lines: Sequence[Line]) -> Table:
    """The same over UCX."""
    note = (
        "Medians. Ours is x: how many times as fast, median over neighbouring rounds. ucx_perftest: up to 32 messages "
        "of a\nrow's length under way, from and to one buffer that nobody looks at; both its processes spin, so its "
        "CPU is twice\nits time. Unprepared: descriptor lists are made for every transfer. Loop late: latest tick of a "
        "1 ms ticker while\nours is repeated, untimed."
    )
    return dataclasses.replace(network_table(lines), note=note)


def file_table(lines: Sequence[Line]) -> Table:
    """Between memory and a file, one row a case and system."""
    headers = ["shape", "op", "way", "system", "by", "speed", "ours is x", "CPU s/GiB", "x CPU", "loop late", "bytes"]
    rows = []
    for line in lines:
        assert isinstance(line.case, FileCase)
        for name, system in {OURS: line.ours, **line.rivals}.items():
            own, cpu = system is line.ours, system.cpu_seconds_per_gib
            cells = [str(line.case.shape), line.case.op, line.case.way, name, system.samples[-1].backend]
            cells += [_speed(system), "" if own else f"{line.ratio_to(system):.2f}", f"{cpu:.3f}"]
            cells += ["" if own or not cpu else f"{line.ours.cpu_seconds_per_gib / cpu:.2f}"]
            rows.append([*cells, _ms(line.lateness["max"]) if own else "", _verdict(system.problem)])
    note = (
        "Medians. Contiguous: in the file; rows are always scattered in memory. Ours is x: how many times as fast, "
        "median\nover neighbouring rounds; x CPU: how many times its CPU time ours takes. Nobody looks at the bytes of "
        "fio,\nwhose CPU time leaves out what the kernel's own threads do for it. Loop late: latest tick of a 1 ms "
        "ticker while\nours is repeated, untimed."
    )
    return Table(headers, rows, note)


def object_table(lines: Sequence[Line]) -> Table:
    """Between memory and objects, one row a case and system."""
    headers = ["shape", "op", "link", "system", "by", "speed", "ours is x", "CPU ms an op", "x CPU", "loop late"]
    rows = []
    for line in lines:
        assert isinstance(line.case, ObjectCase)
        for name, system in {OURS: line.ours, **line.rivals}.items():
            own, cpu = system is line.ours, system.cpu_seconds_per_row
            cells = [str(line.case.shape), line.case.op, line.case.link, name, system.samples[-1].backend]
            cells += [_speed(system), "" if own else f"{line.ratio_to(system):.2f}", f"{cpu * 1e3:.3f}"]
            cells += ["" if own or not cpu else f"{line.ours.cpu_seconds_per_row / cpu:.2f}"]
            verdict = _verdict(system.problem) if line.case.looked_at else "not kept"
            rows.append([*cells, _ms(line.lateness["max"]) if own else "", verdict])
    note = (
        "Medians. All objects of a shape are moved at once. Ours is x: how many times as fast, median over "
        "neighbouring\nrounds. CPU ms an op: of the client's process, for each object; x CPU: how many times it ours "
        "takes. Not kept:\na null server keeps nothing that could be looked at. Loop late: latest tick of a 1 ms "
        "ticker while ours is\nrepeated, untimed."
    )
    return Table([*headers, "bytes"], rows, note)


def post_table(results: Sequence[Posted]) -> Table:
    """What it costs to post, one row a case and system."""
    headers = ["shape", "op", "memory", "system", "call", "a row", "until done", "a row", "CPU a row", "done at once"]
    rows = []
    for result in results:
        count = result.case.shape.count
        cells = [*_case(result.case), result.system]
        for each in (result.call_seconds_per_row, result.seconds_per_row):
            cells += [f"{each * count * 1e6:.1f} us", f"{each * 1e9:.0f} ns"]
        cells += [f"{result.cpu_seconds_per_row * 1e9:.0f} ns", f"{result.at_once:.0%}"]
        rows.append([*cells, _verdict(result.problem)])
    note = (
        "Medians. Call: from calling the plan (NIXL: transfer) until that returns; it includes what a transport moves "
        "within\nthe call, and leaves out rows that are posted later. CPU: the initiator's, until done. Done at once: "
        "transfers that\nwere done when the call returned."
    )
    return Table([*headers, "bytes"], rows, note)


def idle_table(results: Sequence[Idle]) -> Table:
    """What connections cost that nothing goes over."""
    headers = ["system", "peers", "seconds", "target", "of a core", "an initiator", "of a core"]
    rows = []
    for result in results:
        cells = [result.system, str(result.peers), f"{result.seconds:.0f}"]
        cells += [f"{result.target * 1e3:.1f} ms", f"{result.target_share:.3%}"]
        each = result.initiators / result.peers if result.peers else 0.0
        rows.append(
            [*cells, *([f"{each * 1e3:.1f} ms", f"{result.initiator_share:.3%}"] if result.peers else ["", ""])]
        )
    return Table(headers, rows, "CPU time while nothing happened. Initiators share a few processes.")


def notify_table(results: Sequence[Notified]) -> Table:
    """How soon receivers know, one row a system."""
    headers = ["shape", "memory", "over", "system", "p50", "p99", "bytes"]
    rows = []
    for result in results:
        times = [f"{result.percentile(percent) * 1e6:.1f} us" for percent in (50, 99)]
        cells = [str(result.case.shape), result.case.memory, result.over, result.system]
        rows.append([*cells, *times, _verdict(result.problem)])
    note = "From posting a put with a notification until the target has it; NIXL's target polls without pause."
    return Table(headers, rows, note)


def stall_table(stalls: Sequence[Stall]) -> Table:
    """How late the loop was, without and with transfers."""
    names = list(stalls[0].idle)
    first = stalls[0].case
    where = "way" if isinstance(first, FileCase) else "link" if isinstance(first, ObjectCase) else "memory"
    headers = ["shape", "op", where, "GB/s", "ticker", *names, "bytes"]
    rows = []
    for stall in stalls:
        seen = not isinstance(stall.case, ObjectCase) or stall.case.looked_at
        speed, verdict = f"{stall.gigabytes_per_second:.2f}", _verdict(stall.problem) if seen else "not kept"
        tickers = {"idle": stall.idle, "moving": stall.moving}
        if stall.served is not None:
            tickers["target"] = stall.served
        for label, late in tickers.items():
            values = [_ms(late[name]) for name in names]
            rows.append([*_case(stall.case), speed, label, *values, verdict])
    return Table(headers, rows, "Lateness of a 1 ms ticker on the loop that awaits the transfers, and on the target's.")


def flood_table(floods: Sequence[Flood]) -> Table:
    """Many transfers at once, and the memory they kept."""
    headers = ["transfers", "shape", "op", "memory", "posted by", "in flight", "us each", "peak MiB", "kept MiB"]
    headers += ["bytes"]
    rows = []
    for flood in floods:
        last = flood.passes[-1]
        peak = last["memory"]["during"] - last["memory"]["before"]
        cells = [str(flood.transfers), *_case(flood.case), "plan" if flood.prepared else flood.case.op]
        cells += [str(last["in_flight"]), f"{last['seconds'] / flood.transfers * 1e6:.2f}"]
        cells += [f"{size / (1 << 20):.1f}" for size in (peak, flood.kept_bytes)]
        rows.append([*cells, _verdict(flood.problem)])
    note = (
        "In flight: not yet done when the last was posted. Peak: private memory when all were done, over before.\n"
        "Kept: private memory after the last pass, over after the first."
    )
    return Table(headers, rows, note)


def show(table: Table) -> None:
    """Print `table` to standard output."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        rich_table: Any = importlib.import_module("rich.table").Table(*table.headers)
        for row in table.rows:
            rich_table.add_row(*row)
        importlib.import_module("rich").print(rich_table)
    else:
        columns = zip(table.headers, *table.rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        for cells in (table.headers, ["-" * width for width in widths], *table.rows):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            print("  ".join(padded).rstrip())
    print(table.note)


def to_plain(result: Line | Stall | Flood | Notified | Posted | Idle) -> dict[str, Any]:
    """One result as plain values, for JSON; times in seconds, sizes in bytes."""
    if isinstance(result, Idle):
        shares = {"target_share": result.target_share, "initiator_share": result.initiator_share}
        return {**dataclasses.asdict(result), **shares}
    case = result.case
    plain: dict[str, Any] = {"shape": str(case.shape), "op": case.op}
    if isinstance(case, FileCase):
        plain |= {"way": case.way}
    elif isinstance(case, ObjectCase):
        plain |= {"link": case.link, "looked_at": case.looked_at}
    else:
        plain |= {"memory": case.memory, "prepared": case.prepared}
    if isinstance(result, Line):
        plain |= {"ours": _measured(result.ours), "ratio": result.ratio}
        plain |= {"nixl": _measured(result.nixl) if result.nixl else None}
        rivals = {name: _measured(rival) | {"ratio": result.ratio_to(rival)} for name, rival in result.rivals.items()}
        plain |= {"rivals": rivals}
        plain |= {"lateness": result.lateness}
        return plain
    if isinstance(result, Notified):
        plain |= {"system": result.system, "over": result.over, "samples": list(result.seconds)}
        plain |= {"p50": result.percentile(50), "p99": result.percentile(99)}
    elif isinstance(result, Posted):
        plain |= {"system": result.system, "called": list(result.called), "ended": list(result.ended)}
        plain |= {"call_seconds_per_row": result.call_seconds_per_row, "seconds_per_row": result.seconds_per_row}
        plain |= {"cpu_seconds_per_row": result.cpu_seconds_per_row, "at_once": result.at_once}
    elif isinstance(result, Stall):
        plain |= {"idle": result.idle, "moving": result.moving, "transfers": result.transfers}
        plain |= {"gigabytes_per_second": result.gigabytes_per_second}
    else:
        plain |= {"transfers": result.transfers, "prepared": result.prepared}  # by a plan, or called
        plain |= {"passes": list(result.passes), "kept_bytes": result.kept_bytes}
    return plain | {"verified": not result.problem, "problem": result.problem}


def machine() -> dict[str, Any]:
    """What a reader has to know of where this ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _measured(measured: Measured) -> dict[str, Any]:
    return {
        "backend": measured.samples[-1].backend,
        "seconds": measured.seconds,
        "gigabytes_per_second": measured.gigabytes_per_second,
        "cpu_seconds_per_gib": measured.cpu_seconds_per_gib,
        "cpu_seconds_per_row": measured.cpu_seconds_per_row,
        "target_cpu_seconds_per_gib": measured.target_cpu_seconds_per_gib,
        "samples": [sample.seconds for sample in measured.samples],
        "verified": not measured.problem,
        "problem": measured.problem,
    }


def _case(case: Case | FileCase | ObjectCase) -> list[str]:
    if isinstance(case, FileCase):
        where: str = case.way
    else:
        where = case.link if isinstance(case, ObjectCase) else case.memory
    return [str(case.shape), case.action, where]


def _speed(measured: Measured) -> str:
    if measured.case.shape.nbytes < _SMALL:
        return f"{measured.seconds * 1e6:.2f} us"
    return f"{measured.gigabytes_per_second:.2f} GB/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _problems(line: Line) -> list[str]:
    return [system.problem for system in (line.ours, *line.rivals.values())]


def _verdict(*problems: str) -> str:
    return "; ".join(filter(None, problems)) or "verified"
