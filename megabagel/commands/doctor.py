"""`megabagel doctor`."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has, lacks and has wrong",
        description="Look at packages, devices, memory, limits and launch variables.",
        epilog="exit code: 0 nothing is wrong, 1 something is, or a row named by --require is absent. "
        "example: megabagel doctor --require cuda triton",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    doctor.add_argument("--require", metavar="ROW", nargs="+", default=[], help="rows that must not be absent")
    doctor.add_argument("--dir", metavar="DIR", type=Path, default=Path(), help="where runs will be written")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megabagel.doctor.row import as_json, exit_code, show, wrong
    from megabagel.doctor.software import software
    from megabagel.errors import UserError

    rows = list(software())
    lacking = [row.name for row in rows if row.name in ("torch", "psutil") and row.status != "ok"]
    if lacking:
        rows.append(wrong("machine", "not looked at", f"mend {' and '.join(lacking)} first"))
    else:
        from megabagel.doctor.machine import machine

        rows += machine(args.dir)
    unknown = [name for name in args.require if name not in {row.name for row in rows}]
    if unknown and not lacking:
        raise UserError(
            f"doctor --require {' '.join(unknown)}: no such row; expected some of {', '.join(row.name for row in rows)}"
        )
    if args.json:
        print(as_json(rows))
    else:
        show(rows, Console(soft_wrap=False))
    return exit_code(rows, args.require)
