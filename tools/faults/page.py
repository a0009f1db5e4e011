"""The page of the site about faults, made from the figures of the last full run in docs/faults.json."""
import json
import os
import platform
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Path("docs/faults.json") # of the repository
TITLES = dict(lifecycle="Lifecycle", damage="Damaged files", kills="Kills", architectures="Architectures", memory="Memory")
INTRO = """# What was tried to break it

`make faults` tries what can go wrong in 20 minutes on two cores, and says how far it got. `make faults FAULTS_ARGS=--full` does
the counts below and writes this page. A case *holds* if the result is right. *Refused* means an error that names what came
and the way out, with nothing changed. Children are forked from one process that has imported everything; each has a time limit.
"""


def stamped(results: list[dict], full: bool) -> dict:
    "The results, with what they were measured on."
    import torch
    import transformers

    from modlab.show.provenance import stamp
    return dict(stamp(full=full, date=date.today().isoformat(), python=platform.python_version(), torch=torch.__version__,
                      transformers=transformers.__version__, cores=os.cpu_count()), parts=results)


def keep(found: dict) -> None:
    "Put the results of a full run in the place of those that the page shows, part by part."
    path = ROOT / FIGURES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    facts = {k: v for k, v in found.items() if k != "parts"}
    parts = {r["name"]: r for r in known.get("parts", [])} | {r["name"]: r | facts for r in found["parts"]}
    kept = {"parts": [parts[name] for name in TITLES if name in parts]}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def told(row: dict) -> str: return ", ".join(f"{k} {v}" for k, v in row.items())


def table(rows: list[dict]) -> str:
    "Rows as a table in Markdown."
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [[cell(row.get(c, "")) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(r) + " |" for r in [columns, ["---"] * len(columns), *cells])


def cell(value: object) -> str:
    if isinstance(value, bool): return "yes" if value else "no"
    if isinstance(value, float): return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def part(result: dict) -> str:
    "The section of one part."
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "transformers", "python"))
    facts = (f"{result['date']}, modlab {result['version']} at {result['commit']}, {versions}, {result['cores']} cores, "
             f"{result['seconds'] / 60:.0f} minutes.")
    about = result.get("about", "")
    return "\n\n".join(filter(None, [f"## {TITLES[result['name']]}", about, table(result["rows"]), facts]))


def text(root: Path = ROOT) -> str:
    "The page."
    parts = json.loads((root / FIGURES).read_text(encoding="utf-8"))["parts"]
    counts = ("planned", "tried", "held", "refused", "failed")
    whole = [dict(what=TITLES[r["name"]], **{k: r.get(k, 0) for k in counts}) for r in parts]
    return "\n\n".join([INTRO.strip(), table(whole), *map(part, parts)]) + "\n"
