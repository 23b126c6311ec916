"""The three stages of an evaluation over one folder, each resumable at any item.

OUT/evaluation.json          suite, items, model and settings: what must not change between starts
OUT/generated.N-of-M.jsonl   a record per output, by replica; pictures in OUT/outputs, in the official layout
OUT/judge.json               the judge, its version of the questions
OUT/judged.jsonl             a record per question with its answer and scores; null scores: unparsable
OUT/summary.json, table.md   the result, and what is missing from it
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from megabagel.errors import UserError
from megabagel.evaluation.charts import markdown_table
from megabagel.evaluation.generate import OUTPUTS, check_picture, finished, jobs
from megabagel.evaluation.judges.judge import Judge, request_digest
from megabagel.evaluation.suite import Item, Line, Request, Row, Rule, Suite
from megabagel.journal import Journal, Record, read_journal, write_json, write_whole

logger = logging.getLogger(__name__)

IDENTITY, JUDGE, JUDGED, SUMMARY, TABLE = "evaluation.json", "judge.json", "judged.jsonl", "summary.json", "table.md"
EXACT = "exact"
"""Criterion of scores by a program."""


def claim(file: Path, identity: Record) -> Record:
    """Write what an evaluation is, or compare it with what the folder holds.

    Raises:
        UserError: the folder holds another evaluation; names the first difference.
    """
    identity = json.loads(json.dumps(identity))
    try:
        known = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}); remove the folder or name another --out") from error
    if known is None:
        write_json(file, identity)
        return identity
    for path, theirs, mine in _differences(known, identity):
        raise UserError(
            f"{file}: {path} is {theirs!r:.80} there and {mine!r:.80} here: two evaluations in one folder would mix. "
            "Name another --out, or repeat the command that began this one."
        )
    return identity


def _differences(known: Any, mine: Any, path: str = "") -> Any:
    if isinstance(known, dict) and isinstance(mine, dict):
        for name in dict.fromkeys((*known, *mine)):
            yield from _differences(known.get(name), mine.get(name), f"{path}.{name}".lstrip("."))
    elif known != mine:
        yield path, known, mine


def items_digest(items: Sequence[Item]) -> str:
    """Of a suite's items, all of them: another version of the benchmark has another digest."""
    names = [{k: v for k, v in item.items() if k != "images"} for item in items]
    return hashlib.sha256(json.dumps(names, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def judge_outputs(
    suite: Suite,
    items: Sequence[Item],
    out: Path,
    judge: Judge | None,
    templates: Mapping[str, str],
    parallel: int = 1,
) -> None:
    """Score every output that is there and not scored yet.

    Args:
        suite: the benchmark.
        items: those of this evaluation.
        out: its folder.
        judge: None for the suite's own program.
        templates: texts of the questions.
        parallel: questions asked at a time.

    Raises:
        UserError: the judge cannot answer; what it answered before is kept.
    """
    name = judge.name if judge else EXACT
    texts = hashlib.sha256(json.dumps(dict(templates), sort_keys=True).encode()).hexdigest()[:16]
    errors = suite.gate() if judge is None and suite.gate else None
    claim(out / JUDGE, {"judge": name, "templates": texts, "errors": errors})
    journal = Journal(out / JUDGED)
    done = {(r["id"], r["sample"], r["criterion"]): r["request"] for r in journal.records}
    asked = []
    for item, sample, output in _outputs(suite, items, out):
        if judge is None:
            digest = _digest(output)
            if done.get((item["id"], sample, EXACT)) != digest:
                about = {"id": item["id"], "sample": sample, "criterion": EXACT, "request": digest}
                journal.append({**about, "scores": _exact(suite, item, output)})
            continue
        for request in suite.requests(item, output, templates):
            digest = request_digest(request)
            if done.get((item["id"], sample, request.criterion)) != digest:
                asked.append((item, sample, request, digest))
    if asked and judge is not None:
        _ask(suite, judge, asked, journal, parallel)


def _exact(suite: Suite, item: Item, output: Path | str) -> Record:
    if suite.exact is None:
        raise UserError(f"{suite.name}: has no program that judges it; name one with --judge")
    return suite.exact(item, output)


def _ask(
    suite: Suite, judge: Judge, asked: Sequence[tuple[Item, int, Request, str]], journal: Journal, parallel: int
) -> None:
    """Ask all questions; records are written as answers arrive, by this thread alone."""
    with ThreadPoolExecutor(parallel) as pool:
        waiting = {
            pool.submit(judge, request): (item, sample, request, digest) for item, sample, request, digest in asked
        }
        failure: UserError | None = None
        try:
            for future in as_completed(waiting):
                if future.cancelled():
                    continue
                item, sample, request, digest = waiting[future]
                try:
                    reply = future.result()
                except UserError as error:
                    # Answers that are on their way were paid for: they are kept before the error ends the command.
                    failure = failure or error
                    for other in waiting:
                        other.cancel()
                    continue
                about = {"id": item["id"], "sample": sample, "criterion": request.criterion, "request": digest}
                tokens = [reply.prompt_tokens, reply.answer_tokens]
                scores = suite.parse(item, request.criterion, reply.text)
                journal.append({**about, "answer": reply.text, "scores": scores, "tokens": tokens, "cost": reply.cost})
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if failure is not None:
        raise failure


def _outputs(suite: Suite, items: Sequence[Item], out: Path) -> Any:
    """Yield (item, sample, picture's path or answer) of every output that is there."""
    records = finished(out)
    samples = max((sample for _, sample in records), default=0) + 1
    for item, sample in jobs(items, samples):
        record = records.get((item["id"], sample))
        if record is None:
            continue
        if "text" in record:
            yield item, sample, record["text"]
        else:
            check_picture(path := out / OUTPUTS / record["file"])
            yield item, sample, path


def _digest(output: Path | str) -> str:
    content = output.encode() if isinstance(output, str) else output.read_bytes()
    return hashlib.sha256(content).hexdigest()[:32]


def summarise(suite: Suite, items: Sequence[Item], out: Path, samples: int, rule: Rule) -> Record:
    """Aggregate the scores; writes summary and table, and returns the summary.

    Outputs that are missing, failed, not judged or judged unparsably are listed and not scored.

    Args:
        suite: gives the aggregation.
        items: of the suite, as far as they were chosen.
        out: folder of the evaluation.
        samples: outputs per item.
        rule: `published` or `intended`, for suites whose released script is wrong.
    """
    records, judged = finished(out), {}  # type: ignore[var-annotated]
    for record in read_journal(out / JUDGED):
        judged.setdefault((record["id"], record["sample"]), {})[record["criterion"]] = record
    failed = [r for path in sorted(out.glob("generated.*.jsonl")) for r in read_journal(path) if "error" in r]
    rows, lists = [], {"missing": [], "not judged": [], "unparsable": []}  # type: ignore[var-annotated]
    for item, sample in jobs(items, samples):
        key, label = (item["id"], sample), f"{item['id']}/{sample}"
        if key not in records:
            lists["missing"].append(label)
            continue
        answers = judged.get(key, {})
        wanted = _criteria(suite, item, records[key], out, answers)
        if not wanted <= answers.keys() or not answers:
            lists["not judged"].append(label)
        elif bad := [name for name in sorted(wanted) if answers[name]["scores"] is None]:
            lists["unparsable"].append(f"{label} ({', '.join(bad)})")
        else:
            scores = {k: v for name in answers for k, v in (answers[name]["scores"] or {}).items()}
            rows.append(Row(item, sample, scores, records[key].get("text")))
    lines = suite.aggregate(rows, rule) if rows else []
    suite.export(_with_answers(items, records), out)
    summary = {
        "suite": suite.name,
        **json.loads((out / IDENTITY).read_text()),
        "judge": json.loads((out / JUDGE).read_text()) if (out / JUDGE).is_file() else None,
        "rule": rule,
        "outputs": len(items) and len(jobs(items, samples)),
        "scored": len(rows),
        "cost": sum(record.get("cost", 0.0) for answers in judged.values() for record in answers.values()),
        **lists,
        "failed": sorted(
            {f"{r['id']}/{r['sample']}: {r['error']}" for r in failed if (r["id"], r["sample"]) not in records}
        ),
        "scores": {line.name: line.estimate and {**line.estimate.to_json(), "scale": line.scale} for line in lines},
    }
    write_json(out / SUMMARY, summary)
    write_whole(out / TABLE, table(suite.name, lines, summary))
    return summary


def _criteria(suite: Suite, item: Item, record: Record, out: Path, answers: Mapping[str, Record]) -> set[str]:
    """Names of the scores that an output needs."""
    if EXACT in answers:
        return {EXACT}
    output = record["text"] if "text" in record else out / OUTPUTS / record["file"]
    return {request.criterion for request in suite.requests(item, output, suite.templates)}


def _with_answers(items: Sequence[Item], records: Mapping[tuple[str, int], Record]) -> list[Row]:
    """All answers, judged or not, for the files that official scorers read."""
    found = ((item, records.get((item["id"], 0))) for item in items)
    return [Row(item, 0, {}, record["text"]) for item, record in found if record and "text" in record]


def table(name: str, lines: Sequence[Line], summary: Mapping[str, Any]) -> str:
    """Markdown: a row per score with its 95 % confidence interval, then what is missing."""
    cells = [
        [
            line.name,
            line.estimate.text(line.scale, 1 if line.scale == 100 else 3) if line.estimate else "",
            line.estimate.count if line.estimate else 0,
        ]
        for line in lines
    ]
    left = [
        f"- {kind}: {len(summary[kind])}" for kind in ("missing", "failed", "not judged", "unparsable") if summary[kind]
    ]
    head = f"{name}: {summary['scored']} of {summary['outputs']} outputs scored ({summary['rule']} rule)\n\n"
    return (
        head
        + markdown_table(("score", "value (95 % interval)", "n"), cells)
        + ("\n" + "\n".join(left) + "\n" if left else "")
    )
