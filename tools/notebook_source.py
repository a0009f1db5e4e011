"""A notebook as what git compares: the source of its cells, nothing of outputs and counts."""
import json
import sys
from pathlib import Path


def source(text: str) -> str:
    "The cells of a notebook under `# %%` lines; what is no notebook, such as one with conflict marks in it, as it is."
    try: cells = json.loads(text)["cells"]
    except (json.JSONDecodeError, KeyError, TypeError): return text
    heads = {"code": "# %%", "markdown": "# %% [markdown]"}
    return "\n".join(f"{heads.get(c['cell_type'], '# %% [raw]')}\n{''.join(c['source'])}\n" for c in cells)


if __name__ == "__main__": sys.stdout.write(source(Path(sys.argv[1]).read_text(encoding="utf-8")))
