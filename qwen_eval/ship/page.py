"""The tables of a certificate, and its page: one HTML file that loads nothing."""

from __future__ import annotations

from qwen_eval.report import html
from qwen_eval.ship.config import SIDES
from qwen_eval.ship.run import ShipRun
from qwen_eval.ship.standing import ShipVerdict
from qwen_eval.ship.words import certificate_tables, failed_notes, look_tables
from qwen_eval.tables import Table


def tables(run: ShipRun, verdict: ShipVerdict) -> list[Table]:
    failed: dict[str, dict[str, list[str]]] = {
        name: {side: asked.failed(side) for side in SIDES} for name, asked in run.asked.items()
    }
    standings = [asked.standing for asked in run.asked.values()]
    notes = dict.fromkeys(f"{name}: {note}" for name, asked in run.asked.items() for note in asked.notes)
    return certificate_tables(verdict, standings, run.spec, [*failed_notes(failed), *notes])


def page(run: ShipRun, verdict: ShipVerdict) -> str:
    standings = [asked.standing for asked in run.asked.values()]
    title = f"{run.spec.candidate.name} for {run.spec.reference.name}: {verdict.word}"
    return html.page(title, [*tables(run, verdict), *look_tables(standings)], ())
